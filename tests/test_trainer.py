"""Tests of the trainers as processes: what they say, how they go on, what they never lose."""

import collections
import os
import re
import resource
import shutil
import signal
import subprocess

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from tests import events
from tests import harness
from tests import reference

LOG_LINE = re.compile(
    r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: step (\d+), loss = (\d+\.\d\d) '
    r'\((\d+\.\d) examples/sec; (\d+\.\d{3}) sec/batch\)$'
)
DEVICE_LINE = re.compile(r'Running on the CPU \(.+\) with TensorFlow \d+\.\d+\.\S+ in float32\.$')
FILLING = (
    'Filling queue with 120 CIFAR images before starting to train. This will take a few seconds.'
)
# To be run before a script.
LEARNING_RATE = 'import cifar10; cifar10.INITIAL_LEARNING_RATE = float("%s")'
FILES = ['data-00000-of-00001', 'index', 'meta']


def write_checkpoint(folder, step, **changes):
    """Writes a checkpoint of random variables. Returns its path."""
    variables = dict(reference.random_variables(step), **changes)
    values = reference.checkpoint_values(step, variables, reference.random_variables(step))
    return reference.write_checkpoint(folder, step, values)


def damage(path):
    """Turns bytes in the middle of a checkpoint's data; its size stays."""
    with open(path + '.data-00000-of-00001', 'r+b') as file:
        file.seek(4000000)
        file.write(b'damage' * 100)


def logged(script):
    """[(step, loss)] of a trainer's log lines."""
    matches = [LOG_LINE.match(line) for line in script.lines]
    return [(int(match.group(1)), float(match.group(2))) for match in matches if match]


def contents(folder):
    """Dict of name -> time and bytes of each file in a folder."""
    files = {}
    for entry in os.scandir(str(folder)):
        with open(entry.path, 'rb') as file:
            files[entry.name] = (entry.stat().st_mtime_ns, file.read())
    return files


def read_and_check(folder, step):
    """The values of a checkpoint, which has to be good and complete."""
    values = reference.read_checkpoint(f'{folder}/model.ckpt-{step}')
    assert sorted(values) == reference.CHECKPOINT_NAMES
    assert [name for name in values if not np.isfinite(values[name]).all()] == []
    assert values['global_step'] == step
    return values


# --- One run from beginning to end --------------------------------------------

Story = collections.namedtuple('Story', 'train_dir flags stopped stopped_at resumed finished_at')


@pytest.fixture(scope='module')
def story(start, data_dir, tmp_path_factory):
    """A run that is stopped by Ctrl-C, resumed and finished."""
    train_dir = str(tmp_path_factory.mktemp('story') / 'made' / 'by the trainer')
    flags = [f'--data_dir={data_dir}', f'--train_dir={train_dir}', '--batch_size=8']
    stopped = start(harness.TRAIN, *flags, '--log_frequency=5', fresh=True)
    stopped.wait_for('step 10,')
    stopped.send(signal.SIGINT)
    stopped.wait()
    stopped_at = harness.saved_steps(train_dir)[-1]
    flags.append(f'--max_steps={stopped_at + 4}')
    resumed = start(harness.TRAIN, *flags, '--log_frequency=1')
    resumed.wait()
    return Story(train_dir, flags, stopped, stopped_at, resumed, stopped_at + 4)


def test_ctrl_c_ends_the_trainer_with_status_130_a_checkpoint_and_the_way_on(story):
    assert story.stopped.status() == 130
    assert story.stopped.lines[-1] == (
        f'Stopped by SIGINT at step {story.stopped_at}. Saved {story.train_dir}/model.ckpt-'
        f'{story.stopped_at}; the same command goes on from there.'
    )
    assert story.stopped_at > 10
    read_and_check(story.train_dir, story.stopped_at)


def test_the_trainer_prints_the_lines_of_the_tutorial_and_no_others(story):
    lines = story.stopped.lines
    assert DEVICE_LINE.match(lines[0])
    assert lines[1] == FILLING
    assert [line for line in lines[2:-1] if not LOG_LINE.match(line)] == []
    assert [step for step, _ in logged(story.stopped)] == list(range(0, story.stopped_at, 5))
    assert '\r' not in story.stopped.stdout


def test_the_first_loss_is_that_of_ten_equal_chances_and_the_weight_decay(story):
    assert 4.6 <= logged(story.stopped)[0][1] <= 4.8


def test_examples_per_second_and_seconds_per_batch_tell_the_same_speed(story):
    for line in story.stopped.lines[2:-1]:
        speed, seconds = (float(number) for number in LOG_LINE.match(line).groups()[2:])
        assert 8 / (seconds + 0.00051) - 0.06 <= speed <= 8 / (seconds - 0.00051) + 0.06


def test_the_resumed_run_says_so_and_goes_on_with_the_global_step_up_to_max_steps(story):
    lines, step = story.resumed.lines, story.stopped_at
    assert story.resumed.status() == 0
    assert DEVICE_LINE.match(lines[0])
    assert lines[1:3] == [f'Resuming from {story.train_dir}/model.ckpt-{step}.', FILLING]
    assert [number for number, _ in logged(story.resumed)] == list(range(step, step + 4))
    assert lines[7:] == [
        f'Finished at step {step + 4}. Saved {story.train_dir}/model.ckpt-{step + 4}.'
    ]


def test_stderr_holds_nothing_but_what_tensorflow_2_prints_at_import(story):
    for script in story.stopped, story.resumed:
        assert script.errors == []
        assert script.stderr == '' or tf.__version__.startswith('2.')


def test_checkpoints_hold_the_21_variables_and_have_a_meta_file_beside_them(story):
    steps = harness.saved_steps(story.train_dir)
    assert steps == [0, story.stopped_at, story.finished_at]
    expected = {name: (shape, np.float32) for name, (shape, _) in reference.MODEL.items()}
    expected.update({name + reference.AVERAGE: kind for name, kind in list(expected.items())})
    expected['global_step'] = ([], np.int64)
    for step in steps:
        values = read_and_check(story.train_dir, step)
        kinds = {name: (list(value.shape), value.dtype.type) for name, value in values.items()}
        assert kinds == expected
        graph = tf.train.import_meta_graph(f'{story.train_dir}/model.ckpt-{step}.meta')
        assert graph is not None


def test_the_state_file_names_the_checkpoints_relatively(story):
    names = re.findall('paths?: "(.*)"', harness.read(f'{story.train_dir}/checkpoint'))
    steps = [story.finished_at, 0, story.stopped_at, story.finished_at]
    assert names == [f'model.ckpt-{step}' for step in steps]


def test_a_finished_run_started_again_says_so_and_changes_nothing(start, story):
    before = contents(story.train_dir)
    for name in harness.TRAIN, harness.MULTI_GPU:
        script = start(name, *story.flags)
        assert script.wait() == 0
        assert script.lines == [
            f'Nothing to do: {story.train_dir}/model.ckpt-{story.finished_at} has reached '
            f'--max_steps={story.finished_at}.'
        ]
        assert script.errors == []
    assert contents(story.train_dir) == before


# --- Going on ----------------------------------------------------------------


def test_two_towers_go_on_with_what_one_began_and_one_with_what_they_did(train, tmp_path):
    write_checkpoint(tmp_path, 7)
    for name, begun in (harness.MULTI_GPU, 7), (harness.TRAIN, 9):
        flags = ['--num_gpus=2'] if name == harness.MULTI_GPU else []
        script = train(f'--max_steps={begun + 2}', *flags, name=name)
        assert script.wait() == 0, script.stderr
        assert script.lines[1] == f'Resuming from {tmp_path}/model.ckpt-{begun}.'
        assert [step for step, _ in logged(script)] == [begun, begun + 1]
        assert script.lines[-1].startswith(f'Finished at step {begun + 2}.')
        assert len(script.lines) == 6 and script.errors == []
        read_and_check(tmp_path, begun + 2)


def test_killed_it_goes_on_from_the_newest_checkpoint_and_0_keeps_all(train, tmp_path):
    killed = train('--save_checkpoint_secs=1', '--max_to_keep=0')
    assert harness.until(lambda: len(harness.saved_steps(tmp_path)) >= 2)
    killed.kill()
    assert killed.status() == -signal.SIGKILL
    steps = harness.saved_steps(tmp_path)
    resumed = train(f'--max_steps={steps[-1] + 1}', '--max_to_keep=0')
    assert resumed.wait() == 0, resumed.stderr
    assert resumed.lines[1] == f'Resuming from {tmp_path}/model.ckpt-{steps[-1]}.'
    assert logged(resumed)[0][0] == steps[-1]
    assert harness.saved_steps(tmp_path) == steps + [steps[-1] + 1]


def test_old_checkpoints_go_those_of_an_earlier_run_too_and_nothing_else(train, tmp_path):
    for step in 1, 2, 3:
        write_checkpoint(tmp_path, step)
        (tmp_path / f'model.ckpt-{step}.meta').write_text('')
    others = ['model.ckpt-notes', 'model.ckpt-1.index.bak', 'my-model.ckpt-1.index', 'model.ckpt-0']
    for name in others:
        (tmp_path / name).write_text('mine')
    script = train('--max_steps=4', '--max_to_keep=3')
    assert script.wait() == 0, script.stderr
    files = [f'model.ckpt-{step}.{suffix}' for step in (2, 3, 4) for suffix in FILES]
    names = [name for name in os.listdir(str(tmp_path)) if 'model' in name]
    assert sorted(names) == sorted(files + others)
    assert [(tmp_path / name).read_text() for name in others] == ['mine'] * 4


def test_in_a_copied_folder_it_goes_on_with_what_is_there(train, story, tmp_path):
    # The state file is as the classic code writes it: it names the old place.
    older = f'model.ckpt-{story.stopped_at}'
    for suffix in FILES:
        shutil.copy(f'{story.train_dir}/{older}.{suffix}', str(tmp_path))
    (tmp_path / 'checkpoint').write_text(
        f'model_checkpoint_path: "{story.train_dir}/model.ckpt-{story.finished_at}"\n'
    )
    before = contents(story.train_dir)
    script = train(f'--max_steps={story.stopped_at + 1}', '--max_to_keep=1')
    assert script.wait() == 0, script.stderr
    assert script.lines[1] == f'Resuming from {tmp_path}/{older}.'
    assert [step for step, _ in logged(script)] == [story.stopped_at]
    assert harness.saved_steps(tmp_path) == [story.stopped_at + 1]
    assert contents(story.train_dir) == before


def test_without_a_checkpoint_it_starts_anew_whatever_the_state_file_says(train, story, tmp_path):
    states = {'missing': 'model.ckpt-999', 'elsewhere': f'{story.train_dir}/model.ckpt-0'}
    scripts = []
    for folder, state in states.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'checkpoint').write_text(f'model_checkpoint_path: "{state}"\n')
        # Where no step changes anything, the last checkpoint shows what it began with.
        scripts.append(train('--max_steps=1', folder=folder, before=LEARNING_RATE % 0.0))
    assert [script.wait() for script in scripts] == [0, 0]
    other = read_and_check(story.train_dir, 0)
    for folder in states:
        values = read_and_check(tmp_path / folder, 1)
        assert not np.array_equal(values['conv1/weights'], other['conv1/weights'])


def test_a_checkpoint_of_the_classic_code_is_resumed(train, tmp_path):
    variables = reference.random_variables()
    values = reference.checkpoint_values(5, variables, variables)
    values.update({'conv1/weight_loss/avg': np.float32(1), 'total_loss/avg': np.float32(5)})
    path = reference.write_checkpoint(tmp_path, 5, values)
    script = train('--max_steps=6', before=LEARNING_RATE % 0.0)
    assert script.wait() == 0, script.stderr
    assert script.lines[1] == f'Resuming from {path}.'
    saved = read_and_check(tmp_path, 6)
    for name in reference.MODEL:
        np.testing.assert_array_equal(saved[name], variables[name])


# --- Checkpoints of no use -----------------------------------------------------


def test_what_is_damaged_or_not_finite_is_passed_over_by_name(train, tmp_path):
    good = write_checkpoint(tmp_path, 3)
    biases = np.full([64], 0.1, np.float32)
    biases[7] = np.nan
    nan = write_checkpoint(tmp_path, 5, **{'conv2/biases': biases})
    damaged = write_checkpoint(tmp_path, 8)
    damage(damaged)
    before = contents(tmp_path)
    script = train('--max_steps=4', '--max_to_keep=1')
    assert script.wait() == 0, script.stderr
    assert script.errors[0].startswith(f'Passing over {damaged}: ')
    assert script.errors[1:] == [f'Passing over {nan}: conv2/biases is not finite']
    assert script.lines[1] == f'Resuming from {good}.'
    assert [step for step, _ in logged(script)] == [3]
    assert harness.saved_steps(tmp_path) == [4, 5, 8]
    after = contents(tmp_path)
    assert [name for name in before if '-3.' not in name and after[name] != before[name]] == []


def test_where_no_checkpoint_is_usable_it_does_not_start_anew(train, tmp_path):
    damage(write_checkpoint(tmp_path, 3))
    before = contents(tmp_path)
    script = train()
    assert script.wait() == 1
    assert script.errors[0].startswith('Passing over ')
    assert len(script.errors) == 2 and f'no checkpoint in {tmp_path} is' in script.errors[1]
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert harness.saved_steps(tmp_path) == [3]


def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_its_variable(train, tmp_path):
    path = write_checkpoint(tmp_path, 5, **{'local3/biases': np.zeros(100, np.float32)})
    script = train('--max_steps=6')
    assert script.wait() == 1
    assert len(script.errors) == 1
    assert path in script.errors[0] and 'local3/biases' in script.errors[0]
    assert harness.saved_steps(tmp_path) == [5]


def test_a_finished_run_that_goes_on_is_no_longer_marked_as_finished(train, tmp_path):
    assert train('--max_steps=1').wait() == 0
    assert (tmp_path / 'finished').read_text() == '1\n'
    script = train()
    script.wait_for('step 2,')
    assert not (tmp_path / 'finished').exists()
    script.send(signal.SIGTERM)
    assert script.wait() == 143
    assert not (tmp_path / 'finished').exists()


# --- Divergence ----------------------------------------------------------------


def test_what_is_not_finite_ends_the_run_and_is_never_saved(train, tmp_path):
    # 1e30 shows in the loss of a later step, inf in the variables before the last save only.
    cases = {'1e30': (1000, 'the loss of step '), 'inf': (1, 'softmax_linear/biases')}
    scripts = {
        rate: train(f'--max_steps={max_steps}', folder=rate, before=LEARNING_RATE % rate)
        for rate, (max_steps, _) in cases.items()
    }
    for rate, script in scripts.items():
        assert script.wait() == 1
        assert len(script.errors) == 1
        assert re.search(f'training diverged: .*{cases[rate][1]}', script.errors[0])
        assert 'Finished' not in script.stdout
        assert harness.saved_steps(tmp_path / rate) == [0]
        read_and_check(tmp_path / rate, 0)


# --- Full disks and missing files ----------------------------------------------


def assert_told_of_full_disk(script, folder, reason):
    assert script.wait(60) == 1
    assert len(script.errors) == 1, script.stderr
    assert re.search(rf'cannot save: {folder}/model.ckpt-\d+.*; {reason}', script.errors[0])
    assert 'Finished' not in script.stdout
    assert harness.saved_steps(folder) == [0]
    read_and_check(folder, 0)


def test_a_disk_full_for_summaries_too_does_not_hang_the_trainer(train, tmp_path):
    script = train('--save_checkpoint_secs=1000', before=events.EVERY_STEP)
    script.wait_for('step 1,')
    resource.prlimit(script.pid, resource.RLIMIT_FSIZE, (10000, 10000))
    script.wait_for('step 20,')  # More summaries than fit into the queue of a writer.
    script.send(signal.SIGTERM)
    assert_told_of_full_disk(script, tmp_path, 'File too large')


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 14 MB: room for one checkpoint, not for two."""
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=14m', 'tmpfs', str(tmp_path)]
    if not shutil.which('mount') or subprocess.call(mount, stderr=subprocess.DEVNULL):
        pytest.skip('only root may mount a small disk')
    yield tmp_path
    subprocess.check_call(['umount', '-l', str(tmp_path)])


def test_a_disk_full_when_saving_ends_the_trainer_and_with_room_it_goes_on(train, small_disk):
    script = train('--save_checkpoint_secs=1')
    assert_told_of_full_disk(script, small_disk, 'No space left on device')
    subprocess.check_call(['mount', '-o', 'remount,size=40m', str(small_disk)])
    again = train('--max_steps=1')
    assert again.wait() == 0 and again.errors == []
    assert again.lines[1] == f'Resuming from {small_disk}/model.ckpt-0.'
    read_and_check(small_disk, 1)


def test_data_that_go_away_meanwhile_do_not_pass_for_a_finished_run(start, data_dir, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(data_dir, str(data))
    scripts = {
        name: start(name, f'--data_dir={data}', f'--train_dir={tmp_path}/{name}', '--batch_size=64')
        for name in (harness.TRAIN, harness.MULTI_GPU)
    }
    for script in scripts.values():
        script.wait_for('step 0,')
    shutil.rmtree(str(data))
    for name, script in scripts.items():
        assert script.wait() not in (0, 130, 143)
        assert re.search(rf'{data}/.*/data_batch_\d\.bin; No such file', script.stderr)
        assert 'Finished' not in script.stdout
        assert not (tmp_path / name / 'finished').exists()
        read_and_check(tmp_path / name, harness.saved_steps(tmp_path / name)[-1])
