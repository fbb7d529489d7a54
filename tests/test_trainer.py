"""Tests of the trainers: what they print, how they stop and resume, and what they never save.

Most of them train a TinyModel in this process.
"""

import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

import cifar10
import cifar10_multi_gpu_train
import cifar10_train
from support import dataset, script
from support.compat import tf
from tests import harness, reference
from tests.tiny_model import TinyModel

FLAGS = cifar10.FLAGS
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
        capsys.readouterr()
        with tf.Graph().as_default():
            status = trainer.train(model or TinyModel(each_step))
        return (status, *capsys.readouterr())

    return run


def logged_steps(stdout):
    return [int(step) for step in re.findall(r': step (\d+), loss', stdout)]


def write_checkpoint(folder, step, **changes):
    """Writes a checkpoint of a TinyModel without training. Returns its path."""
    values = {
        'softmax_linear/weights': np.full([3, 10], 0.1, np.float32),
        'softmax_linear/biases': np.zeros(10, np.float32),
    }
    values = reference.checkpoint_values(step, dict(values, **changes), values)
    return reference.write_checkpoint(folder, step, values)


def send(number):
    os.kill(os.getpid(), number)


def test_console_shows_target_and_tutorial_lines_only(interrupted_run):
    run = interrupted_run
    lines = run.stopped.lines
    assert re.match(r'Running on the CPU \(.+\) with TensorFlow \d\S+ in float32\.$', lines[0])
    assert run.train_dir in lines[1] and '1000000' in lines[1]
    assert lines[2] == (
        'Filling queue with 120 CIFAR images before starting to train. This will take a few '
        'seconds.'
    )
    assert [line for line in lines[3:-1] if not LOG_LINE.match(line)] == []
    assert 4.6 <= float(LOG_LINE.match(lines[3]).group(2)) <= 4.8
    assert logged_steps(run.stopped.stdout) == list(range(0, run.stopped_at, 2))
    assert [trainer.stderr for trainer in (run.stopped, run.killed, run.finished)] == [''] * 3


def test_log_frequency_is_the_steps_between_lines(train):
    _, stdout, _ = train(max_steps=7, log_frequency=3)
    assert logged_steps(stdout) == [0, 3, 6]


def test_ctrl_c_saves_and_returns_130(interrupted_run):
    step = interrupted_run.stopped_at
    assert interrupted_run.stopped.status() == 128 + signal.SIGINT
    last = interrupted_run.stopped.lines[-1]
    assert 'SIGINT' in last and f'{interrupted_run.train_dir}/model.ckpt-{step}' in last
    assert step > 4 and step in harness.saved_steps(interrupted_run.train_dir)


def test_resume_after_kill_continues_from_newest_checkpoint(interrupted_run):
    run = interrupted_run
    assert run.killed.status() == -signal.SIGKILL
    assert run.killed_at > run.finished_at
    for trainer in run.killed, run.finished:
        assert f'{run.train_dir}/model.ckpt-{run.stopped_at}' in trainer.lines[1]
        assert logged_steps(trainer.stdout)[0] == run.stopped_at + run.stopped_at % 2
    assert f'{run.train_dir}/model.ckpt-{run.finished_at}' in run.finished.lines[-1]
    assert harness.saved_steps(run.train_dir) == [0, run.stopped_at, run.finished_at]


def test_checkpoint_has_21_variables_and_a_meta_graph(interrupted_run):
    run = interrupted_run
    expected = {name: (shape, np.float32) for name, (shape, _) in reference.MODEL.items()}
    expected.update({name + reference.AVERAGE: kind for name, kind in list(expected.items())})
    expected['global_step'] = ([], np.int64)
    for step in 0, run.stopped_at, run.finished_at:
        path = f'{run.train_dir}/model.ckpt-{step}'
        values = reference.read_checkpoint(path)
        assert values['global_step'] == step
        assert all(np.isfinite(value).all() for value in values.values())
        kinds = {name: (list(value.shape), value.dtype.type) for name, value in values.items()}
        assert kinds == expected
        assert tf.train.import_meta_graph(path + '.meta') is not None
    named = re.findall('paths?: "(.*)"', harness.read(f'{run.train_dir}/checkpoint'))
    steps = run.finished_at, 0, run.stopped_at, run.finished_at
    assert named == [f'model.ckpt-{step}' for step in steps]  # Relative paths.


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1], ids=['SIGTERM', 'SIGUSR1'])
def test_signal_stops_after_the_step(train, tmp_path, number):
    handlers = [signal.getsignal(each) for each in script.STOP_SIGNALS]
    status, stdout, _ = train(lambda step: send(number) if step == 3 else None)
    assert status == 128 + number
    last = len(logged_steps(stdout))
    assert 4 <= last and logged_steps(stdout) == list(range(last))
    assert f'{tmp_path}/model.ckpt-{last}' in stdout and f'at step {last}' in stdout
    assert harness.saved_steps(tmp_path) == [0, last]
    assert handlers == [signal.getsignal(each) for each in script.STOP_SIGNALS]


def test_one_and_two_towers_resume_each_others_runs(train, tmp_path):
    write_checkpoint(tmp_path, 2)
    for trainer, first, last in (cifar10_multi_gpu_train, 2, 4), (cifar10_train, 4, 6):
        status, stdout, stderr = train(trainer=trainer, num_gpus=2, max_steps=last)
        assert status == 0 and stderr == ''
        assert f'{tmp_path}/model.ckpt-{first},' in stdout.splitlines()[0]
        assert logged_steps(stdout) == [first, first + 1]
    assert harness.saved_steps(tmp_path) == [2, 4, 6]


def test_finished_run_is_left_alone_until_it_continues(train, tmp_path):
    write_checkpoint(tmp_path, 1)
    train(max_steps=2)
    before = harness.contents(tmp_path)
    assert before[f'{tmp_path}/finished'] == b'2\n'
    for trainer in cifar10_train, cifar10_multi_gpu_train:
        status, stdout, _ = train(trainer=trainer, max_steps=2)
        assert status == 0
        assert stdout.count('\n') == 1 and f'{tmp_path}/model.ckpt-2 ' in stdout
        assert '--max_steps' in stdout
    assert harness.contents(tmp_path) == before
    train(lambda step: send(signal.SIGTERM) if step == 1 else None, max_steps=1000)
    assert not (tmp_path / 'finished').exists()


def test_checkpoints_are_saved_and_removed_while_training(train, tmp_path):
    seen = set()

    def stop_after_three_saves(step):
        new = set(harness.saved_steps(tmp_path)) - seen
        seen.update(new)
        if new and len(seen) == 3:
            send(signal.SIGTERM)
        time.sleep(0.02)

    train(stop_after_three_saves, save_checkpoint_secs=1, max_to_keep=2)
    assert harness.saved_steps(tmp_path)[0] >= sorted(seen)[-2]
    assert len(harness.saved_steps(tmp_path)) == 2


@pytest.mark.parametrize('max_to_keep, kept', [(0, [1, 2, 3, 4]), (2, [1, 3, 4])])
def test_max_to_keep_counts_checkpoints_of_earlier_runs(train, tmp_path, max_to_keep, kept):
    for step in 1, 2, 3:
        write_checkpoint(tmp_path, step)
        (tmp_path / f'model.ckpt-{step}.meta').write_text('')
    others = ['model.ckpt-notes', 'model.ckpt-1.index.bak', 'my-model.ckpt-1.index']
    for name in others:
        (tmp_path / name).write_text('mine')
    train(max_steps=4, max_to_keep=max_to_keep)
    names = [name for name in os.listdir(str(tmp_path)) if 'model' in name]
    suffixes = 'data-00000-of-00001', 'index', 'meta'
    files = [f'model.ckpt-{step}.{suffix}' for step in kept for suffix in suffixes]
    assert sorted(names) == sorted(files + others)


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


def test_classic_multi_gpu_checkpoint_is_resumed(train, tmp_path):
    """Its global_step is float32, and it holds averages of the losses."""
    values = reference.read_checkpoint(write_checkpoint(tmp_path, 5))
    values.update({'global_step': np.float32(5), 'tower_0/total_loss/avg': np.float32(5)})
    reference.write_checkpoint(tmp_path, 5, values)
    train(max_steps=6, model=TinyModel(lambda step: 0))
    after = reference.read_checkpoint(tmp_path / 'model.ckpt-6')
    assert after['global_step'] == 6 and after['global_step'].dtype == np.int64
    for name in 'softmax_linear/weights', 'softmax_linear/biases':
        np.testing.assert_array_equal(after[name], values[name])
    assert 'tower_0/total_loss/avg' not in after


def test_damaged_and_infinite_checkpoints_are_skipped_by_name(train, tmp_path):
    good = write_checkpoint(tmp_path, 3)
    infinite = {'softmax_linear/biases': np.full(10, np.inf, np.float32)}
    infinite = write_checkpoint(tmp_path, 5, **infinite)
    damaged = write_checkpoint(tmp_path, 8)
    harness.change_bytes(damaged + '.data-00000-of-00001')
    before = harness.contents(tmp_path)
    _, stdout, stderr = train(max_steps=4, max_to_keep=1)
    skipped = re.findall(r'^Skipping (\S+): .*', stderr, re.MULTILINE)
    assert skipped == [damaged, infinite] and 'softmax_linear/biases' in stderr
    assert f'{good},' in stdout and logged_steps(stdout) == [3]
    assert harness.saved_steps(tmp_path) == [4, 5, 8]
    after = harness.contents(tmp_path)
    assert all(after[name] == before[name] for name in before if re.search(r'ckpt-[58]', name))


@pytest.mark.parametrize(
    'fault, named',
    [
        ('damaged', ['/model.ckpt-7']),
        ('other shape', ['/model.ckpt-7', 'softmax_linear/biases', '[9]', '[10]']),
        ('other classes', ['mug', 'airplane']),
    ],
)
def test_unusable_checkpoint_is_an_error_that_names_it(train, tmp_path, capsys, fault, named):
    biases = np.zeros(9 if fault == 'other shape' else 10, np.float32)
    path = write_checkpoint(tmp_path, 7, **{'softmax_linear/biases': biases})
    if fault == 'damaged':
        harness.change_bytes(path + '.data-00000-of-00001')
    elif fault == 'other classes':
        dataset.write_class_names(str(tmp_path), ['mug'] + dataset.CLASS_NAMES[1:])
    before = harness.contents(tmp_path)
    with pytest.raises(script.UserError, match=str(tmp_path)) as error:
        train(max_steps=9)
    text = str(error.value) + capsys.readouterr().err
    assert [word for word in named if word not in text] == []
    assert harness.contents(tmp_path) == before


@pytest.mark.parametrize('loss', [np.nan, np.inf, -np.inf])
def test_infinite_loss_is_not_saved(train, tmp_path, loss):
    with pytest.raises(script.UserError, match=f'loss is {loss}'):
        train(lambda step: loss if step == 2 else None)
    assert harness.saved_steps(tmp_path) == [0]
    assert not (tmp_path / 'finished').exists()


def test_infinite_variable_is_not_saved(train, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, 'INITIAL_LEARNING_RATE', float('inf'))
    with pytest.raises(script.UserError, match='softmax_linear/biases'):
        train(max_steps=1)  # Its loss was finite.
    assert harness.saved_steps(tmp_path) == [0]
    saved = reference.read_checkpoint(tmp_path / 'model.ckpt-0')
    assert np.isfinite(saved['softmax_linear/weights']).all()


@pytest.mark.parametrize('summary_steps, named', [(1000, 'model.ckpt-'), (1, 'events.out.')])
def test_full_disk_ends_training_with_a_reason(
    train, tmp_path, file_size_limit, monkeypatch, summary_steps, named
):
    monkeypatch.setattr('support.training.SUMMARY_STEPS', summary_steps)
    with pytest.raises(script.UserError, match=f'{tmp_path}/{named}.*; File too large'):
        train(lambda step: file_size_limit(200) if step == 2 else None, max_steps=20)
    assert harness.saved_steps(tmp_path) == [0]
    file_size_limit(10**9)
    assert train(max_steps=3)[0] == 0


def test_small_disk_ends_training_and_with_space_it_continues(train, tmp_path):
    with harness.mounted(tmp_path, '-t', 'tmpfs', '-o', 'size=32k', 'tmpfs'):
        with pytest.raises(script.UserError, match='No space left on device'):
            train(max_steps=3)
        subprocess.check_call(['mount', '-o', 'remount,size=40m', str(tmp_path)])
        assert train(max_steps=3)[0] == 0


@pytest.mark.parametrize('replace', [False, True], ids=['deleted', 'replaced'])
def test_deleted_train_dir_ends_training(train, tmp_path, replace):
    folder = tmp_path / 'train'

    def delete(step):
        if step == 2:
            shutil.rmtree(str(folder))
            if replace:
                folder.mkdir()
                (folder / '.lock').write_text('')

    with pytest.raises(script.UserError, match=str(folder)):
        train(delete, train_dir=str(folder), max_steps=9)
    assert not folder.exists() or os.listdir(str(folder)) == ['.lock']


class ModelWithFiles(TinyModel):
    """A TinyModel that reads the data set."""

    def distorted_inputs(self):
        images, labels = cifar10.distorted_inputs()
        return tf.reshape(images, [FLAGS.batch_size, -1])[:, :3], labels


@pytest.mark.parametrize('trainer', [cifar10_train, cifar10_multi_gpu_train])
def test_deleted_data_is_not_the_end_of_training(train, data_dir, tmp_path, trainer):
    data = tmp_path / 'data'
    shutil.copytree(data_dir, str(data))
    model = ModelWithFiles(lambda step: shutil.rmtree(str(data)) if step == 0 else None)
    with pytest.raises(tf.errors.NotFoundError, match=r'data_batch_\d\.bin; No such file'):
        train(model=model, trainer=trainer, data_dir=str(data), batch_size=64)
    assert not (tmp_path / 'finished').exists()


def test_second_trainer_is_rejected(train, tmp_path):
    def train_too(step):
        with pytest.raises(script.UserError, match=str(tmp_path)):
            cifar10_multi_gpu_train.train(TinyModel())

    assert train(train_too, max_steps=2)[0] == 0
