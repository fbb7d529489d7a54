"""Kills trainers with SIGKILL, resumes them, and checks that nothing is lost.

    python tests/soak/kills.py            as below, half an hour
    python tests/soak/kills.py --quick    few kills and steps, a minute

First it kills at each step of writing a checkpoint: whenever a file is about to be
opened, written to, closed, renamed or removed (kill_at.c; needs Linux and cc).

Then it kills a trainer on the real data set at random moments, from its start to long
after a checkpoint, and starts it again, fifty times. It has to go on from the newest
checkpoint, never more than one interval behind; the loss has to go on from where it
was; and in the end the network has to be as good as that of a run which nobody
disturbed.
"""

import argparse
import datetime
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(FOLDER)))

from tests import harness, reference

from support.compat import tf

SAVE_SECS = 3
SLACK_SECS = 2  # A step, a save, and a machine that does other things as well.
COMPARED_STEPS = 20
LOSS_JUMP = 0.4  # Between means of 20 batches; initial weights would be worse by more.


class LostError(Exception):
    """What has been lost."""


def expect(condition, what):
    if not condition:
        raise LostError(what)


def is_usable(path):
    """Can every variable be read? TensorFlow looks at the checksums."""
    try:
        return sorted(reference.read_checkpoint(path)) == reference.CHECKPOINT_NAMES
    except (tf.errors.OpError, ValueError, IndexError):
        return False


def newest_step(train_dir):
    """The step of the newest usable checkpoint, 0 without any."""
    names = os.listdir(train_dir) if os.path.isdir(train_dir) else []
    steps = [re.match(r'model\.ckpt-(\d+)\.index$', name) for name in names]
    for step in sorted((int(step.group(1)) for step in steps if step), reverse=True):
        if is_usable(os.path.join(train_dir, f'model.ckpt-{step}')):
            return step
    return 0


def check_listed(train_dir, when):
    """Expects the state file to name two checkpoints or more, all of them usable."""
    state = tf.train.get_checkpoint_state(train_dir)
    usable = [is_usable(path) for path in state.all_model_checkpoint_paths]
    expect(len(usable) >= 2 and all(usable), f'{when}: usable are {usable} of\n{state}')


def resumed_step(script):
    """The global step that a trainer went on from, None if it began anew or had not begun."""
    match = re.search(r'^Resuming from \S+-(\d+),', script.stdout, re.MULTILINE)
    return match and int(match.group(1))


def output(script):
    return script.stdout + script.stderr


# --- At each step of saving --------------------------------------------------


def run_alone(start, data_dir, train_dir, flags, before):
    """Runs a trainer to its end. Returns it."""
    folders = ['--data_dir=' + data_dir, '--train_dir=' + train_dir]
    script = start(harness.TRAIN, *folders, *flags, before=before)
    script.wait()
    return script


def kill_while_saving(scratch, stride, run=run_alone):
    """Kills at every `stride`-th step of writing. Returns a line on what was seen.

    Args:
      run: function as run_alone(), which returns the process that is killed.
    """
    data_dir, train_dir = os.path.join(scratch, 'data'), os.path.join(scratch, 'staged')
    log_path, library = os.path.join(scratch, 'steps.log'), os.path.join(scratch, 'kill_at.so')
    subprocess.check_call(
        ['cc', '-shared', '-fPIC', '-o', library, os.path.join(FOLDER, 'kill_at.c'), '-ldl']
    )
    reference.write_data(data_dir, reference.rectangle_images(340), [0] * 340, test_images=40)
    os.environ['LD_PRELOAD'] = library
    start = harness.Starter(scratch)
    del os.environ['LD_PRELOAD']

    def train(kill_at):
        """A trainer that does one step on a tiny batch and saves. Returns it and its log."""
        script = run(
            start,
            data_dir,
            train_dir,
            ['--batch_size=8', '--max_to_keep=2', f'--max_steps={newest_step(train_dir) + 1}'],
            before=f'import os; os.environ.update(KILL_LOG={log_path!r}, KILL_AT="{kill_at}")',
        )
        steps = harness.read(log_path).splitlines()
        os.remove(log_path)
        return script, steps

    try:
        for _ in range(3):
            script, steps = train(kill_at=0)
            expect(script.status() == 0, f'it failed:\n{output(script)}')
        for verb in 'open', 'write', 'close', 'rename', 'remove':
            expect(any(step.split()[1] == verb for step in steps), f'no {verb} seen: {steps}')
        killed = 0
        for number in range(1, len(steps) + 1, stride):
            before = newest_step(train_dir)
            script, done = train(kill_at=number)
            if len(done) < number:  # Less to remove: what earlier kills kept from being written.
                whole = script.status() == 0 and number > len(steps) - 3
                expect(whole, f'only {len(done)} steps:\n{output(script)}')
                continue
            killed += 1
            when = f'killed at step {done[-1]}'
            expect(script.status() == -9, f'{when}: status {script.status()}:\n{output(script)}')
            expect(resumed_step(script) == before, f'it did not go on from {before}')
            check_listed(train_dir, when)
            print(f'{when}; newest {before} -> {newest_step(train_dir)}', flush=True)
        before = newest_step(train_dir)
        script, _ = train(kill_at=0)
        expect(script.status() == 0, f'it failed:\n{output(script)}')
        expect(newest_step(train_dir) == before + 1, f'no checkpoint of step {before + 1}')
    finally:
        start.end()
    return f'killed at {killed} of the {len(steps)} steps of saving'


# --- At random moments -------------------------------------------------------


def log_of(script):
    """List of (step, loss, time) from the lines of a trainer."""
    lines = re.findall(r'^(\S+ \S+): step (\d+), loss = (\S+) ', script.stdout, re.MULTILINE)
    parse = datetime.datetime.strptime
    return [
        (int(step), float(loss), parse(when, '%Y-%m-%d %H:%M:%S.%f').timestamp())
        for when, step, loss in lines
    ]


class Witness:
    """Compares what a life of a run says with what the lives before have said."""

    def __init__(self):
        self.seen = {}  # Step -> (loss, time) as last logged.
        self.killed_at = None
        self.newest = 0  # The newest checkpoint after the last kill.
        self.lost_secs, self.jumps = [0], [0]

    def check(self, script, killed_at, newest):
        """Takes down a life that has ended, and the newest checkpoint after it.

        Returns what to tell of it.
        """
        log, start = log_of(script), resumed_step(script)
        expected, self.newest = self.newest, newest
        if start is None and not log:
            return 'before it had resumed'
        start = start or 0
        expect(start == expected, f'it went on from step {start}, not from {expected}')
        if start in self.seen:  # Then this step had been done before the kill, and was lost.
            lost = self.killed_at - self.seen[start][1]
            expect(lost <= SAVE_SECS + SLACK_SECS, f'the work of {lost:.1f} s was lost')
            self.lost_secs.append(lost)
        before = range(start - COMPARED_STEPS, start)
        before = [self.seen[step][0] for step in before if step in self.seen]
        after = [loss for _, loss, _ in log[:COMPARED_STEPS]]
        if min(len(before), len(after)) >= COMPARED_STEPS // 2:
            jump = statistics.mean(after) - statistics.mean(before)
            expect(abs(jump) < LOSS_JUMP, f'the loss jumped by {jump:.2f} at step {start}')
            self.jumps.append(abs(jump))
        # What lies behind the checkpoint has been done anew or not at all.
        self.seen = {step: seen for step, seen in self.seen.items() if step < start}
        self.seen.update((step, (loss, when)) for step, loss, when in log)
        self.killed_at = killed_at
        return f'from step {start} to {log[-1][0] + 1 if log else start}'


def kill_at_random(scratch, data_dir, kills, more_steps, num_examples, tolerance):
    """Kills, then trains so many steps more. Returns a line on what was seen."""
    start = harness.Starter(scratch)
    disturbed_dir, undisturbed_dir = (os.path.join(scratch, name) for name in ('killed', 'left'))

    def train(train_dir, *flags):
        flags = ['--train_dir=' + train_dir, '--data_dir=' + data_dir, *flags]
        return start(
            harness.TRAIN, *flags, '--log_frequency=1', f'--save_checkpoint_secs={SAVE_SECS}'
        )

    def precision(train_dir, max_steps):
        """Trains to the end and evaluates."""
        script = train(train_dir, f'--max_steps={max_steps}')
        expect(script.wait(3600) == 0, f'the last run failed:\n{output(script)}')
        expect(newest_step(train_dir) == max_steps, f'it ended at {newest_step(train_dir)}')
        script = start(
            harness.EVAL,
            '--run_once',
            f'--num_examples={num_examples}',
            '--data_dir=' + data_dir,
            '--checkpoint_dir=' + train_dir,
            f'--eval_dir={train_dir}-eval',
        )
        expect(script.wait() == 0, f'the evaluator failed:\n{output(script)}')
        return float(re.search(r'precision @ 1 = (\S+)', script.stdout).group(1))

    try:
        script = train(disturbed_dir)
        begin = time.time()
        script.wait_for('step 1,')
        longest = 2.5 * (time.time() - begin)  # So that most of the kills come after the start.
        witness, chance = Witness(), random.Random(0)
        for kill in range(1, kills + 1):
            time.sleep(chance.uniform(0, longest))
            expect(script.status() is None, f'it ended by itself:\n{output(script)}')
            script.kill()
            told = witness.check(script, time.time(), newest_step(disturbed_dir))
            print(f'kill {kill}: {told}', flush=True)
            script = train(disturbed_dir)
        script.kill()
        max_steps = newest_step(disturbed_dir) + more_steps
        disturbed = precision(disturbed_dir, max_steps)
        undisturbed = precision(undisturbed_dir, max_steps)
    finally:
        start.end()
    seen = f'precision {disturbed:.3f} after {max_steps} steps, undisturbed {undisturbed:.3f}'
    expect(disturbed > undisturbed - tolerance, seen)
    return (
        f'{kills} random kills: at most {max(witness.lost_secs):.1f} s of work lost at a time '
        f'({SAVE_SECS} s between checkpoints), the loss jumped by {max(witness.jumps):.2f} at '
        f'most; {seen}'
    )


def arguments(description):
    """Those of the command line. After it, SIGTERM is an exit that leaves no process behind."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_dir', default='/tmp/cifar10_data', help='as for the scripts')
    parser.add_argument('--quick', action='store_true', help='fewer kills and steps')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return parser.parse_args()


def main():
    args = arguments(__doc__)
    stride, at_random = 1, dict(kills=50, more_steps=500, num_examples=10000, tolerance=0.03)
    if args.quick:
        stride, at_random = 12, dict(kills=3, more_steps=30, num_examples=2000, tolerance=0.1)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        try:
            reports = [
                kill_while_saving(first, stride),
                kill_at_random(second, args.data_dir, **at_random),
            ]
        except LostError as error:
            sys.exit(f'kills.py: LOST: {error}')
    print('\n'.join(reports))


if __name__ == '__main__':
    main()
