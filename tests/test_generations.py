"""Tests of what one generation of TensorFlow does with the other's checkpoints."""

import glob
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from support.compat import tf
from tests import clusters, harness, reference

OTHER = os.path.join(harness.FOLDER, '.venv', 'tf2' if tf.__version__.startswith('1.') else 'tf1')
pytestmark = pytest.mark.skipif(
    not os.path.exists(os.path.join(OTHER, 'ready')),
    reason='the other generation of TensorFlow is not in .venv',
)


def start_other(name, *flags):
    """Starts a script under the other generation."""
    return subprocess.Popen(
        [os.path.join(OTHER, 'bin', 'python'), os.path.join(harness.FOLDER, name), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=harness.script_environment(),
        universal_newlines=True,
    )


def lines_of(process):
    """Waits for the end. Returns the lines of output without the first."""
    output, _ = process.communicate(timeout=harness.TIMEOUT)
    assert process.returncode == 0, output
    lines = output.splitlines()
    assert re.search(r'with TensorFlow (\d)\.', lines[0]).group(1) != tf.__version__[0]
    return lines[1:]


@pytest.fixture(scope='module')
def evaluated(known_precision, tmp_path_factory):
    """A checkpoint, and an evaluator of the other generation."""
    folder = tmp_path_factory.mktemp('evaluated')
    values = reference.checkpoint_values(12, {}, known_precision.variables)
    path = reference.write_checkpoint(folder, 12, values)
    flags = f'--data_dir={known_precision.data_dir}', f'--checkpoint_dir={folder}', '--run_once'
    return path, start_other(harness.EVAL, *flags, f'--eval_dir={folder}/eval')


@pytest.fixture(scope='module')
def resumed(evaluated, interrupted_run, data_dir, tmp_path_factory):
    """The last checkpoint of the interrupted run, and the output of a trainer that resumed it."""
    folder, step = tmp_path_factory.mktemp('resumed'), interrupted_run.finished_at
    for path in glob.glob(f'{interrupted_run.train_dir}/model.ckpt-{step}.*'):
        shutil.copy(path, str(folder))
    folders = f'--data_dir={data_dir}', f'--train_dir={folder}'
    flags = '--batch_size=8', f'--max_steps={step + 1}', '--log_frequency=1'
    return step, folder, lines_of(start_other(harness.TRAIN, *folders, *flags))


def test_other_generation_evaluates_checkpoint(evaluated, resumed):
    path, evaluator = evaluated
    lines = lines_of(evaluator)
    assert path in '\n'.join(lines)
    assert lines[-1].endswith('precision @ 1 = 0.575')  # 23 of 40.


def test_other_generation_resumes_run(resumed):
    step, folder, lines = resumed
    assert f'{folder}/model.ckpt-{step},' in '\n'.join(lines)
    assert f': step {step}, loss' in lines[-2]
    before = reference.read_checkpoint(f'{folder}/model.ckpt-{step}')
    after = reference.read_checkpoint(f'{folder}/model.ckpt-{step + 1}')
    assert sorted(after) == reference.CHECKPOINT_NAMES
    assert after['global_step'] == step + 1
    # After one step, the new averages show which values the old ones had.
    decay = (1 + step + 1) / (10 + step + 1)
    for name in reference.MODEL:
        average = name + reference.AVERAGE
        assert not np.array_equal(after[name], before[name])
        assert np.abs(after[name] - before[name]).max() < 1
        expected = decay * before[average] + (1 - decay) * after[name]
        np.testing.assert_allclose(after[average], expected, rtol=1e-4, atol=1e-6)


def test_two_machines_resume_run_of_other_generation(start, data_dir, resumed):
    step, folder, _ = resumed
    cluster = clusters.Cluster(start, data_dir, folder)
    try:
        cluster.start(f'--max_steps={step + 3}').assert_finished(step + 3)
        assert f'{folder}/model.ckpt-{step + 1}' in cluster[clusters.CHIEF].stdout
    finally:
        cluster.kill()
