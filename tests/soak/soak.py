"""What the soak tests share: flags, errors, checkpoints, small data, one line at the end.

    python tests/soak/kills.py --data_dir=/tmp/cifar10_data

A test ends with status 0 and a line of numbers for docs/reliability.md, or with status 1 and a line
that says what was lost.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import pytest

from support.compat import tf
from tests import harness, reference

SAVE_SECS = 2  # Between two checkpoints.


class LostError(Exception):
    """Something is lost, or not as promised."""


def expect(condition, what):
    if not condition:
        raise LostError(what)


def run(description, test, **flags):
    """Parses the flags and runs a soak test in a temporary folder.

    Args:
      test: function of the flags and the folder. Returns a summary.
      flags: for a flag of this test only, its name and a dict for argparse.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_dir', default='/tmp/cifar10_data', help='default: %(default)s')
    parser.add_argument('--quick', action='store_true', help='a short test of about a minute')
    for name, settings in flags.items():
        parser.add_argument('--' + name, **settings)
    args, begin, title = parser.parse_args(), time.monotonic(), os.path.basename(sys.argv[0])
    # An exit, so that no process and no folder is left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix='soak-') as scratch:
        try:
            summary = test(args, scratch)
        except (LostError, AssertionError, pytest.fail.Exception) as error:
            traceback.print_exc()
            sys.exit(f'{title}: LOST: {error}')
    minutes = (time.monotonic() - begin) / 60
    print(f'{title}, TensorFlow {tf.__version__}, {minutes:.1f} min: {summary}', flush=True)


@contextlib.contextmanager
def scripts(scratch):
    """Yields a harness.Starter. Kills its scripts after."""
    start = harness.Starter(tempfile.mkdtemp(dir=scratch))
    try:
        yield start
    finally:
        start.end()


def output(script):
    return script.stdout + script.stderr


def small_data(args, scratch):
    """Copies a tenth of the data set at --data_dir, so that trainers start quickly."""
    there, here = (os.path.join(each, reference.DATA_FOLDER) for each in (args.data_dir, scratch))
    expect(os.path.isdir(there), f'{there} does not exist. Run: make data')
    os.makedirs(here)
    for name in reference.DATA_FILES:
        with open(f'{there}/{name}', 'rb') as whole, open(f'{here}/{name}', 'wb') as part:
            part.write(whole.read(1000 * 3073))
    return scratch


def is_usable(path):
    """Can every variable be read? TensorFlow verifies the checksums."""
    try:
        return sorted(reference.read_checkpoint(path)) == reference.CHECKPOINT_NAMES
    except (tf.errors.OpError, ValueError, IndexError):
        return False


def newest_step(train_dir):
    """The step of the newest usable checkpoint, 0 without any."""
    steps = harness.saved_steps(train_dir) if os.path.isdir(train_dir) else []
    return max((i for i in steps if is_usable(f'{train_dir}/model.ckpt-{i}')), default=0)


def first_step(trainer):
    """The step from which a trainer started or resumed; None if it has not come that far."""
    match = re.search(r'^(Training in|Resuming from \S+ckpt-(\d+))', trainer.stdout, re.MULTILINE)
    return match and int(match.group(2) or 0)


def compare(start, data_dir, killed_dir, calm_dir, tolerance):
    """Expects two runs of equal length to be equally accurate. Returns a summary."""
    precisions = []
    for folder in killed_dir, calm_dir:
        flags = f'--checkpoint_dir={folder}', f'--eval_dir={folder}-eval', '--run_once'
        evaluator = start(harness.EVAL, f'--data_dir={data_dir}', *flags)
        expect(evaluator.wait() == 0, f'the evaluator failed:\n{output(evaluator)}')
        precisions.append(float(re.search(r'precision @ 1 = (\S+)', evaluator.stdout).group(1)))
    steps = newest_step(killed_dir)
    summary = 'after {} steps, precision @ 1 is {:.3f}, {:.3f} without kills'
    summary = summary.format(steps, *precisions)
    expect(precisions[0] > precisions[1] - tolerance, summary)
    return summary
