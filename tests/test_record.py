"""Tests of results/record.py and results/pictures.py: the record of a run."""

import csv
from datetime import datetime
import glob
import importlib.util
import os
import re
import shutil

from absl.testing import flagsaver
import numpy as np
import pytest

from results import pictures, record
from support import dataset, script
from support.compat import tf
from tests import events, harness, reference

FLAGS = record.FLAGS
AVERAGES, VARIABLES = (reference.random_variables(seed, local3=3, local4=3) for seed in (2, 1))


@pytest.fixture(scope='module')
def run_dir(interrupted_run, tmp_path_factory):
    """The events of the interrupted run, and checkpoints of steps 1, 3, 6 and 8."""
    folder = tmp_path_factory.mktemp('run')
    for path in glob.glob(interrupted_run.train_dir + '/events*'):
        shutil.copy(path, str(folder))
    for step in 1, 3, 6, 8:
        values = reference.checkpoint_values(step, VARIABLES, AVERAGES)
        reference.write_checkpoint(folder, step, values)
    return str(folder)


def make_record(data_dir, run_dir, record_dir, steps):
    with flagsaver.flagsaver():
        FLAGS.data_dir, FLAGS.train_dir, FLAGS.record_dir = data_dir, run_dir, str(record_dir)
        FLAGS.record_steps, FLAGS.batch_size = steps, 16
        record.main()


@pytest.fixture(scope='module')
def record_dir(data_dir, run_dir, tmp_path_factory):
    """The record of that run, with checkpoints 5 steps apart."""
    folder = str(tmp_path_factory.mktemp('record'))
    make_record(data_dir, run_dir, folder, 5)
    return folder


@pytest.fixture
def record_copy(record_dir, tmp_path):
    shutil.copytree(record_dir, str(tmp_path / 'record'))
    return tmp_path / 'record'


def table(folder, name):
    with open(os.path.join(str(folder), name), newline='') as file:
        return list(csv.DictReader(file))


def numpys_precision(variables, labels):
    logits = reference.evaluation_logits(variables, reference.rectangle_images(40))
    return np.mean(logits.argmax(axis=1) == labels)


def test_losses_are_those_in_tensorboard(interrupted_run, record_dir):
    rows = table(record_dir, 'losses.csv')
    assert [int(row['step']) for row in rows] == list(range(1, interrupted_run.finished_at + 1))
    stopped, _, finished = events.by_file(interrupted_run.train_dir)
    for column, tag in record.TAGS.items():
        shown = events.curve(stopped, tag) + events.curve(finished, tag)
        expected = [value for _, value in shown]
        assert [float(row[column]) for row in rows] == pytest.approx(expected, rel=1e-4)


def test_hours_exclude_the_time_between_trainers(interrupted_run, record_dir):
    files = events.by_file(interrupted_run.train_dir)
    worked = [file[-1].wall_time - file[0].wall_time for file in files[:-1]]
    last_at = max(event.wall_time for event in files[-1] if event.summary.value)
    last = table(record_dir, 'losses.csv')[-1]
    expected = sum(worked) + last_at - files[-1][0].wall_time
    assert 3600 * float(last['hours']) == pytest.approx(expected, abs=0.2)
    assert datetime.fromisoformat(last['time']).timestamp() == int(last_at)


def test_columns_are_those_of_the_published_record(record_dir):
    for name in 'losses.csv', 'checkpoints.csv':
        headers = [
            harness.read(os.path.join(folder, name)).splitlines()[0]
            for folder in (os.path.join(harness.FOLDER, 'results'), record_dir)
        ]
        assert headers[0] == headers[1]


def test_checkpoints_some_steps_apart_have_numpys_precision(known_precision, record_dir):
    rows = table(record_dir, 'checkpoints.csv')
    losses = {row['step']: row for row in table(record_dir, 'losses.csv')}
    assert [row['step'] for row in rows] == ['1', '6', '8']
    expected = [
        f'{numpys_precision(variables, known_precision.labels):.4f}'
        for variables in (AVERAGES, VARIABLES)
    ]
    assert expected[0] != expected[1]
    for row in rows:
        assert [row['precision'], row['precision without averages']] == expected
        assert row['total_loss'] == losses[row['step']]['total_loss']


@pytest.mark.parametrize(
    'last, steps, expected', [(100, None, [0, 5, 100]), (10**5, None, [0, 3000, 10**5])]
)
def test_record_steps_depend_on_the_length_of_the_run(last, steps, expected):
    paths = [f'model.ckpt-{step}' for step in (0, 1, 5, 3000) if step < last]
    chosen = record.every([*paths, f'model.ckpt-{last}'], steps)
    assert chosen == [f'model.ckpt-{step}' for step in expected]


def test_second_record_evaluates_only_new_checkpoints(data_dir, run_dir, record_copy, capsys):
    before = table(record_copy, 'checkpoints.csv')
    make_record(data_dir, run_dir, record_copy, 0)
    assert re.findall(r'^step (\d+):', capsys.readouterr().out, re.MULTILINE) == ['3']
    after = table(record_copy, 'checkpoints.csv')
    assert [row['step'] for row in after] == ['1', '3', '6', '8']
    assert [row for row in after if row['step'] != '3'] == before


def test_small_model_holds_only_averages_and_can_be_moved(record_copy):
    path = tf.train.latest_checkpoint(str(record_copy))
    assert path == str(record_copy / 'model.ckpt-8')
    values = reference.read_checkpoint(path)
    assert sorted(values) == sorted(name + reference.AVERAGE for name in AVERAGES)
    for name, average in AVERAGES.items():
        assert np.array_equal(values[name + reference.AVERAGE], average)
    assert dataset.class_names(str(record_copy)) == dataset.CLASS_NAMES


@pytest.mark.parametrize('fault', ['same folder', 'other run', 'no run', 'other classes'])
def test_record_of_the_wrong_run_is_rejected(data_dir, run_dir, record_copy, tmp_path, fault):
    copy = str(tmp_path / 'run')
    shutil.copytree(run_dir, copy)
    old = record_copy / 'checkpoints.csv'
    if fault == 'other run':
        old.write_text(re.sub('T[0-9]', 'T9', old.read_text()))
    elif fault == 'other classes':
        dataset.write_class_names(copy, ['mug', 'cup'])
    before = old.read_text(), sorted(os.listdir(copy))
    named = {'same folder': '--record_dir', 'other run': str(old), 'no run': '--train_dir'}
    with pytest.raises(script.UserError, match=named.get(fault, copy)):
        make_record(
            data_dir,
            str(tmp_path / 'none') if fault == 'no run' else copy,
            copy if fault == 'same folder' else record_copy,
            0,
        )
    assert before == (old.read_text(), sorted(os.listdir(copy)))


@pytest.mark.skipif(not importlib.util.find_spec('matplotlib'), reason='needs matplotlib')
def test_pictures_are_drawn(data_dir, record_copy, capsys):
    FLAGS.data_dir, FLAGS.record_dir = data_dir, str(record_copy)
    pictures.main()
    names = ['losses', 'precision', 'confusion', 'filters', 'errors']
    saved = re.findall('^Saved (.*)\\.$', capsys.readouterr().out, re.MULTILINE)
    assert saved == [f'{record_copy}/{name}.png' for name in names]
    for path in saved:
        with open(path, 'rb') as file:
            assert file.read(4) == b'\x89PNG'


def test_pictures_help_needs_no_matplotlib(start):
    before = 'import sys; sys.modules["matplotlib"] = None'
    help_ = start('results/pictures.py', '--help', before=before)
    help_.wait()
    assert '--record_dir' in help_.stdout and help_.stderr == ''


@pytest.fixture
def drawn(monkeypatch):
    """The list of the figures that are drawn, instead of files."""
    pytest.importorskip('matplotlib')
    figures = []
    monkeypatch.setattr(pictures, 'save', lambda figure, name: figures.append(figure))
    return figures


def test_confusion_matrix_counts_and_names_the_classes(drawn):
    names = ['cat', 'dog', 'fish']
    pictures.draw_confusion(np.array([0, 0, 2, 0]), np.array([0, 1, 2, 1]), names)
    (axes,) = drawn[0].axes
    for labels in axes.get_xticklabels(), axes.get_yticklabels():
        assert [label.get_text() for label in labels] == names
    counts = {text.get_position(): int(text.get_text()) for text in axes.texts}
    predicted_and_label = {(0, 0): 1, (1, 0): 2, (2, 2): 1}
    assert {at: count for at, count in counts.items() if count} == predicted_and_label
    assert len(counts) == 9


@pytest.mark.parametrize('num_checkpoints, shows_start', [(1, True), (5, True), (50, False)])
def test_precision_of_a_short_run_is_shown_from_its_start(drawn, num_checkpoints, shows_start):
    column = np.linspace(0.1, 0.8, num_checkpoints) ** 0.2
    rows = {
        i: {'step': i, 'precision': value, 'precision without averages': value / 2}
        for i, value in enumerate(column)
    }
    pictures.draw_precision(rows)
    (axes,) = drawn[0].axes
    low, high = axes.get_ylim()
    assert (low <= column[0] / 2) == shows_start
    assert low < column[-1] < high
    assert f'{column[-1]:.3f}' in [text.get_text() for text in axes.texts]
