"""Tests of results/record.py and results/pictures.py: the record of a run."""

import csv
from datetime import datetime
import glob
import importlib
import importlib.util
import os
import re
import shutil

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from tests import events
from tests import harness
from tests import reference

RECORD = os.path.join('results', 'record.py')
PICTURES = os.path.join('results', 'pictures.py')

TAGS = {
    'learning_rate': 'learning_rate',
    'total_loss': 'losses/total_loss',
    'cross_entropy': 'losses/cross_entropy',
    'local3/weight_loss': 'losses/local3/decay',
    'local4/weight_loss': 'losses/local4/decay',
    'total_loss (raw)': 'losses/total_loss_raw',
    'cross_entropy (raw)': 'losses/cross_entropy_raw',
}
AVERAGES, VARIABLES = (reference.random_variables(seed, local3=3, local4=3) for seed in (2, 1))


@pytest.fixture(scope='module')
def run_dir(life, tmp_path_factory):
    """The events of a run that was killed once, and checkpoints of steps 1, 3, 6 and 8."""
    folder = tmp_path_factory.mktemp('run')
    for path in glob.glob(life.train_dir + '/events*'):
        shutil.copy(path, str(folder))
    for step in 1, 3, 6, 8:
        values = reference.checkpoint_values(step, VARIABLES, AVERAGES)
        reference.write_checkpoint(folder, step, values)
    return str(folder)


@pytest.fixture(scope='module')
def make(start, data_dir, run_dir):
    """Function that makes a record in a folder and returns the script at its end."""

    def make_record(record_dir, *flags):
        flags = ('--data_dir=' + data_dir, '--train_dir=' + run_dir, *flags)
        script = start(RECORD, '--batch_size=16', f'--record_dir={record_dir}', *flags)
        script.wait()
        return script

    return make_record


@pytest.fixture(scope='module')
def record_dir(make, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('record'))
    script = make(folder, '--record_steps=5')
    assert script.status() == 0, script.stderr
    assert script.errors == []
    return folder


def table(folder, name):
    with open(os.path.join(str(folder), name), newline='') as file:
        return list(csv.DictReader(file))


def test_the_losses_are_those_that_tensorboard_shows(life, record_dir):
    rows = table(record_dir, 'losses.csv')
    assert [int(row['step']) for row in rows] == list(range(1, life.finished_at + 1))
    stopped, _, finished = events.sessions(life.train_dir)
    for column, tag in TAGS.items():
        shown = events.curve(stopped, tag) + events.curve(finished, tag)
        expected = [value for _, value in shown]
        assert [float(row[column]) for row in rows] == pytest.approx(expected, rel=1e-4)


def test_hours_are_those_at_work_without_the_time_in_between(life, record_dir):
    sessions = events.sessions(life.train_dir)
    at_work = [session[-1].wall_time - session[0].wall_time for session in sessions[:-1]]
    last_at = max(event.wall_time for event in sessions[-1] if event.summary.value)
    last = table(record_dir, 'losses.csv')[-1]
    expected = sum(at_work) + last_at - sessions[-1][0].wall_time
    assert 3600 * float(last['hours']) == pytest.approx(expected, abs=0.2)
    assert datetime.fromisoformat(last['time']).timestamp() == int(last_at)


def test_the_columns_are_those_of_the_published_record(record_dir):
    for name in 'losses.csv', 'checkpoints.csv':
        headers = [
            harness.read(os.path.join(folder, name)).splitlines()[0]
            for folder in (os.path.join(harness.FOLDER, 'results'), record_dir)
        ]
        assert headers[0] == headers[1]


def numpys_precision(variables):
    logits = reference.evaluation_logits(variables, reference.rectangle_images(340)[:40])
    labels = np.random.RandomState(8).randint(0, 10, 340)[:40]  # As in data_dir.
    return np.mean(logits.argmax(axis=1) == labels)


def test_checkpoints_some_steps_apart_and_the_last_have_numpys_precision(record_dir):
    rows = table(record_dir, 'checkpoints.csv')
    losses = {row['step']: row for row in table(record_dir, 'losses.csv')}
    assert [row['step'] for row in rows] == ['1', '6', '8']
    expected = [f'{numpys_precision(variables):.4f}' for variables in (AVERAGES, VARIABLES)]
    assert expected[0] != expected[1]
    for row in rows:
        assert [row['precision'], row['precision without averages']] == expected
        assert row['total_loss'] == losses[row['step']]['total_loss']


def test_a_record_made_again_gets_what_is_new_and_evaluates_nothing_twice(
    make, record_dir, tmp_path
):
    shutil.copytree(record_dir, str(tmp_path / 'record'))
    before = table(record_dir, 'checkpoints.csv')
    script = make(tmp_path / 'record', '--record_steps=0')
    assert [line.split(':')[0] for line in script.lines] == [
        'step 3',
        f'Saved {tmp_path}/record/model.ckpt-8.',
    ]
    after = table(tmp_path / 'record', 'checkpoints.csv')
    assert [row['step'] for row in after] == ['1', '3', '6', '8']
    assert [row for row in after if row['step'] != '3'] == before


def test_the_small_model_holds_the_averages_and_is_found_by_tensorflow_and_the_evaluator(
    start, data_dir, record_dir, tmp_path
):
    moved = str(tmp_path / 'moved')
    shutil.copytree(record_dir, moved)
    path = tf.train.latest_checkpoint(moved)
    assert path == os.path.join(moved, 'model.ckpt-8')
    values = reference.read_checkpoint(path)
    assert sorted(values) == sorted(name + reference.AVERAGE for name in AVERAGES)
    for name, average in AVERAGES.items():
        assert np.array_equal(values[name + reference.AVERAGE], average)
    evaluator = start(
        harness.EVAL,
        '--data_dir=' + data_dir,
        '--checkpoint_dir=' + moved,
        f'--eval_dir={tmp_path}',
        '--run_once',
    )
    assert evaluator.wait() == 0
    assert evaluator.lines[-1].endswith(f'= {numpys_precision(AVERAGES):.3f}')


@pytest.mark.parametrize(
    'fault, reason',
    [
        ('same folder', 'whose checkpoints it would overwrite'),
        ('other run', 'tells of another run'),
        ('no run', 'no events or no checkpoint'),
    ],
)
def test_a_record_is_not_made_where_it_would_be_wrong(
    make, record_dir, run_dir, tmp_path, fault, reason
):
    copy = tmp_path / 'record'
    shutil.copytree(record_dir, str(copy))
    old = copy / 'checkpoints.csv'
    flags = ['--record_steps=0']
    if fault == 'other run':
        old.write_text(re.sub('T[0-9]', 'T9', old.read_text()))
    elif fault == 'no run':
        flags.append(f'--train_dir={tmp_path}/none')
    before = old.read_text(), sorted(os.listdir(run_dir))
    script = make(run_dir if fault == 'same folder' else copy, *flags)
    assert script.status() == 1
    assert len(script.errors) == 1 and reason in script.errors[0]
    assert before == (old.read_text(), sorted(os.listdir(run_dir)))


@pytest.mark.skipif(not importlib.util.find_spec('matplotlib'), reason='matplotlib is not there')
def test_the_record_is_drawn(start, data_dir, record_dir):
    script = start(PICTURES, '--data_dir=' + data_dir, '--record_dir=' + record_dir, fresh=True)
    assert script.wait() == 0, script.stderr
    names = ['losses', 'precision', 'confusion', 'filters', 'errors']
    assert script.lines == [f'Saved {record_dir}/{name}.png.' for name in names]
    for name in names:
        with open(f'{record_dir}/{name}.png', 'rb') as file:
            assert file.read(4) == b'\x89PNG'


def test_the_confusion_matrix_counts_and_names_the_classes(monkeypatch):
    pytest.importorskip('matplotlib')
    pictures = importlib.import_module('results.pictures')
    drawn = []
    monkeypatch.setattr(pictures, 'save', lambda figure, name: drawn.append(figure))
    names = ['cat', 'dog', 'fish']
    pictures.draw_confusion(np.array([0, 0, 2, 0]), np.array([0, 1, 2, 1]), names)
    (axes,) = drawn[0].axes
    for labels in axes.get_xticklabels(), axes.get_yticklabels():
        assert [label.get_text() for label in labels] == names
    counts = {text.get_position(): int(text.get_text()) for text in axes.texts}
    predicted_and_label = {(0, 0): 1, (1, 0): 2, (2, 2): 1}
    assert {at: count for at, count in counts.items() if count} == predicted_and_label
    assert len(counts) == 9
