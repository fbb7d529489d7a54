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


def run_other(name, *flags):
    """Runs a script under the other generation. Returns its output without the first line."""
    python = os.path.join(OTHER, 'bin', 'python')
    command, env = (
        [python, os.path.join(harness.FOLDER, name), *flags],
        harness.script_environment(),
    )
    first, _, output = subprocess.check_output(command, env=env).decode().partition('\n')
    assert re.search(r'with TensorFlow (\d)\.', first).group(1) != tf.__version__[0]
    return output


def test_other_generation_evaluates_checkpoint(known_precision, tmp_path):
    values = reference.checkpoint_values(12, {}, known_precision.variables)
    path = reference.write_checkpoint(tmp_path, 12, values)
    folders = f'--checkpoint_dir={tmp_path}', f'--eval_dir={tmp_path}/eval'
    flags = f'--data_dir={known_precision.data_dir}', *folders, '--run_once'
    output = run_other(harness.EVAL, *flags)
    assert path in output and output.endswith('precision @ 1 = 0.575\n')  # 23 of 40.


def test_other_generation_resumes_run_and_two_machines_continue(
    interrupted_run, start, data_dir, tmp_path
):
    step = interrupted_run.finished_at
    for path in glob.glob(f'{interrupted_run.train_dir}/model.ckpt-{step}.*'):
        shutil.copy(path, str(tmp_path))
    folders = f'--data_dir={data_dir}', f'--train_dir={tmp_path}'
    flags = '--batch_size=8', f'--max_steps={step + 1}', '--log_frequency=1'
    output = run_other(harness.TRAIN, *folders, *flags)
    assert f'{tmp_path}/model.ckpt-{step},' in output and f': step {step}, loss' in output
    before = reference.read_checkpoint(f'{tmp_path}/model.ckpt-{step}')
    after = reference.read_checkpoint(f'{tmp_path}/model.ckpt-{step + 1}')
    assert sorted(after) == reference.CHECKPOINT_NAMES and after['global_step'] == step + 1
    # After one step, the new averages show which values the old ones had.
    decay = (1 + step + 1) / (10 + step + 1)
    for name in reference.MODEL:
        average = name + reference.AVERAGE
        assert not np.array_equal(after[name], before[name])
        assert np.abs(after[name] - before[name]).max() < 1
        expected = decay * before[average] + (1 - decay) * after[name]
        np.testing.assert_allclose(after[average], expected, rtol=1e-4, atol=1e-6)
    cluster = clusters.Cluster(start, data_dir, tmp_path)
    try:
        cluster.start(f'--max_steps={step + 3}').assert_finished(step + 3)
        assert f'{tmp_path}/model.ckpt-{step + 1}' in cluster[clusters.CHIEF].stdout
    finally:
        cluster.kill()
