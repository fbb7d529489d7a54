"""Tests of support/checkpoints.py: usable and unusable checkpoints, and what is never saved."""

import os

import numpy as np
import pytest

from support import checkpoints, script
from support.compat import tf
from tests import harness, reference

DATA = '.data-00000-of-00001'
WEIGHTS = np.linspace(-3e38, 3e38, 10).astype(np.float32)
VALUES = {'weights': WEIGHTS, 'biases': np.float32([1, -2]), 'global_step': np.int64(7)}


def write(folder, step, **changes):
    return reference.write_checkpoint(folder, step, dict(VALUES, **changes))


@pytest.fixture
def session(fresh_graph_and_flags):
    """A session with a variable for each name in VALUES."""
    for name, value in VALUES.items():
        tf.get_variable(name, initializer=np.zeros_like(value))
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        yield session


def test_paths_lists_checkpoints_newest_first(tmp_path):
    paths = [write(tmp_path, step) for step in (9, 1000, 0, 10)]
    for end in '-12.meta', '-.index', '-13.index.tempstate1', '-14' + DATA, '-1e3.index', '.index':
        (tmp_path / f'model.ckpt{end}').touch()
    (tmp_path / 'old-model.ckpt-15.index').touch()
    assert checkpoints.paths(str(tmp_path)) == [paths[i] for i in (1, 3, 0, 2)]
    assert checkpoints.newest(str(tmp_path / 'missing')) is None


@pytest.mark.parametrize('pipe', [None, DATA, ''], ids=['none', 'data', 'format V1'])
def test_incomplete_checkpoint_and_pipe_are_skipped_by_name(tmp_path, capsys, pipe):
    good, bad = write(tmp_path, 3), write(tmp_path, 4)
    assert checkpoints.newest(str(tmp_path)) == bad and capsys.readouterr().err == ''
    os.remove(bad + DATA)
    if pipe is not None:
        os.mkfifo(bad + pipe)
    assert checkpoints.newest(str(tmp_path)) == good
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'Skipping {bad}') and ('regular' in line) == (pipe is not None)
    assert checkpoints.newest(good) == good
    with pytest.raises(script.UserError, match=bad):
        checkpoints.newest(bad)


@pytest.mark.parametrize('suffix', [DATA, '.index'])
def test_no_damaged_byte_changes_a_value_unnoticed(tmp_path, suffix):
    path, file = write(tmp_path, 7), tmp_path / ('model.ckpt-7' + suffix)
    content = file.read_bytes()
    harmless = 0
    for i in range(len(content)):
        file.write_bytes(content[:i])
        with pytest.raises(script.UserError, match=path):
            checkpoints.check(path)
        file.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        try:
            checkpoints.check(path)
        except script.UserError:
            continue
        harmless += 1
        np.testing.assert_equal(reference.read_checkpoint(path), VALUES, f'flipped at {i}')
    assert harmless < len(content) / 3


@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_infinite_value_is_neither_usable_nor_saved(session, tmp_path, value):
    with pytest.raises(script.UserError, match='biases is not finite'):
        checkpoints.check(write(tmp_path, 4, biases=np.float32([0, value])))
    saver, biases = checkpoints.Saver(5), checkpoints.saved_variables()['biases']
    path = saver.save(session, str(tmp_path / 'model.ckpt'), 1)
    before = harness.contents(tmp_path)
    biases.load([0, value], session)
    with pytest.raises(script.UserError, match=r'diverged.*finite: biases\.'):
        saver.save(session, str(tmp_path / 'model.ckpt'), 2)
    assert harness.contents(tmp_path) == before and saver.newest == path
    biases.load([0, 5], session)
    assert saver.save(session, str(tmp_path / 'model.ckpt'), 3) == saver.newest
    assert reference.read_checkpoint(saver.newest)['biases'].tolist() == [0, 5]


@pytest.mark.parametrize(
    'name, initial, pattern',
    [
        ('missing', np.float32([0, 0]), 'no variable missing'),
        ('biases', np.float32([0, 0, 0]), r'biases.*\[2\].*\[3\]'),
        ('biases', np.float64([0, 0]), 'biases.*float32.*float64'),
    ],
)
def test_misfit_is_reported_with_its_variable(tmp_path, name, initial, pattern):
    path = write(tmp_path, 5)
    with pytest.raises(script.UserError, match=f'{path}.*{pattern}'):
        checkpoints.check(path, {name: tf.get_variable('here', initializer=initial)})


def test_restore_assigns_values_by_name_in_the_type_of_the_variable(session, tmp_path):
    path = write(tmp_path, 5, more=np.float32(1), global_step=np.float32(9))  # A classic trainer's.
    variables = checkpoints.saved_variables()
    checkpoints.check(path, variables)
    checkpoints.restore(session, path, variables)
    assert session.run([variables['biases'][1], variables['global_step']]) == [-2, 9]


def test_finished_mark_can_be_set_and_cleared(tmp_path):
    checkpoints.mark_finished(str(tmp_path), 1234)
    assert checkpoints.finished_step(str(tmp_path)) == 1234
    (tmp_path / 'finished').write_bytes(b'')  # The trainer is just writing it.
    assert checkpoints.finished_step(str(tmp_path)) is None
    checkpoints.clear_finished(str(tmp_path))
    checkpoints.clear_finished(str(tmp_path))
    assert os.listdir(str(tmp_path)) == [] and checkpoints.finished_step(str(tmp_path)) is None
