"""Watches a trainer and an evaluator at work: memory, threads and open files stay flat.

    python tests/soak/endurance.py                      an hour of both, on the real data set
    python tests/soak/endurance.py --quick              a minute
    python tests/soak/endurance.py --pids 4711 4712     watches processes that run already

The median of the last quarter of the time is compared with that of the third. In the first
half, memory is still being taken into use: what malloc keeps for the evaluator grows
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

import cifar10_test

# How much the median of the last quarter may be above that of the third.
ALLOWED = {'memory (MB)': 15, 'threads': 1, 'open files': 1}
ALLOWED_QUICK = dict(ALLOWED, **{'memory (MB)': float('inf')})  # A minute is too short.


def look_at(pid):
    """What the process has now, as in ALLOWED; None if it has ended."""
    try:
        with open('/proc/%d/status' % pid) as file:
            status = dict(line.split(':', 1) for line in file)
        return {'memory (MB)': int(status['VmRSS'].split()[0]) / 1024,
                'threads': int(status['Threads']),
                'open files': len(os.listdir('/proc/%d/fd' % pid))}
    except (OSError, KeyError):
        return None


def watch(pids, minutes, say_every_secs=60):
    """Looks at the processes once a second. Returns dict of name -> list of what was seen.

    Exits if one of them ends.
    """
    seen = {name: [] for name in pids}
    start = said = time.time()
    while time.time() < start + 60 * minutes:
        time.sleep(1)
        for name, pid in pids.items():
            now = look_at(pid)
            if now is None:
                sys.exit('endurance.py: the %s has ended by itself' % name)
            seen[name].append(now)
        if time.time() > said + say_every_secs:
            said = time.time()
            print('%4.0f min  ' % ((said - start) / 60) + '   '.join(
                '%s: %s' % (name, ', '.join('%.0f %s' % (value, what) for what, value in
                                            samples[-1].items()))
                for name, samples in seen.items()), flush=True)
    return seen


def growth(seen, allowed):
    """Yields name, what, the medians of the quarters, and whether that is flat."""
    for name, samples in seen.items():
        quarter = len(samples) // 4
        for what, more in allowed.items():
            medians = [statistics.median(sample[what] for sample in
                                         samples[i * quarter:(i + 1) * quarter]) for i in range(4)]
            yield name, what, medians, medians[3] <= medians[2] + more


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='/tmp/cifar10_data', help='as for the scripts')
    parser.add_argument('--minutes', type=float, default=60, help='default: %(default)s')
    parser.add_argument('--quick', action='store_true', help='a minute')
    parser.add_argument('--pids', type=int, nargs='+', help='processes to watch')
    args = parser.parse_args()
    minutes = 1 if args.quick else args.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    if args.pids:
        seen = watch({'process %d' % pid: pid for pid in args.pids}, minutes)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            seen = watch_both(scratch, args.data_dir, minutes)
    failed = False
    for name, what, medians, is_flat in growth(seen, ALLOWED_QUICK if args.quick else ALLOWED):
        print('%s, %s, medians of the quarters: %s%s' % (
            name, what, ', '.join('%.0f' % value for value in medians),
            '' if is_flat else '   GROWS'))
        failed |= not is_flat
    sys.exit(failed)


def watch_both(scratch, data_dir, minutes):
    """Starts a trainer and an evaluator, watches and stops them."""
    train_dir = os.path.join(scratch, 'train')
    env = cifar10_test.script_environment()
    trainer = cifar10_test.start_script(
        os.path.join(scratch, 'trainer'), 'cifar10_train.py',
        ['--data_dir=' + data_dir, '--train_dir=' + train_dir, '--save_checkpoint_secs=10'], env)
    evaluator = cifar10_test.start_script(
        os.path.join(scratch, 'evaluator'), 'cifar10_eval.py',
        ['--data_dir=' + data_dir, '--checkpoint_dir=' + train_dir,
         '--eval_dir=' + os.path.join(scratch, 'eval'), '--eval_interval_secs=10'], env)
    try:
        trainer.wait_for('step 0,')
        evaluator.wait_for('Evaluating')
        seen = watch({'trainer': trainer.pid, 'evaluator': evaluator.pid}, minutes)
        trainer.send(signal.SIGTERM)
        if trainer.wait() != 143:
            sys.exit('endurance.py: the trainer failed:\n%s' % trainer.stderr)
    finally:
        trainer.kill()
        evaluator.kill()
    print('%s steps; %d evaluations, at last %s; %d checkpoints' % (
        re.search(r'at step (\d+)\.', trainer.lines[-1]).group(1),
        evaluator.stdout.count('precision @ 1'),
        re.findall('precision.*', evaluator.stdout)[-1],
        len(cifar10_test.saved_steps(train_dir))))
    return seen


if __name__ == '__main__':
    main()
