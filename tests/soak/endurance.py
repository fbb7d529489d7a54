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

# By how much the last quarter may be above those before. In a minute, memory may still grow.
ALLOWED = {'memory (MB)': 15, 'threads': 1, 'open files': 1}
ALLOWED_QUICK = {**ALLOWED, 'memory (MB)': 40}


def look_at(script):
    """Returns what the process has now, as in ALLOWED."""
    expect(script.status() is None, f'it ended by itself:\n{soak.output(script)}')
    status = dict(re.findall(r'^(\w+):\s+(\d+)', harness.read(f'/proc/{script.pid}/status'), re.M))
    files = len(os.listdir(f'/proc/{script.pid}/fd'))
    return dict(zip(ALLOWED, [int(status['VmRSS']) / 1024, int(status['Threads']), files]))


def test(args, scratch):
    data_dir, train_dir = f'--data_dir={soak.small_data(args, scratch)}', f'{scratch}/train'
    with soak.scripts(scratch) as start:
        flags = f'--train_dir={train_dir}', f'--save_checkpoint_secs={soak.SAVE_SECS}'
        trainer = start(harness.TRAIN, data_dir, *flags, '--batch_size=32', fresh=True)
        flags = f'--checkpoint_dir={train_dir}', f'--eval_dir={scratch}/eval'
        often = '--eval_interval_secs=1', '--num_examples=500'
        evaluator = start(harness.EVAL, data_dir, *flags, *often, fresh=True)
        trainer.wait_for(': step')
        evaluator.wait_for('precision')
        scripts, samples = {'trainer': trainer, 'evaluator': evaluator}, []
        end = time.monotonic() + (60 if args.quick else 480)
        while time.monotonic() < end:
            samples.append({name: look_at(script) for name, script in scripts.items()})
            time.sleep(1)
        trainer.send(signal.SIGTERM)
        expect(trainer.wait() == 143, f'the trainer failed:\n{soak.output(trainer)}')
    summaries, size = [], len(samples) // 4
    for name in scripts:
        for what, more in (ALLOWED_QUICK if args.quick else ALLOWED).items():
            typical = statistics.median if what == 'memory (MB)' else max
            values = [sample[name][what] for sample in samples]
            quarters = [round(typical(values[i * size : (i + 1) * size])) for i in range(4)]
            summaries.append(f'{name}, {what}: {quarters}')
            expect(quarters[3] <= max(quarters[:3]) + more, f'it grows: {summaries[-1]}')
    steps = re.search(r'at step (\d+)', trainer.lines[-1]).group(1)
    evaluations = evaluator.stdout.count('precision')
    return f'{steps} steps and {evaluations} evaluations; in quarters: ' + '; '.join(summaries)


if __name__ == '__main__':
    soak.run(__doc__, test)
