"""Checks that memory, threads and open files of a trainer and an evaluator do not grow.

    python tests/soak/endurance.py            eight minutes
    python tests/soak/endurance.py --quick    one minute

Both run at the same time, with many saves and evaluations. The last quarter of the time is compared
with the three before: the median of the memory, the maximum of the rest, because the evaluator has
more threads while it evaluates. During the first half, memory is still being taken into use. Linux
only.
"""

import os
import re
import signal
import statistics
import time

import soak
from soak import expect
from tests import harness

# By how much the last quarter may be above those before.
ALLOWED = {'memory (MB)': 15, 'threads': 1, 'open files': 1}
ALLOWED_QUICK = dict(ALLOWED, **{'memory (MB)': 40})  # It may still grow in a minute.


def look_at(script):
    """Returns what the process has now, as in ALLOWED."""
    expect(script.status() is None, f'it ended by itself:\n{soak.output(script)}')
    with open(f'/proc/{script.pid}/status') as file:
        status = dict(line.split(':', 1) for line in file)
    return {
        'memory (MB)': int(status['VmRSS'].split()[0]) / 1024,
        'threads': int(status['Threads']),
        'open files': len(os.listdir(f'/proc/{script.pid}/fd')),
    }


def quarters(samples, what):
    """The typical value of each quarter of the time."""
    typical = statistics.median if what == 'memory (MB)' else max
    size = len(samples) // 4
    parts = [samples[i * size : (i + 1) * size] for i in range(4)]
    return [round(typical(sample[what] for sample in part)) for part in parts]


def test(args, scratch):
    data_dir, train_dir = soak.small_data(args, scratch), os.path.join(scratch, 'train')
    with soak.scripts(os.path.join(scratch, 'scripts')) as start:
        trainer = start(
            harness.TRAIN,
            *['--data_dir=' + data_dir, '--train_dir=' + train_dir, '--batch_size=32'],
            f'--save_checkpoint_secs={soak.SAVE_SECS}',
            fresh=True,
        )
        evaluator = start(
            harness.EVAL,
            *['--data_dir=' + data_dir, '--checkpoint_dir=' + train_dir],
            '--eval_dir=' + os.path.join(scratch, 'eval'),
            *['--eval_interval_secs=1', '--num_examples=500'],
            fresh=True,
        )
        trainer.wait_for(': step')
        evaluator.wait_for('precision')
        scripts, samples = {'trainer': trainer, 'evaluator': evaluator}, []
        end = time.monotonic() + (60 if args.quick else 480)
        while time.monotonic() < end:
            samples.append({name: look_at(script) for name, script in scripts.items()})
            time.sleep(1)
        trainer.send(signal.SIGTERM)
        expect(trainer.wait() == 143, f'the trainer failed:\n{soak.output(trainer)}')
        evaluations = evaluator.stdout.count('precision')
        steps = re.search(r'at step (\d+)', trainer.lines[-1]).group(1)
    summaries = []
    for name in scripts:
        for what, more in (ALLOWED_QUICK if args.quick else ALLOWED).items():
            *before, last = quarters([sample[name] for sample in samples], what)
            shown = f'{name}, {what}: {", ".join(map(str, [*before, last]))}'
            expect(last <= max(before) + more, f'it grows: {shown}')
            summaries.append(shown)
    return f'{steps} steps and {evaluations} evaluations; in quarters: ' + '; '.join(summaries)


if __name__ == '__main__':
    soak.run(__doc__, test)
