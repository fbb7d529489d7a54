"""Tests of support/checkpoints.py: usable and unusable checkpoints, and what is never saved."""

import os
import re

import numpy as np
import pytest

from support import checkpoints, script
from support.compat import tf
from tests import harness, reference

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
def variables(fresh_graph_and_flags):
    """Dict of name -> tf.Variable, for the names in VALUES."""
    for name, value in sorted(VALUES.items()):
        tf.get_variable(name, initializer=np.zeros_like(value))
    return {variable.op.name: variable for variable in tf.global_variables()}


@pytest.fixture
def session(variables):
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        yield session


def test_paths_lists_checkpoints_newest_first(write, tmp_path):
    paths = [write(step) for step in (9, 1000, 0, 10)]
    others = '12.meta .index 13.index.tempstate1 14.data-00000-of-00001 1e3.index'
    for name in [f'model.ckpt-{end}' for end in others.split()] + [
        'other.ckpt-11.index',
        'old-model.ckpt-15.index',
        'model.ckpt.index',
        'checkpoint',
    ]:
        (tmp_path / name).write_bytes(b'')
    found = checkpoints.paths(str(tmp_path))
    assert found == [paths[i] for i in (1, 3, 0, 2)]
    assert [checkpoints.step_of(path) for path in found] == [1000, 10, 9, 0]


def test_newest_of_empty_folder_is_none(tmp_path, capsys):
    for folder in tmp_path, tmp_path / 'missing':
        assert checkpoints.paths(str(folder)) == []
        assert checkpoints.newest(str(folder)) is None
    assert capsys.readouterr() == ('', '')


def test_newest_accepts_a_single_checkpoint(write):
    older, damaged = write(3), write(5)
    os.truncate(damaged + DATA, 5)
    assert checkpoints.newest(older) == older
    with pytest.raises(script.UserError, match=damaged):
        checkpoints.newest(damaged)


def test_folder_of_a_single_checkpoint_is_its_parent(tmp_path):
    assert (
        checkpoints.folder_of('/a/run/model.ckpt-7') == checkpoints.folder_of('/a/run') == '/a/run'
    )
    folder = tmp_path / 'model.ckpt-7'
    folder.mkdir()
    assert checkpoints.folder_of(str(folder)) == str(folder)


@pytest.mark.parametrize('suffix', [DATA, '.index'])
@pytest.mark.parametrize('damage', [harness.change_bytes, harness.cut_in_half, os.remove])
def test_damaged_checkpoint_is_skipped_by_name(write, tmp_path, capsys, suffix, damage):
    good, bad = write(3), write(4)
    assert checkpoints.newest(str(tmp_path)) == bad
    assert capsys.readouterr().err == ''
    damage(bad + suffix)
    with pytest.raises(script.UserError, match=f'^{bad}: .'):
        checkpoints.check(bad)
    assert checkpoints.newest(str(tmp_path)) == good
    # Without its index, it is not a checkpoint any more.
    skipped = [] if (suffix, damage) == ('.index', os.remove) else [bad]
    assert re.findall('^Skipping (.*?): .*$', capsys.readouterr().err, re.MULTILINE) == skipped


def is_usable(path):
    try:
        checkpoints.check(path)
        return True
    except script.UserError:
        return False


@pytest.mark.parametrize('suffix', [DATA, '.index'])
def test_no_damaged_byte_changes_a_value_unnoticed(write, tmp_path, suffix):
    path, file = write(7), tmp_path / ('model.ckpt-7' + suffix)
    content = file.read_bytes()
    harmless = 0
    for i in range(len(content)):
        file.write_bytes(content[:i])
        assert not is_usable(path), f'cut at {i}'
        file.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        if is_usable(path):
            harmless += 1
            values = reference.read_checkpoint(path)
            assert set(values) == set(VALUES), f'flipped at {i}'
            assert all((values[name] == VALUES[name]).all() for name in VALUES), f'flipped at {i}'
    assert harmless < len(content) / 3


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_infinite_value_is_neither_usable_nor_saved(write, session, variables, tmp_path, value):
    with pytest.raises(script.UserError, match='biases is not finite'):
        checkpoints.check(write(4, biases=np.float32([0, value])))
    saver = checkpoints.Saver(5)
    path = saver.save(session, str(tmp_path / 'model.ckpt'), 1)
    before = harness.contents(tmp_path)
    session.run(variables['biases'].assign([0, value]))
    with pytest.raises(script.UserError, match=r'diverged.*\bbiases\b') as error:
        saver.save(session, str(tmp_path / 'model.ckpt'), 2)
    assert 'weights' not in str(error.value)
    assert harness.contents(tmp_path) == before
    assert saver.newest == path

    session.run(variables['biases'].assign([0, 5]))
    assert saver.save(session, str(tmp_path / 'model.ckpt'), 3) == saver.newest
    assert reference.read_checkpoint(tmp_path / 'model.ckpt-3')['biases'].tolist() == [0, 5]


@pytest.mark.parametrize(
    'name, initial, words',
    [
        ('missing', np.float32([0, 0]), ['missing']),
        ('biases', np.float32([0, 0, 0]), ['[2]', '[3]']),
        ('biases', np.float64([0, 0]), ['float32', 'float64']),
    ],
)
def test_misfit_is_reported_with_its_variable(write, name, initial, words):
    path = write(5)
    with pytest.raises(script.UserError, match=f'{path}.*{name}') as error:
        checkpoints.check(path, {name: tf.get_variable('here', initializer=initial)})
    assert all(word in str(error.value) for word in words)


def test_restore_assigns_values_by_name_in_the_type_of_the_variable(write, session, variables):
    path = write(5, more=np.float32(1), global_step=np.float32(9))
    checkpoints.check(path, variables)
    checkpoints.restore(session, path, variables)
    assert session.run(variables['biases']).tolist() == [1, -2]
    assert session.run(variables['global_step']) == 9
    with pytest.raises(script.UserError):
        checkpoints.check(path, {'biases': variables['weights']})


def test_file_in_place_of_the_folder_is_an_error(session, tmp_path):
    folder = tmp_path / 'gone'
    saver = checkpoints.Saver(5)
    saver.save(session, str(folder / 'model.ckpt'), 1)
    folder.rename(tmp_path / 'moved')
    folder.write_text('a file')
    with pytest.raises(script.UserError, match=str(folder)):
        saver.save(session, str(folder / 'model.ckpt'), 2)
    assert folder.read_text() == 'a file'


def test_finished_mark_can_be_set_and_cleared(tmp_path):
    folder = str(tmp_path)
    assert checkpoints.finished_step(folder) is None
    for step in 1234, 0:
        checkpoints.mark_finished(folder, step)
        assert checkpoints.finished_step(folder) == step
    (tmp_path / 'finished').write_bytes(b'')  # The trainer is just writing it.
    assert checkpoints.finished_step(folder) is None
    checkpoints.clear_finished(folder)
    checkpoints.clear_finished(folder)
    assert os.listdir(folder) == []
