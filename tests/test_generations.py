"""Tests of what one generation of TensorFlow does with the other's checkpoints."""

import glob
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from tests import clusters
from tests import harness
from tests import reference

OTHER = os.path.join(harness.FOLDER, '.venv', 'tf2' if tf.__version__.startswith('1.') else 'tf1')
pytestmark = pytest.mark.skipif(
    not os.path.exists(os.path.join(OTHER, 'ready')),
    reason='the other generation of TensorFlow is not in .venv',
)


def run_other(name, *flags):
    """Runs a script under the other generation. Returns its lines, without the first."""
    result = subprocess.run(
        [os.path.join(OTHER, 'bin', 'python'), os.path.join(harness.FOLDER, name), *flags],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=harness.script_environment(),
        timeout=harness.TIMEOUT,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    there = re.search(r'with TensorFlow (\d)\.', lines[0]).group(1)
    assert there != tf.__version__[0]
    return lines[1:]


def test_other_generation_evaluates_checkpoint(known_precision, tmp_path):
    values = reference.checkpoint_values(12, {}, known_precision.variables)
    path = reference.write_checkpoint(tmp_path, 12, values)
    lines = run_other(
        harness.EVAL,
        '--run_once',
        '--data_dir=' + known_precision.data_dir,
        f'--checkpoint_dir={tmp_path}',
        f'--eval_dir={tmp_path}/eval',
    )
    assert path in '\n'.join(lines)
    assert lines[-1].endswith('precision @ 1 = 0.575')  # 23 of 40.


def test_other_generation_resumes_run(interrupted_run, data_dir, tmp_path):
    step = interrupted_run.finished_at
    for path in glob.glob(f'{interrupted_run.train_dir}/model.ckpt-{step}.*'):
        shutil.copy(path, str(tmp_path))
    checkpoint = f'{tmp_path}/model.ckpt-{step}'
    lines = run_other(
        harness.TRAIN,
        '--batch_size=8',
        '--data_dir=' + data_dir,
        f'--train_dir={tmp_path}',
        f'--max_steps={step + 1}',
        '--log_frequency=1',
    )
    assert f'Resuming from {checkpoint},' in '\n'.join(lines)
    assert f': step {step}, loss' in lines[-2]
    before = reference.read_checkpoint(checkpoint)
    after = reference.read_checkpoint(f'{tmp_path}/model.ckpt-{step + 1}')
    assert sorted(after) == reference.CHECKPOINT_NAMES
    assert after['global_step'] == step + 1
    # One step: where the variables and their averages have come from shows in the new averages.
    decay = (1 + step + 1) / (10 + step + 1)
    for name in reference.MODEL:
        average = name + reference.AVERAGE
        assert not np.array_equal(after[name], before[name])
        assert np.abs(after[name] - before[name]).max() < 1
        expected = decay * before[average] + (1 - decay) * after[name]
        np.testing.assert_allclose(after[average], expected, rtol=1e-4, atol=1e-6)


def test_run_moves_to_two_machines_of_this_generation_and_back(start, data_dir, tmp_path):
    def train_other(max_steps):
        folders = ['--data_dir=' + data_dir, f'--train_dir={tmp_path}']
        return run_other(harness.TRAIN, *folders, '--batch_size=16', f'--max_steps={max_steps}')

    train_other(2)
    cluster = clusters.Cluster(start, data_dir, tmp_path)
    try:
        cluster.start('--max_steps=4').assert_finished(4)
    finally:
        cluster.kill()
    assert f'{tmp_path}/model.ckpt-2' in cluster[clusters.CHIEF].stdout
    assert f'{tmp_path}/model.ckpt-4' in '\n'.join(train_other(5))
    cluster.check(5)
