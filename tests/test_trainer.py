"""Tests of the trainers: what they print, how they stop and resume, and what they never save."""

import os
import re
import shutil
import signal
from unittest import mock

import numpy as np
import pytest

import cifar10
import cifar10_multi_gpu_train
import cifar10_train
from support import dataset, script
from support.compat import tf
from tests import harness, reference
from tests.tiny_model import TinyModel

LOG_LINE = re.compile(
    r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: step (\d+), loss = (\d+\.\d\d) '
    r'\((\d+\.\d) examples/sec; (\d+\.\d{3}) sec/batch\)$'
)


@pytest.fixture
def train(tmp_path, capsys):
    """Function that trains a TinyModel in tmp_path. Returns the status, stdout and stderr."""

    def run(each_step=lambda step: None, trainer=cifar10_train, model=None, **flags):
        defaults = dict(train_dir=str(tmp_path), data_dir=str(tmp_path), log_frequency=1)
        harness.set_flags(**dict(defaults, **flags))
        with tf.Graph().as_default():
            status = trainer.train(model or TinyModel(each_step))
        return (status, *capsys.readouterr())

    return run


def logged_steps(stdout):
    return [int(step) for step in re.findall(r': step (\d+), loss', stdout)]


def write_checkpoint(folder, step, biases=(0,) * 10):
    """Writes a checkpoint of a TinyModel without training. Returns its path."""
    weights = np.full([3, 10], 0.1, np.float32)
    values = {'softmax_linear/weights': weights, 'softmax_linear/biases': np.float32(biases)}
    values = reference.checkpoint_values(step, values, values)
    return reference.write_checkpoint(folder, step, values)


def test_console_shows_target_and_tutorial_lines_only(interrupted_run):
    run, lines = interrupted_run, interrupted_run.stopped.lines
    assert re.match(r'Running on the CPU \(.+\) with TensorFlow \d\S+ in float32\.$', lines[0])
    assert run.train_dir in lines[1] and '1000000' in lines[1]
    assert re.match('Filling queue with 120 CIFAR images before starting to train', lines[2])
    assert [line for line in lines[3:-1] if not LOG_LINE.match(line)] == []
    assert logged_steps(run.stopped.stdout) == list(range(0, run.stopped_at, 2))
    assert [trainer.stderr for trainer in (run.stopped, run.killed, run.finished)] == [''] * 3


def test_run_resumes_after_ctrl_c_and_after_kill(interrupted_run):
    """The last trainer, with two towers, resumes the run of a trainer for one device."""
    run = interrupted_run
    assert run.stopped.status() == 128 + signal.SIGINT and run.killed.status() == -signal.SIGKILL
    last_line = run.stopped.lines[-1]
    assert 'SIGINT' in last_line and f'{run.train_dir}/model.ckpt-{run.stopped_at};' in last_line
    for trainer in run.killed, run.finished:
        assert f'{run.train_dir}/model.ckpt-{run.stopped_at}' in trainer.lines[1]
        assert logged_steps(trainer.stdout)[0] == run.stopped_at + run.stopped_at % 2
    assert f'{run.train_dir}/model.ckpt-{run.finished_at}' in run.finished.lines[-1]
    steps = [0, run.stopped_at, run.finished_at]
    assert harness.saved_steps(run.train_dir) == steps
    for path in [f'{run.train_dir}/model.ckpt-{step}' for step in steps]:
        values = reference.read_checkpoint(path)
        assert sorted(values) == reference.CHECKPOINT_NAMES
        assert path.endswith(f'-{values["global_step"]}')
        assert all(np.isfinite(value).all() for value in values.values())
        assert tf.train.import_meta_graph(path + '.meta') is not None
    named = re.findall('paths?: "(.*)"', harness.read(f'{run.train_dir}/checkpoint'))
    assert named == [f'model.ckpt-{step}' for step in steps[-1:] + steps]  # Relative paths.


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1], ids=['SIGTERM', 'SIGUSR1'])
def test_signal_stops_after_the_step(train, tmp_path, number):
    handlers = [signal.getsignal(each) for each in script.STOP_SIGNALS]
    status, stdout, _ = train(lambda step: os.kill(os.getpid(), number) if step == 3 else None)
    assert status == 128 + number
    last = len(logged_steps(stdout))
    assert 4 <= last and logged_steps(stdout) == list(range(last))
    assert f'{tmp_path}/model.ckpt-{last}' in stdout.splitlines()[-1]
    assert harness.saved_steps(tmp_path) == [0, last]
    assert handlers == [signal.getsignal(each) for each in script.STOP_SIGNALS]


def test_finished_run_is_left_alone_until_it_continues(train, tmp_path):
    write_checkpoint(tmp_path, 1)
    train(max_steps=2)
    before = harness.contents(tmp_path)
    assert before[f'{tmp_path}/finished'] == b'2\n'
    status, stdout, _ = train(max_steps=2)
    assert status == 0 and harness.contents(tmp_path) == before
    assert stdout.count('\n') == 1 and f'{tmp_path}/model.ckpt-2 ' in stdout
    train(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None, max_steps=99)
    assert not (tmp_path / 'finished').exists()


@pytest.mark.parametrize('max_to_keep, kept', [(0, [1, 2, 3, 6, 8]), (2, [1, 6, 8])])
def test_old_checkpoints_are_removed_also_those_of_earlier_runs(
    train, tmp_path, monkeypatch, max_to_keep, kept
):
    for step in 1, 2, 3:
        write_checkpoint(tmp_path, step)
        (tmp_path / f'model.ckpt-{step}.meta').touch()
    clock = mock.Mock(return_value=0)  # A step takes a second, so step 6 is saved on the way.
    monkeypatch.setattr('support.training.time', mock.Mock(monotonic=clock))

    def tick(step):
        clock.return_value = step + 1

    train(tick, max_steps=8, max_to_keep=max_to_keep, save_checkpoint_secs=2)
    names = [name for name in os.listdir(str(tmp_path)) if 'model' in name]
    suffixes = 'data-00000-of-00001', 'index', 'meta'
    files = [f'model.ckpt-{step}.{suffix}' for step in kept for suffix in suffixes]
    assert sorted(names) == files


def test_copied_folder_continues_with_its_own_checkpoint(train, tmp_path):
    original, copy = tmp_path / 'original', tmp_path / 'copy'
    write_checkpoint(original, 2)
    shutil.copytree(str(original), str(copy))
    # As the classic code writes it.
    (copy / 'checkpoint').write_text(f'model_checkpoint_path: "{original}/model.ckpt-2"\n')
    before = harness.contents(original)
    _, stdout, _ = train(train_dir=str(copy), max_steps=3, max_to_keep=1)
    assert f'{copy}/model.ckpt-2,' in stdout and logged_steps(stdout) == [2]
    assert harness.saved_steps(copy) == [3]
    assert harness.contents(original) == before


def test_damaged_and_infinite_checkpoints_are_skipped_by_name(train, tmp_path):
    good, infinite = write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path, 5, [np.inf] * 10)
    damaged = write_checkpoint(tmp_path, 8)
    harness.change_bytes(damaged + '.data-00000-of-00001')
    before = harness.contents(tmp_path)
    _, stdout, stderr = train(max_steps=4, max_to_keep=1)
    assert re.findall(r'^Skipping (\S+): ', stderr, re.MULTILINE) == [damaged, infinite]
    assert f'{good},' in stdout and logged_steps(stdout) == [3]
    assert harness.saved_steps(tmp_path) == [4, 5, 8]
    after = harness.contents(tmp_path)
    assert all(after[name] == before[name] for name in before if re.search(r'ckpt-[58]', name))


@pytest.mark.parametrize('pattern', ['ckpt-7: ', r'biases.*\[9\].*\[10\]', 'mug.*airplane'])
def test_unusable_checkpoint_is_an_error_that_names_it(train, tmp_path, capsys, pattern):
    path = write_checkpoint(tmp_path, 7, np.zeros(9 if 'biases' in pattern else 10))
    if 'mug' in pattern:
        dataset.write_class_names(str(tmp_path), ['mug'] + dataset.CLASS_NAMES[1:])
    elif 'ckpt' in pattern:
        harness.change_bytes(path + '.data-00000-of-00001')
    before = harness.contents(tmp_path)
    with pytest.raises(script.UserError, match=str(tmp_path)) as error:
        train(max_steps=9)
    assert re.search(pattern, capsys.readouterr().err + str(error.value))
    assert harness.contents(tmp_path) == before


@pytest.mark.parametrize(
    'loss, rate, named',
    [(np.nan, 0.1, 'is nan'), (-np.inf, 0.1, 'is -inf'), (1, np.inf, 'softmax_linear/biases')],
)
def test_diverged_run_is_not_saved(train, tmp_path, monkeypatch, loss, rate, named):
    monkeypatch.setattr(cifar10, 'INITIAL_LEARNING_RATE', rate)
    with pytest.raises(script.UserError, match=named):
        train(lambda step: loss, max_steps=1)
    assert harness.saved_steps(tmp_path) == [0] and not (tmp_path / 'finished').exists()
    saved = reference.read_checkpoint(tmp_path / 'model.ckpt-0')
    assert np.isfinite(saved['softmax_linear/weights']).all()


@pytest.mark.parametrize('summary_steps, named', [(1000, 'model.ckpt-'), (1, 'events.out.')])
def test_full_disk_ends_training_and_with_space_it_continues(
    train, tmp_path, file_size_limit, monkeypatch, summary_steps, named
):
    monkeypatch.setattr('support.training.SUMMARY_STEPS', summary_steps)
    with pytest.raises(script.UserError, match=f'{tmp_path}/{named}.*; File too large'):
        train(lambda step: file_size_limit(200) if step == 2 else None, max_steps=20)
    assert harness.saved_steps(tmp_path) == [0]
    file_size_limit(10**9)
    assert train(max_steps=3)[0] == 0


@pytest.mark.parametrize('left', [[], ['.lock']], ids=['deleted', 'replaced'])
def test_deleted_train_dir_ends_training(train, tmp_path, left):
    folder = tmp_path / 'train'

    def delete(step):
        if step == 2:
            shutil.rmtree(str(folder))
            folder.mkdir()
            for name in left:
                (folder / name).touch()

    with pytest.raises(script.UserError, match=str(folder)):
        train(delete, train_dir=str(folder), max_steps=9)
    assert os.listdir(str(folder)) == left


@pytest.mark.parametrize('trainer', [cifar10_train, cifar10_multi_gpu_train])
def test_deleted_data_is_not_the_end_of_training(train, data_dir, tmp_path, trainer):
    data = tmp_path / 'data[1]'  # Data files may have a bracket in their path.
    shutil.copytree(data_dir, str(data))

    def distorted_inputs():
        images, labels = cifar10.distorted_inputs()
        return tf.reshape(images, [64, -1])[:, :3], labels

    model = TinyModel(lambda step: shutil.rmtree(str(data)) if step == 0 else None)
    model.distorted_inputs = distorted_inputs
    with pytest.raises(tf.errors.NotFoundError, match=r'data\[1\]/.*_\d\.bin; No such file'):
        train(model=model, trainer=trainer, data_dir=str(data), batch_size=64)
    assert not (tmp_path / 'finished').exists()


def test_second_trainer_is_rejected(train, tmp_path):
    def train_too(step):
        with pytest.raises(script.UserError, match=str(tmp_path)):
            cifar10_multi_gpu_train.train(TinyModel())

    assert train(train_too, max_steps=2)[0] == 0
