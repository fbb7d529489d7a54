"""Tests of support/checkpoints.py: which checkpoint is good, and that only good ones are saved."""

import os
import re
import resource
import shutil

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from support import checkpoints
from support import script
from tests import reference

DATA = '.data-00000-of-00001'
VALUES = {
    'weights': np.linspace(-3e38, 3e38, 10).astype(np.float32),
    'biases': np.float32([1, -2]),
    'global_step': np.int64(7),
}


@pytest.fixture
def write(tmp_path):
    """Function that writes a checkpoint of VALUES, or of changed ones, and returns its path."""

    def write_to_folder(step, **changes):
        return reference.write_checkpoint(tmp_path, step, dict(VALUES, **changes))

    return write_to_folder


@pytest.fixture
def model(fresh_graph_and_flags):
    """Variables that a checkpoint of VALUES fits, by name."""
    for name, value in sorted(VALUES.items()):
        tf.get_variable(name, initializer=np.zeros_like(value))
    return {variable.op.name: variable for variable in tf.global_variables()}


@pytest.fixture
def session(model):
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        yield session


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Finding -----------------------------------------------------------------


def test_checkpoints_are_listed_newest_first_and_nothing_else(write, tmp_path):
    paths = [write(step) for step in (9, 1000, 0, 10)]
    for name in [
        'other.ckpt-11.index',
        'model.ckpt-12.meta',
        'model.ckpt-.index',
        'model.ckpt-13.index.tempstate1',
        'model.ckpt-14.data-00000-of-00001',
        'old-model.ckpt-15.index',
        'model.ckpt-1e3.index',
        'model.ckpt.index',
        'checkpoint',
    ]:
        (tmp_path / name).write_bytes(b'')
    found = checkpoints.paths(str(tmp_path))
    assert found == [paths[i] for i in (1, 3, 0, 2)]
    assert [checkpoints.step_of(path) for path in found] == [1000, 10, 9, 0]


@pytest.mark.parametrize('name', ['', 'missing'], ids=['empty', 'missing'])
def test_a_folder_that_is_empty_or_missing_has_no_checkpoint(tmp_path, capsys, name):
    folder = str(tmp_path / name)
    assert checkpoints.paths(folder) == []
    assert checkpoints.newest(folder) is None
    assert capsys.readouterr().out == ''


# --- Damage ------------------------------------------------------------------


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF  # Not in the middle: an index has unused bytes there.
    path.write_bytes(bytes(content))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b'')


def remove(path):
    path.unlink()


@pytest.mark.parametrize('suffix', [DATA, '.index'])
@pytest.mark.parametrize('spoil', [flip_a_byte, cut_short, empty, remove])
def test_a_damaged_checkpoint_is_found_out_and_passed_over_by_name(
    write, tmp_path, capsys, suffix, spoil
):
    good, bad = write(3), write(4)
    assert checkpoints.damage(bad) is None
    assert checkpoints.newest(str(tmp_path)) == bad
    assert capsys.readouterr().out == ''

    spoil(tmp_path / ('model.ckpt-4' + suffix))
    reason = checkpoints.damage(bad)
    assert reason and '\n' not in reason
    assert checkpoints.newest(str(tmp_path)) == good
    # Without its index it is no checkpoint any more.
    passed_over = '' if (suffix, spoil) == ('.index', remove) else f'Passing over {bad}: {reason}\n'
    assert capsys.readouterr().err == passed_over


@pytest.mark.parametrize('suffix', [DATA, '.index'])
def test_no_damage_anywhere_in_a_file_changes_a_value_unnoticed(write, tmp_path, suffix):
    path, file = write(7), tmp_path / ('model.ckpt-7' + suffix)
    content = file.read_bytes()
    harmless = 0
    for i in range(len(content)):
        file.write_bytes(content[:i])
        assert checkpoints.damage(path), f'cut at {i}'
        file.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        if checkpoints.damage(path) is None:
            harmless += 1
            values = reference.read_checkpoint(path)
            assert set(values) == set(VALUES), f'flipped at {i}'
            assert all((values[name] == VALUES[name]).all() for name in VALUES), f'flipped at {i}'
    assert harmless < len(content) / 3


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_checkpoint_with_a_number_that_is_not_finite_is_passed_over(
    write, tmp_path, capsys, value
):
    good, bad = write(3), write(4, biases=np.float32([0, value]))
    assert checkpoints.damage(bad) == 'biases is not finite'
    assert checkpoints.newest(str(tmp_path)) == good
    assert capsys.readouterr().err == f'Passing over {bad}: biases is not finite\n'


def test_where_none_is_usable_that_is_an_error_and_not_a_fresh_start(write, tmp_path, capsys):
    paths = [write(4), write(3, weights=np.float32([np.nan]))]
    empty(tmp_path / ('model.ckpt-4' + DATA))
    with pytest.raises(script.UserError, match=re.escape(str(tmp_path))):
        checkpoints.newest(str(tmp_path))
    named = re.findall(r'^Passing over (.*?): .', capsys.readouterr().err, re.MULTILINE)
    assert named == paths


# --- Another model -----------------------------------------------------------


@pytest.mark.parametrize(
    'name, initial, words',
    [
        ('missing', np.float32([0, 0]), ['missing']),
        ('biases', np.float32([0, 0, 0]), ['biases', '[2]', '[3]']),
        ('biases', np.float64([0, 0]), ['biases', 'float32', 'float64']),
        ('global_step', np.int32(0), ['global_step', 'int64', 'int32']),
    ],
    ids=['name', 'shape', 'type', 'type of integer'],
)
def test_what_does_not_fit_is_told_by_its_variable(write, name, initial, words):
    misfit = checkpoints.misfit(write(5), {name: tf.get_variable('here', initializer=initial)})
    assert [word for word in words if word not in misfit] == []


def test_a_checkpoint_fits_under_the_names_that_are_asked_for(write, model):
    path = write(5, more=np.float32(1))
    assert checkpoints.misfit(path, model) is None
    assert checkpoints.misfit(path, {'biases': model['biases']}) is None
    assert checkpoints.misfit(path, {'biases': model['weights']}) is not None


def test_a_checkpoint_of_another_model_is_not_chosen(write, model, tmp_path):
    path = write(5, weights=np.zeros([11], np.float32))
    before = contents(tmp_path)
    with pytest.raises(script.UserError, match=rf'{re.escape(path)}.*\bweights\b'):
        checkpoints.choose(path, 5)
    assert contents(tmp_path) == before


# --- Choosing ----------------------------------------------------------------


def state_of(folder):
    """The checkpoint that a state file names, and all of them, as they are spelled there."""
    text = (folder / 'checkpoint').read_text()
    newest = re.findall('^model_checkpoint_path: "(.*)"$', text, re.MULTILINE)
    return newest + re.findall('^all_model_checkpoint_paths: "(.*)"$', text, re.MULTILINE)


@pytest.mark.parametrize(
    'keep, listed', [(0, [1, 3, 5]), (1, [5]), (2, [3, 5]), (3, [1, 3, 5]), (9, [1, 3, 5])]
)
def test_the_chosen_one_and_some_before_it_are_listed_relatively(
    write, model, tmp_path, keep, listed
):
    for step in (1, 3, 5, 7):
        write(step)
    checkpoints.choose(str(tmp_path / 'model.ckpt-5'), keep)
    assert state_of(tmp_path) == [f'model.ckpt-{step}' for step in [5] + listed]


@pytest.mark.parametrize(
    'state',
    [
        b'',
        b'\x00\xff garbage {',
        b'model_checkpoint_path: "model.ckpt-999"\n',
        b'model_checkpoint_path: "/elsewhere/model.ckpt-3"\n',
    ],
    ids=['empty', 'garbage', 'names what is not there', 'names another folder'],
)
def test_what_the_state_file_said_before_does_not_matter(write, model, tmp_path, state):
    path = write(3)
    (tmp_path / 'checkpoint').write_bytes(state)
    assert checkpoints.newest(str(tmp_path)) == path
    checkpoints.choose(path, 5)
    assert state_of(tmp_path) == ['model.ckpt-3', 'model.ckpt-3']


def test_a_copied_and_a_moved_folder_stand_for_themselves(session, model, tmp_path):
    first, copied, moved = (tmp_path / name for name in ('first', 'copied', 'moved'))
    first.mkdir()

    def save(folder, step):
        session.run(model['global_step'].assign(step))
        return checkpoints.Saver(5).save(session, str(folder / 'model.ckpt'), step)

    save(first, 1)
    shutil.copytree(str(first), str(copied))
    save(first, 2)
    first.rename(moved)
    save(tmp_path / 'copied', 3)
    for folder, step in (copied, 3), (moved, 2):
        path = str(folder / f'model.ckpt-{step}')
        assert checkpoints.newest(str(folder)) == path
        checkpoints.choose(path, 5)
        with tf.train.SingularMonitoredSession(checkpoint_dir=str(folder)) as restored:
            assert restored.run(model['global_step']) == step


# --- Saving ------------------------------------------------------------------


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_and_nothing_is_written(session, model, tmp_path, value):
    saver = checkpoints.Saver(5)
    path = saver.save(session, str(tmp_path / 'model.ckpt'), 1)
    before = contents(tmp_path)
    session.run(model['biases'].assign([0, value]))
    with pytest.raises(script.UserError, match=r'diverged.*\bbiases\b') as error:
        saver.save(session, str(tmp_path / 'model.ckpt'), 2)
    assert 'weights' not in str(error.value)
    assert contents(tmp_path) == before

    session.run(model['biases'].assign([0, 5]))
    saver.save(session, str(tmp_path / 'model.ckpt'), 3)
    assert reference.read_checkpoint(path)['biases'].tolist() == [0, 0]
    assert reference.read_checkpoint(tmp_path / 'model.ckpt-3')['biases'].tolist() == [0, 5]


def test_a_file_in_the_place_of_the_folder_is_named(session, tmp_path):
    folder = tmp_path / 'gone'
    saver = checkpoints.Saver(5)
    saver.save(session, str(folder / 'model.ckpt'), 1)
    folder.rename(tmp_path / 'moved')
    folder.write_text('a file')
    with pytest.raises(script.UserError, match=f'cannot save.*{re.escape(str(folder))}'):
        saver.save(session, str(folder / 'model.ckpt'), 2)
    assert folder.read_text() == 'a file'


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before_as_it_was(tmp_path):
    variable = tf.get_variable('large', [1000000], tf.float32, tf.zeros_initializer())
    saver = checkpoints.Saver(5)
    with tf.Session() as session:
        session.run(variable.initializer)
        path = saver.save(session, str(tmp_path / 'model.ckpt'), 1)
        before = contents(tmp_path)
        session.run(variable.assign(tf.ones_like(variable)))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000000, limits[1]))
        try:
            for step in 1, 2:  # 1 again: under the name of the one that is there.
                with pytest.raises(script.UserError) as error:
                    saver.save(session, str(tmp_path / 'model.ckpt'), step)
                assert re.search(rf'{tmp_path}/model.ckpt-{step}.*; File too la', str(error.value))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        after = contents(tmp_path)
        assert {name: after[name] for name in before} == before
        saver.save(session, str(tmp_path / 'model.ckpt'), 2)
    assert not reference.read_checkpoint(path)['large'].any()
    assert reference.read_checkpoint(tmp_path / 'model.ckpt-2')['large'].all()


# --- Finished ----------------------------------------------------------------


def test_the_mark_of_a_finished_run_can_be_set_and_taken_back(tmp_path):
    folder = str(tmp_path)
    assert checkpoints.finished_step(folder) is None
    checkpoints.clear_finished(folder)
    for step in 1234, 0:
        checkpoints.mark_finished(folder, step)
        assert checkpoints.finished_step(folder) == step
    assert checkpoints.paths(folder) == []
    (tmp_path / 'finished').write_bytes(b'')  # As while it is written.
    assert checkpoints.finished_step(folder) is None
    checkpoints.clear_finished(folder)
    assert checkpoints.finished_step(folder) is None
    assert os.listdir(folder) == []
