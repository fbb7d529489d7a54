"""Kills trainers with SIGKILL, resumes them, and checks that nothing is lost.

    python tests/soak/kills.py
    python tests/soak/kills.py --quick

First it kills a trainer at each step of writing a checkpoint: just before a file is opened, written
to, closed, renamed or removed (kill_at.c; needs Linux and cc).

Then it kills a trainer fifty times at a random moment, during the start or during training. Each
time the trainer must resume from the newest checkpoint, with at most one interval of work lost, and
the loss must continue at its value. At the end the accuracy must be that of an undisturbed run.
"""

import os
import random
import re
import statistics
import subprocess
import time

import soak
from soak import expect, first_step, newest_step, output
from support.compat import tf
from tests import harness, reference

SLACK_SECS = 3  # For a step and a save, on a busy machine.
COMPARED_STEPS = 20
LOSS_JUMP = 0.4  # Between means of 20 batches. Initial weights would be worse by more.


def kill_while_saving(scratch, stride):
    """Kills at every `stride`-th step of saving. Returns a summary."""
    data_dir, train_dir = f'{scratch}/tiny_data', f'{scratch}/saving'
    log_path, library = f'{scratch}/steps.log', f'{scratch}/kill_at.so'
    reference.write_data(data_dir, reference.rectangle_images(340), [0] * 340, test_images=40)
    source = f'{soak.ROOT}/tests/soak/kill_at.c'
    subprocess.check_call(['cc', '-shared', '-fPIC', '-o', library, source, '-ldl'])

    def train(kill_at):
        """Trains for one step, which ends with a save. Returns the trainer and its steps."""
        before = newest_step(train_dir)
        open(log_path, 'w').close()
        flags = f'--data_dir={data_dir}', f'--train_dir={train_dir}', '--batch_size=8'
        trainer = start(
            harness.TRAIN,
            *[*flags, '--max_to_keep=2', f'--max_steps={before + 1}'],
            before=f'import os; os.environ.update(KILL_LOG={log_path!r}, KILL_AT="{kill_at}")',
        )
        trainer.wait()
        expect(first_step(trainer) == before, f'not resumed from {before}:\n{output(trainer)}')
        return trainer, harness.read(log_path).splitlines()

    def train_to_the_end():
        step = newest_step(train_dir) + 1
        trainer, steps = train(kill_at=0)
        expect(trainer.status() == 0, f'the trainer failed:\n{output(trainer)}')
        expect(newest_step(train_dir) == step, f'no checkpoint of step {step}')
        return steps

    os.environ['LD_PRELOAD'] = library
    with soak.scripts(scratch) as start:
        del os.environ['LD_PRELOAD']
        steps, killed = [train_to_the_end() for _ in range(3)][-1], 0
        seen = {step.split()[1] for step in steps}
        expect(seen == {'open', 'write', 'close', 'rename', 'remove'}, f'only seen: {steps}')
        for number in range(1, len(steps) + 1, stride):
            before = newest_step(train_dir)
            trainer, done = train(kill_at=number)
            # After a kill, there may be fewer files to remove.
            if trainer.status() == 0 and len(steps) - 3 <= len(done) < number:
                continue
            when = f'killed before step {done[-1] if done else None}'
            expect(trainer.status() == -9, f'{when}: {trainer.status()}\n{output(trainer)}')
            state = tf.train.get_checkpoint_state(train_dir)
            usable = [soak.is_usable(path) for path in state.all_model_checkpoint_paths]
            expect(len(usable) >= 2 and all(usable), f'{when}: usable: {usable} of\n{state}')
            print(f'{when}; newest {before} -> {newest_step(train_dir)}', flush=True)
            killed += 1
        train_to_the_end()
    return f'killed at {killed} of the {len(steps)} steps of saving'


def loss_jump(losses, first):
    """How much the loss changes at the step from which a trainer resumed; 0 if unknown."""
    before, after = (
        [losses[step] for step in range(start, start + COMPARED_STEPS) if step in losses]
        for start in (first - COMPARED_STEPS, first)
    )
    if min(len(before), len(after)) < COMPARED_STEPS // 2:
        return 0
    return abs(statistics.mean(after) - statistics.mean(before))


def kill_at_random(data_dir, scratch, kills, first_kill, more_steps, tolerance):
    """Kills a trainer, at first after step `first_kill`. Then trains on. Returns a summary."""
    killed_dir, calm_dir = f'{scratch}/killed', f'{scratch}/calm'
    chance, losses, jumps, lost_secs, start_secs = random.Random(0), {}, [], [], 0

    def train(train_dir, max_steps=10**6):
        flags = f'--train_dir={train_dir}', f'--data_dir={data_dir}', f'--max_steps={max_steps}'
        often = '--log_frequency=1', f'--save_checkpoint_secs={soak.SAVE_SECS}'
        return start(harness.TRAIN, *flags, '--batch_size=32', *often)

    with soak.scripts(scratch) as start:
        for kill in range(kills):
            newest, begin = newest_step(killed_dir), time.time()
            trainer = train(killed_dir)
            if kill % 2:
                time.sleep(chance.uniform(0, start_secs))
            else:
                trainer.wait_for(': step')
                start_secs = time.time() - begin
                if kill == 0:  # The loss has to be far from that of initial weights.
                    harness.until(lambda it=trainer: f': step {first_kill},' in it.stdout, 600)
                time.sleep(chance.uniform(0, 4 * soak.SAVE_SECS))
            expect(trainer.status() is None, f'it ended by itself:\n{output(trainer)}')
            trainer.kill()
            killed_at, first = time.time(), first_step(trainer)
            expect(first in (None, newest), f'started at step {first}, not at {newest}')
            printed = re.findall(r': step (\d+), loss = (\S+) ', trainer.stdout)
            if printed:
                expect(int(printed[0][0]) == newest, f'the first step is {printed[0][0]}')
                # Later steps are done again.
                losses = {step: loss for step, loss in losses.items() if step < newest}
                losses.update((int(step), float(loss)) for step, loss in printed)
                jumps.append(loss_jump(losses, newest))
                expect(jumps[-1] < LOSS_JUMP, f'the loss jumped by {jumps[-1]} at step {newest}')
            newest = newest_step(killed_dir)
            if not kill % 2:
                saved_at = os.path.getmtime(f'{killed_dir}/model.ckpt-{newest}.index')
                lost_secs.append(killed_at - max(saved_at, begin + start_secs))
                what = f'{lost_secs[-1]:.1f} s of work lost at step {printed[-1][0]}'
                expect(lost_secs[-1] < soak.SAVE_SECS + SLACK_SECS, what)
            print(f'kill {kill + 1} after {len(printed)} steps; newest {newest}', flush=True)
        max_steps = newest + more_steps
        for train_dir in killed_dir, calm_dir:
            trainer = train(train_dir, max_steps)
            expect(trainer.wait(3600) == 0, f'the last run failed:\n{output(trainer)}')
            expect(newest_step(train_dir) == max_steps, f'it ended at {newest_step(train_dir)}')
        comparison = soak.compare(start, data_dir, killed_dir, calm_dir, tolerance)
    return (
        f'{kills} random kills, at most {max(lost_secs):.1f} s of work lost at a time '
        f'({soak.SAVE_SECS} s between saves), loss jumps of at most {max(jumps):.2f}; {comparison}'
    )


def test(args, scratch):
    how = dict(kills=50, first_kill=250, more_steps=300, tolerance=0.05)
    if args.quick:
        how = dict(kills=6, first_kill=20, more_steps=30, tolerance=0.1)
    saving = kill_while_saving(scratch, stride=10 if args.quick else 1)
    return f'{saving}; ' + kill_at_random(soak.small_data(args, scratch), scratch, **how)


if __name__ == '__main__':
    soak.run(__doc__, test)
