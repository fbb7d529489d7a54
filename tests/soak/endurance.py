"""Watches a trainer and an evaluator at work: memory, threads and open files stay flat.

    python tests/soak/endurance.py                      an hour of both, on the real data set
    python tests/soak/endurance.py --quick              less than a minute
    python tests/soak/endurance.py --pids 4711 4712     watches processes that run already

The last quarter of the time is compared with the three before: the median of the memory, the
maximum of the rest, since the evaluator has some threads only while it is at work. In the
first half, memory is still being taken into use: what malloc keeps for the evaluator grows
by some MB with each of the first 80 evaluations or so, and then no more. Linux only.
"""

import argparse
import os
import re
import signal
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from tests import harness

# By how much the last quarter may be above those before.
ALLOWED = {'memory (MB)': 15, 'threads': 1, 'open files': 1}
ALLOWED_QUICK = dict(ALLOWED, **{'memory (MB)': float('inf')})  # The time is too short.


def look_at(pid):
    """What the process has now, as in ALLOWED; None if it has ended."""
    try:
        with open(f'/proc/{pid}/status') as file:
            status = dict(line.split(':', 1) for line in file)
        return {
            'memory (MB)': int(status['VmRSS'].split()[0]) / 1024,
            'threads': int(status['Threads']),
            'open files': len(os.listdir(f'/proc/{pid}/fd')),
        }
    except (OSError, KeyError):
        return None


def watch(pids, minutes):
    """Looks at the processes once a second. Returns dict of name -> list of what was seen.

    Exits if one of them ends.
    """
    seen = {name: [] for name in pids}
    begin = said = time.time()
    while time.time() < begin + 60 * minutes:
        time.sleep(1)
        for name, pid in pids.items():
            now = look_at(pid)
            if now is None:
                sys.exit(f'endurance.py: the {name} has ended by itself')
            seen[name].append(now)
        if time.time() > said + 60:
            said = time.time()
            for name, samples in seen.items():
                told = ', '.join(f'{value:.0f} {what}' for what, value in samples[-1].items())
                print(f'{(said - begin) / 60:4.0f} min  {name}: {told}', flush=True)
    return seen


def quarters(samples, what):
    """What is typical of each quarter of the time."""
    typical = statistics.median if what == 'memory (MB)' else max
    size = len(samples) // 4
    parts = [samples[i * size : (i + 1) * size] for i in range(4)]
    return [typical(sample[what] for sample in part) for part in parts]


def watch_both(scratch, data_dir, minutes):
    """Starts a trainer and an evaluator, watches and stops them."""
    train_dir = os.path.join(scratch, 'train')
    start = harness.Starter(scratch)
    try:
        trainer = start(
            harness.TRAIN,
            '--data_dir=' + data_dir,
            '--train_dir=' + train_dir,
            '--save_checkpoint_secs=10',
            fresh=True,
        )
        evaluator = start(
            harness.EVAL,
            '--data_dir=' + data_dir,
            '--checkpoint_dir=' + train_dir,
            '--eval_dir=' + os.path.join(scratch, 'eval'),
            '--eval_interval_secs=10',
            fresh=True,
        )
        trainer.wait_for('step 0,')
        evaluator.wait_for('precision')
        seen = watch({'trainer': trainer.pid, 'evaluator': evaluator.pid}, minutes)
        trainer.send(signal.SIGTERM)
        if trainer.wait() != 143:
            sys.exit(f'endurance.py: the trainer failed:\n{trainer.stderr}')
    finally:
        start.end()
    steps = re.search(r'at step (\d+)', trainer.lines[-1]).group(1)
    precisions = re.findall('precision.*', evaluator.stdout)
    print(f'{steps} steps; {len(precisions)} evaluations, at last {precisions[-1]}')
    return seen


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_dir', default='/tmp/cifar10_data', help='as for the scripts')
    parser.add_argument('--minutes', type=float, default=60, help='default: %(default)s')
    parser.add_argument('--quick', action='store_true', help='half a minute')
    parser.add_argument('--pids', type=int, nargs='+', help='processes to watch')
    args = parser.parse_args()
    minutes = 0.5 if args.quick else args.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    if args.pids:
        seen = watch({f'process {pid}': pid for pid in args.pids}, minutes)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            seen = watch_both(scratch, args.data_dir, minutes)
    failed = False
    for name, samples in seen.items():
        for what, more in (ALLOWED_QUICK if args.quick else ALLOWED).items():
            *before, last = quarters(samples, what)
            grows = last > max(before) + more
            told = ', '.join(f'{value:.0f}' for value in [*before, last])
            print(f'{name}, {what}, in the quarters: {told}' + '   GROWS' * grows)
            failed |= grows
    sys.exit(failed)


if __name__ == '__main__':
    main()
