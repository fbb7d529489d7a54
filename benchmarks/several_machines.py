"""Measures what a step costs on several machines: its time, and the bytes that each one sends.

    python benchmarks/several_machines.py                 on the real data set; needs root
    python benchmarks/several_machines.py --steps=100

The machines are network namespaces of this one, on one bridge, so they share its cores, and
the network is as quick as its memory. The time of a step tells what distribution costs, not
what it gains; the bytes are what they would be on real machines. All train with 128 images a
step. Prints a row per layout. Run it on an otherwise idle machine.
"""

import argparse
import os
import re
import statistics
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tests import clusters, harness

IMAGES = 128
LAYOUTS = [(1, 0), (2, 0), (4, 0), (2, 1), (2, 2), (4, 1), (4, 2)]  # (with towers, ps tasks).
WARM_UP = 20  # Steps.


def wait_for_step(script, step):
    """Waits for a line of the log. Returns the first step that has one, at this step or later."""

    def newest():
        steps = re.findall(r': step (\d+), ', script.stdout)
        return steps and int(steps[-1]) >= step and int(steps[-1])

    found = harness.until(lambda: newest() or script.status() is not None, 600)
    if script.status() is not None or not found:
        sys.exit(f'several_machines.py: it failed:\n{script.stdout}{script.stderr}')
    return newest()


def measure(start, scratch, data_dir, layout, steps):
    """Trains on a network of so many machines. Returns the row of the table."""
    with_towers, ps = layout
    train_dir = os.path.join(scratch, f'{with_towers}-{ps}')
    with clusters.Network(with_towers + ps) as network:
        cluster = clusters.Cluster(
            start, data_dir, train_dir, with_towers - 1, ps, hosts=network.addresses
        )
        before = {name: network.enter(i) for i, name in enumerate(cluster.names)}
        # No checkpoint comes in between, but summaries do, as in any run: one step in 100.
        flags = [f'--batch_size={IMAGES // with_towers}', '--save_checkpoint_secs=100000']
        cluster.start(*flags, before=before)
        try:
            chief = cluster['chief']
            machines = range(len(cluster.names))
            begin = wait_for_step(chief, WARM_UP)
            counted = [network.sent_and_received(i) for i in machines]
            end = wait_for_step(chief, begin + steps)
            counts = [network.sent_and_received(i) for i in machines]
        finally:
            cluster.kill()
    seconds = [float(each) for each in re.findall(r'; (\S+) sec/batch', chief.stdout)]
    row = f'{with_towers} x {IMAGES // with_towers:3}, {ps} ps  '
    row += f'{1000 * statistics.median(seconds[begin:end]):7.0f}  '
    for name, first, last in zip(cluster.names, counted, counts):
        sent, received = ((b - a) / (end - begin) / 1e6 for a, b in zip(first, last))
        row += f'  {name}: {sent:.2f} / {received:.2f}'
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_dir', default='/tmp/cifar10_data', help='as for the scripts')
    parser.add_argument('--steps', type=int, default=200, help='to measure, of each layout')
    args = parser.parse_args()
    print('layout          ms a step    MB a step, sent / received by each machine')
    with tempfile.TemporaryDirectory() as scratch:
        start = harness.Starter(scratch)
        try:
            for layout in LAYOUTS:
                row = measure(start, scratch, args.data_dir, layout, args.steps)
                print(row, flush=True)
        finally:
            start.end()


if __name__ == '__main__':
    main()
