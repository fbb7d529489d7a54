"""Measures the cost of a step on several machines: its time, and the traffic of each machine.

    sudo .venv/tf2/bin/python benchmarks/several_machines.py --data_dir=/data/cifar10

The machines are network namespaces on one bridge, so they share the cores of this machine. The time
of a step therefore shows the cost of the distribution and not its gain; the traffic is that of real
machines. Links are as fast as the memory, or limited by a token bucket filter. All runs train with
128 images per step. The layouts take turns, round by round. Prints a table in Markdown. Needs root
and an otherwise idle machine.
"""

import argparse
import os
import re
import signal
import statistics
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tests import clusters, harness

IMAGES = 128
WARM_UP = 10  # Steps.
# Machines, Mbit/s of each link (None: no limit).
LAYOUTS = [(1, None), (2, None), (4, None), (2, 1000), (4, 1000), (2, 100), (4, 100)]


def wait_for_step(script, step):
    """Waits until a step is logged. Returns the newest one."""

    def newest():
        return max(map(int, re.findall(r': step (\d+), ', script.stdout)), default=0)

    harness.until(lambda: newest() >= step or script.status() is not None, 600)
    if newest() < step:
        sys.exit(f'no step {step}:\n{script.stdout}{script.stderr}')
    return newest()


def processor_ms(script):
    """The processor time of a process up to now."""
    fields = harness.read(f'/proc/{script.pid}/stat').rpartition(')')[2].split()
    return 1000 * (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def measure(start, data_dir, machines, mbits, steps):
    """Trains on a network.

    Returns:
      A dict: 'ms', the median time of a step; 'idle', the part of the time in which this machine's
      cores were idle; 'chief' and 'worker', the pairs (MB sent, MB received) in a step.
    """
    with tempfile.TemporaryDirectory() as train_dir, clusters.Network(machines) as network:
        if mbits:
            network.limit(mbits)
        cluster = clusters.Cluster(start, data_dir, train_dir, machines - 1, network.addresses)
        before = {name: network.enter(i) for i, name in enumerate(cluster.names)}

        def count():
            traffic = [network.bytes_sent_and_received(i) for i in range(machines)]
            return sum(map(processor_ms, cluster.scripts.values())), traffic

        try:
            # Without a checkpoint in between.
            flags = [f'--batch_size={IMAGES // machines}', '--save_checkpoint_secs=100000']
            chief = cluster.start(*flags, before=before)[clusters.CHIEF]
            first = wait_for_step(chief, WARM_UP)
            processor_before, traffic_before = count()
            last = wait_for_step(chief, first + steps)
            processor_after, traffic_after = count()
        finally:
            cluster.kill()
    times = [1000 * float(each) for each in re.findall(r'; (\S+) sec/batch', chief.stdout)]
    times = times[first:last]
    busy = (processor_after - processor_before) / sum(times) / os.cpu_count()
    megabytes = [
        tuple((b - a) / 1e6 / (last - first) for a, b in zip(*pair))
        for pair in zip(traffic_before, traffic_after)
    ]
    return {
        'ms': statistics.median(times),
        'idle': max(0, 1 - busy),
        'chief': megabytes[0],
        'worker': megabytes[-1],
    }


def row(machines, mbits, rounds, alone):
    """A line of the table: medians over the rounds; the extremes of the time in parentheses."""
    times = [each['ms'] for each in rounds]
    cells = [f'{machines} × {IMAGES // machines}' + (f', {mbits} Mbit/s' if mbits else '')]
    cells.append(f'{statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f})')
    ratio = statistics.median(each['ms'] / one['ms'] for each, one in zip(rounds, alone))
    cells.append(f'{ratio:.2f}')
    cells.append(f'{statistics.median(each["idle"] for each in rounds):.0%}')
    for role in 'chief', 'worker':
        sent, received = (
            statistics.median(each[role][direction] for each in rounds) for direction in (0, 1)
        )
        cells.append(f'{sent:.1f} / {received:.1f}' if role == 'chief' or machines > 1 else '')
    return f'| {" | ".join(cells)} |'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_dir', default='/tmp/cifar10_data', help='as for the scripts')
    parser.add_argument('--steps', type=int, default=60, help='to measure, of each layout')
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rounds = {layout: [] for layout in LAYOUTS}
    with tempfile.TemporaryDirectory() as scratch:
        start = harness.Starter(scratch)
        try:
            for _ in range(args.rounds):
                for layout in LAYOUTS:
                    rounds[layout].append(measure(start, args.data_dir, *layout, args.steps))
                    print(layout, f'{rounds[layout][-1]["ms"]:.0f} ms', file=sys.stderr)
        finally:
            start.end()
    print('| machines × images, link | ms per step | × one process | cores idle | chief | worker |')
    print('|---|---|---|---|---|---|')
    for layout in LAYOUTS:
        print(row(*layout, rounds[layout], rounds[LAYOUTS[0]]))


if __name__ == '__main__':
    main()
