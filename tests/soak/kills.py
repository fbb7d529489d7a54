"""Kills trainers with SIGKILL, resumes them, and checks that nothing is lost.

    python tests/soak/kills.py            as below, half an hour
    python tests/soak/kills.py --quick    few kills and steps, a few minutes

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

import cifar10_test
from support import checkpoints
from support import dataset

SAVE_SECS = 3
SLACK_SECS = 2      # A step, a save, and a machine that does other things as well.
COMPARED_STEPS = 20
LOSS_JUMP = 0.4     # Between means of 20 batches; initial weights would be worse by more.


started = []


class Failure(Exception):
    """What has been lost."""


def expect(condition, what, *details):
    if not condition:
        raise Failure(what % details)


def run_script(scratch, name, *flags, **environment):
    """Starts a script with its output in `scratch`. Returns a cifar10_test.Script."""
    script = cifar10_test.start_script(
        os.path.join(scratch, str(len(started))), name, flags,
        dict(cifar10_test.script_environment(), **environment))
    started.append(script)
    return script


def newest_step(train_dir):
    found = checkpoints.checkpoints(train_dir)
    return found[0].step if found else 0


def log_of(script):
    """List of (step, loss, time) from the lines of a trainer."""
    lines = re.findall(r'^(\S+ \S+): step (\d+), loss = (\S+) ', script.stdout, re.MULTILINE)
    return [(int(step), float(loss),
             datetime.datetime.strptime(when, '%Y-%m-%d %H:%M:%S.%f').timestamp())
            for when, step, loss in lines]


def resumed_step(script):
    """The global step that a trainer went on from, None if it began anew or had not begun."""
    match = re.search(r'^Resuming from \S+-(\d+)\.$', script.stdout, re.MULTILINE)
    return match and int(match.group(1))


def precision(scratch, data_dir, train_dir):
    """The precision of the newest checkpoint."""
    script = run_script(scratch, 'cifar10_eval.py', '--run_once', '--data_dir=' + data_dir,
                        '--checkpoint_dir=' + train_dir, '--eval_dir=' + train_dir + '-eval')
    expect(script.wait() == 0, 'the evaluator failed:\n%s', script.stderr)
    return float(re.search(r'precision @ 1 = (\S+)', script.stdout).group(1))


class Witness:
    """Compares what the lives of one run say with what the lives before have said."""

    def __init__(self):
        self.losses = {}      # Step -> (loss, time) as last logged.
        self.killed_at = None
        self.newest = 0       # The newest checkpoint after the last kill.
        self.lost_secs = []
        self.jumps = []

    def check(self, script, killed_at, newest):
        """Takes down a life that has ended, and the newest checkpoint after it.

        Returns what to tell of it.
        """
        log, start = log_of(script), resumed_step(script)
        expected, self.newest = self.newest, newest
        if start is None and not log:
            return 'killed before it had resumed'
        start = start or 0
        expect(start == expected, 'it went on from step %d, not from the checkpoint of step %d',
               start, expected)
        told = 'resumed at step %d' % start
        if start in self.losses:  # Then this step had been done before the kill, and was lost.
            lost = self.killed_at - self.losses[start][1]
            expect(lost <= SAVE_SECS + SLACK_SECS, 'the work of %.1f s was lost', lost)
            self.lost_secs.append(lost)
            told += ', %.1f s lost' % lost
        before = [self.losses[step][0] for step in range(start - COMPARED_STEPS, start)
                  if step in self.losses]
        after = [loss for _, loss, _ in log[:COMPARED_STEPS]]
        if min(len(before), len(after)) >= COMPARED_STEPS // 2:
            jump = statistics.mean(after) - statistics.mean(before)
            expect(abs(jump) < LOSS_JUMP, 'the loss jumped by %.2f at step %d', jump, start)
            self.jumps.append(jump)
            told += ', loss %+.2f' % jump
        # What lies behind the checkpoint has been done anew or not at all.
        self.losses = {step: seen for step, seen in self.losses.items() if step < start}
        self.losses.update((step, (loss, when)) for step, loss, when in log)
        self.killed_at = killed_at
        return told + (', ended at step %d' % (log[-1][0] + 1) if log else '')


def kill_at_random(scratch, data_dir, kills, more_steps, tolerance):
    """Kills, then trains so many steps more. Returns a line on what was seen."""
    dataset.maybe_download_and_extract(data_dir)
    disturbed_dir, undisturbed_dir = (os.path.join(scratch, name)
                                      for name in ('disturbed', 'undisturbed'))

    def train(train_dir, *flags):
        return run_script(scratch, 'cifar10_train.py', '--train_dir=' + train_dir,
                          '--data_dir=' + data_dir, '--log_frequency=1',
                          '--save_checkpoint_secs=%d' % SAVE_SECS, *flags)

    script = train(disturbed_dir)
    start = time.time()
    script.wait_for('step 1,')
    longest = 2.5 * (time.time() - start)  # So that most of the kills come after the start.

    witness, chance = Witness(), random.Random(0)
    for kill in range(1, kills + 1):
        time.sleep(chance.uniform(0, longest))
        expect(script.status() is None, 'it ended by itself:\n%s%s', script.stdout, script.stderr)
        script.kill()
        print('kill %d: %s' % (kill, witness.check(script, time.time(),
                                                   newest_step(disturbed_dir))), flush=True)
        script = train(disturbed_dir)
    script.kill()
    max_steps = newest_step(disturbed_dir) + more_steps
    script = train(disturbed_dir, '--max_steps=%d' % max_steps)
    expect(script.wait(3600) == 0, 'the last run failed:\n%s', script.stderr)
    expect(newest_step(disturbed_dir) == max_steps, 'it ended at %d', newest_step(disturbed_dir))
    expect(len(checkpoints.checkpoints(disturbed_dir)) <= 5, 'the old checkpoints were not removed')
    left = [name for name in os.listdir(disturbed_dir) if re.search('temp|tmp', name)]
    expect(not left, 'left lying about: %s', left)
    disturbed = precision(scratch, data_dir, disturbed_dir)

    script = train(undisturbed_dir, '--max_steps=%d' % max_steps)
    expect(script.wait(3600) == 0, 'the undisturbed run failed:\n%s', script.stderr)
    undisturbed = precision(scratch, data_dir, undisturbed_dir)
    expect(disturbed > undisturbed - tolerance, 'precision %.3f instead of %.3f',
           disturbed, undisturbed)
    return ('%d random kills: at most %.1f s of work lost at a time (%d s between checkpoints), '
            'the loss never jumped by more than %.2f; precision @ 1 after %d steps %.3f, '
            'undisturbed %.3f' % (kills, max(witness.lost_secs or [0]), SAVE_SECS,
                                  max(map(abs, witness.jumps or [0])), max_steps, disturbed,
                                  undisturbed))


def kill_while_saving(scratch, stride):
    """Kills at every `stride`-th step of writing. Returns a line on what was seen."""
    data_dir, train_dir = os.path.join(scratch, 'data'), os.path.join(scratch, 'staged')
    log_path, library = os.path.join(scratch, 'steps.log'), os.path.join(scratch, 'kill_at.so')
    subprocess.check_call(['cc', '-shared', '-fPIC', '-o', library,
                           os.path.join(FOLDER, 'kill_at.c'), '-ldl'])
    cifar10_test.write_data(data_dir, cifar10_test.rectangle_images(340), [0] * 340)

    def train(**environment):
        """A trainer that does one step on a tiny batch and saves."""
        script = run_script(
            scratch, 'cifar10_train.py', '--train_dir=' + train_dir, '--data_dir=' + data_dir,
            '--batch_size=8', '--max_to_keep=2', '--max_steps=%d' % (newest_step(train_dir) + 1),
            **environment)
        return script.wait(), script

    def read_log():
        with open(log_path) as file:
            lines = file.read().splitlines()
        os.remove(log_path)
        return lines

    train()
    train()
    status, script = train(LD_PRELOAD=library, KILL_LOG=log_path)
    expect(status == 0, 'it failed:\n%s', script.stderr)
    steps = read_log()
    for verb in 'open', 'write', 'close', 'rename', 'remove':
        expect(any(step.split()[1] == verb for step in steps), 'no %s seen: %s', verb, steps)
    for number in range(1, len(steps) + 1, stride):
        before = newest_step(train_dir)
        status, script = train(LD_PRELOAD=library, KILL_LOG=log_path, KILL_AT=str(number))
        expect(status == -9, 'status %d at step %d:\n%s', status, number, script.stderr)
        expect(resumed_step(script) == before, 'resumed at %s, not at %d',
               resumed_step(script), before)
        damage = [checkpoints.checkpoint_damage(each.path) for each in checkpoints.checkpoints(train_dir)]
        expect(len(damage) >= 2 and not any(damage), 'after %s: %s', steps[number - 1], damage)
        print('killed at step %s; newest %d -> %d' % (
            read_log()[-1], before, newest_step(train_dir)), flush=True)
    for _ in range(2):
        status, script = train()
        expect(status == 0 and 'Passing over' not in script.stdout, 'it failed:\n%s%s',
               script.stdout, script.stderr)
    names = sorted(name for name in os.listdir(train_dir) if re.match('model|checkpoint', name))
    expect(len(names) == 7, 'left lying about: %s', names)
    return 'killed at %d of the %d steps of writing a checkpoint: every checkpoint was usable' % (
        len(range(1, len(steps) + 1, stride)), len(steps))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='/tmp/cifar10_data', help='as for the scripts')
    parser.add_argument('--quick', action='store_true', help='fewer kills and steps')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            reports = [kill_while_saving(scratch, stride=8 if args.quick else 1)]
            reports.append(kill_at_random(scratch, args.data_dir, 4, 50, tolerance=0.1)
                           if args.quick else
                           kill_at_random(scratch, args.data_dir, 50, 500, tolerance=0.03))
        except Failure as failure:
            sys.exit('kills.py: LOST: %s' % failure)
        finally:
            for script in started:
                script.kill()
    print('\n'.join(reports))


if __name__ == '__main__':
    main()
