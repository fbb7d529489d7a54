"""Measures what a step costs on several machines: its time, and the bytes that each one sends.

    python benchmarks/several_machines.py                 on the real data set; needs root
    python benchmarks/several_machines_report.py          tables, model and picture of it

The machines are network namespaces of this one, on one bridge, so they share its cores. The time
of a step tells what distribution costs, not what it gains; the bytes are what they would be on
real machines. Links are as quick as the machine's memory, or limited by Linux' token bucket
filter. All train with 128 images a step. The layouts take turns, round by round. Writes
several_machines.json, beside this file. Run it on an otherwise idle machine.
"""

import argparse
import json
import os
import re
import signal
import statistics
import sys
import tempfile

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(FOLDER))

from tests import clusters, harness

IMAGES = 128
SLOW = 100
# Machines with a tower, ps tasks, Mbit/s of each link (None: no limit).
LAYOUTS = [(1, 0, None), (2, 0, None), (4, 0, None), (2, 1, None), (2, 2, None), (4, 1, None)]
LAYOUTS += [(4, 2, None), (2, 0, 1000), (4, 0, 1000), (4, 2, 1000), (2, 0, SLOW), (4, 0, SLOW)]
WARM_UP = 10  # Steps.


def wait_for_step(script, step):
    """Waits for a line of the log. Returns the first step that has one, at this step or later."""

    def newest():
        steps = re.findall(r': step (\d+), ', script.stdout)
        return steps and int(steps[-1]) >= step and int(steps[-1])

    found = harness.until(lambda: newest() or script.status() is not None, 600)
    if script.status() is not None or not found:
        sys.exit(f'several_machines.py: it failed:\n{script.stdout}{script.stderr}')
    return newest()


def processor_seconds(script):
    """What a process has computed up to now."""
    fields = harness.read(f'/proc/{script.pid}/stat').rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def measure(start, scratch, data_dir, layout, steps):
    """Trains on a network of so many machines.

    Returns:
      A dict: the milliseconds of each step; and for each machine the milliseconds of processor
      time and the MB sent and received in a step.
    """
    towers, ps, mbits = layout
    with tempfile.TemporaryDirectory(dir=scratch) as train_dir:
        with clusters.Network(towers + ps) as network:
            if mbits:
                network.limit(mbits)
            cluster = clusters.Cluster(
                start, data_dir, train_dir, towers - 1, ps, hosts=network.addresses
            )
            before = {name: network.enter(i) for i, name in enumerate(cluster.names)}
            # No checkpoint and no summary comes in between.
            flags = [f'--batch_size={IMAGES // towers}', '--save_checkpoint_secs=100000']
            cluster.start(*flags, before=before)

            def count():
                return [
                    [1000 * processor_seconds(cluster[name])]
                    + [number / 1e6 for number in network.sent_and_received(i)]
                    for i, name in enumerate(cluster.names)
                ]

            try:
                chief = cluster['chief']
                begin = wait_for_step(chief, WARM_UP)
                first = count()
                end = wait_for_step(chief, begin + (steps if mbits != SLOW else steps // 3))
                last = count()
            finally:
                cluster.kill()
    seconds = re.findall(r'; (\S+) sec/batch', chief.stdout)
    per_step = [[(b - a) / (end - begin) for a, b in zip(*pair)] for pair in zip(first, last)]
    return {
        'ms': [1000 * float(each) for each in seconds[begin:end]],
        'machines': {
            name: dict(zip(['cpu_ms', 'mb_sent', 'mb_received'], counts))
            for name, counts in zip(cluster.names, per_step)
        },
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_dir', default='/tmp/cifar10_data', help='as for the scripts')
    parser.add_argument('--steps', type=int, default=60, help='to measure, of each layout')
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = [
        {'towers': towers, 'ps': ps, 'mbits': mbits, 'rounds': []} for towers, ps, mbits in LAYOUTS
    ]
    with tempfile.TemporaryDirectory() as scratch:
        start = harness.Starter(scratch)
        try:
            for _ in range(args.rounds):
                for layout, result in zip(LAYOUTS, results):
                    found = measure(start, scratch, args.data_dir, layout, args.steps)
                    result['rounds'].append(found)
                    print(layout, f'{statistics.median(found["ms"]):.0f} ms a step', flush=True)
                with open(os.path.join(FOLDER, 'several_machines.json'), 'w') as file:
                    json.dump(results, file, indent=1)
        finally:
            start.end()


if __name__ == '__main__':
    main()
