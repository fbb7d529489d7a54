"""Tests of results/record.py and results/pictures.py: the record of a run."""

import csv
from datetime import datetime
import glob
import os
import re
import shutil
import sys

from absl.testing import flagsaver
import numpy as np
import pytest

from results import pictures, record
from support import dataset, script
from support.compat import tf
from tests import events, harness, reference

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
        folders = dict(data_dir=data_dir, train_dir=run_dir, record_dir=str(record_dir))
        harness.set_flags(record_steps=steps, batch_size=16, **folders)
        record.main()


@pytest.fixture(scope='module')
def record_dir(data_dir, run_dir, tmp_path_factory):
    """The record of that run, with checkpoints 5 steps apart."""
    folder = tmp_path_factory.mktemp('record')
    make_record(data_dir, run_dir, folder, 5)
    return folder


@pytest.fixture
def record_copy(record_dir, tmp_path):
    shutil.copytree(str(record_dir), str(tmp_path / 'record'))
    return tmp_path / 'record'


def table(folder, name):
    rows = list(csv.DictReader((folder / name).read_text().splitlines()))
    published = harness.read(os.path.join(harness.FOLDER, 'results', name)).splitlines()[0]
    assert list(rows[0]) == published.split(',')
    return rows


def test_losses_are_those_in_tensorboard(interrupted_run, record_dir):
    """The hours exclude the time between two trainers."""
    rows = table(record_dir, 'losses.csv')
    assert [int(row['step']) for row in rows] == list(range(1, interrupted_run.finished_at + 1))
    files = stopped, killed, finished = events.by_file(interrupted_run.train_dir)
    for column, tag in record.TAGS.items():
        expected = [value for _, value in events.curve(stopped + finished, tag)]
        assert [float(row[column]) for row in rows] == pytest.approx(expected, rel=1e-4)
    last_at = max(event.wall_time for event in finished if event.summary.value)
    ends = stopped[-1].wall_time, killed[-1].wall_time, last_at
    worked = sum(end - file[0].wall_time for end, file in zip(ends, files))
    assert 3600 * float(rows[-1]['hours']) == pytest.approx(worked, abs=0.2)
    assert datetime.fromisoformat(rows[-1]['time']).timestamp() == int(last_at)


def test_checkpoints_some_steps_apart_have_numpys_precision(known_precision, record_dir):
    rows = table(record_dir, 'checkpoints.csv')
    losses = {row['step']: row for row in table(record_dir, 'losses.csv')}
    assert [row['step'] for row in rows] == ['1', '6', '8']
    expected = []
    for variables in AVERAGES, VARIABLES:
        logits = reference.evaluation_logits(variables, reference.rectangle_images(40))
        expected.append(f'{np.mean(logits.argmax(axis=1) == known_precision.labels):.4f}')
    assert expected[0] != expected[1]
    for row in rows:
        assert [row['precision'], row['precision without averages']] == expected
        assert row['total_loss'] == losses[row['step']]['total_loss']
    path = tf.train.latest_checkpoint(str(record_dir))
    assert path == f'{record_dir}/model.ckpt-8'
    values = reference.read_checkpoint(path)
    assert sorted(values) == sorted(name + reference.AVERAGE for name in AVERAGES)
    assert all((values[name + reference.AVERAGE] == AVERAGES[name]).all() for name in AVERAGES)


def test_record_steps_depend_on_the_length_of_the_run():
    for last, expected in (100, [0, 5, 100]), (10**5, [0, 3000, 10**5]):
        paths = [f'model.ckpt-{step}' for step in (0, 1, 5, 3000) if step < last]
        chosen = record.every([*paths, f'model.ckpt-{last}'], None)
        assert chosen == [f'model.ckpt-{step}' for step in expected]


def test_second_record_evaluates_only_new_checkpoints(data_dir, run_dir, record_copy, capsys):
    before = table(record_copy, 'checkpoints.csv')
    make_record(data_dir, run_dir, record_copy, 0)
    assert re.findall(r'^step (\d+):', capsys.readouterr().out, re.MULTILINE) == ['3']
    after = table(record_copy, 'checkpoints.csv')
    assert [row['step'] for row in after] == ['1', '3', '6', '8']
    assert [row for row in after if row['step'] != '3'] == before


@pytest.mark.parametrize('fault', ['same folder', 'other run', 'no run', 'other classes'])
def test_record_of_the_wrong_run_is_rejected(data_dir, run_dir, record_copy, tmp_path, fault):
    run, named = shutil.copytree(run_dir, str(tmp_path / 'run')), str(tmp_path / 'run')
    target, table = record_copy, record_copy / 'checkpoints.csv'
    if fault == 'same folder':
        target, named = run, '--record_dir'
    elif fault == 'other run':
        table.write_text(re.sub('T[0-9]', 'T9', table.read_text()))
        named = str(table)
    elif fault == 'no run':
        run, named = str(tmp_path / 'none'), '--train_dir'
    else:
        dataset.write_class_names(run, ['mug', 'cup'])
    (record_copy / 'losses.csv').unlink()  # Only this file may be written.
    before = harness.contents(tmp_path)
    with pytest.raises(script.UserError, match=named):
        make_record(data_dir, run, target, 0)
    after = harness.contents(tmp_path)
    after.pop(f'{record_copy}/losses.csv', None)
    assert after == before


def test_record_of_an_experiment_holds_its_variables(start, data_dir, tmp_path, capsys):
    """cuda_convnet has another network and another input, and no moving averages."""
    run, target = str(tmp_path / 'run'), str(tmp_path / 'record')
    flags = f'--data_dir={data_dir}', '--batch_size=8', '--max_steps=2'
    trainer = start('experiments/cuda_convnet.py', f'--train_dir={run}', *flags)
    assert trainer.wait() == 0, trainer.stdout + trainer.stderr
    harness.set_flags(model='cuda_convnet')
    make_record(data_dir, run, target, None)
    assert 'without averages' not in capsys.readouterr().out
    *_, row = table(tmp_path / 'record', 'checkpoints.csv')
    assert row['precision without averages'] == ''

    trained = reference.read_checkpoint(f'{run}/model.ckpt-2')
    values = reference.read_checkpoint(f'{target}/model.ckpt-2')
    assert set(trained) - set(values) == {'global_step'} | {name + '/Momentum' for name in values}
    assert all((values[name] == trained[name]).all() for name in values)

    flags = f'--checkpoint_dir={target}', f'--data_dir={data_dir}', '--views=1'
    evaluator = start('experiments/cuda_convnet.py', *flags)
    assert evaluator.wait() == 0, evaluator.stdout + evaluator.stderr
    assert 'Training in' not in evaluator.stdout
    (printed,) = re.findall(r'precision @ 1 = (\S+)', evaluator.stdout)
    assert float(printed) == pytest.approx(float(row['precision']), abs=0.001)

    with flagsaver.flagsaver(data_dir=data_dir):
        _, labels, probabilities, filters = pictures.predict(f'{target}/model.ckpt-2')
    accuracy = np.mean(probabilities.argmax(axis=1) == labels)
    assert f'{accuracy:.4f}' == row['precision']
    assert (filters == trained['conv1/weights']).all()


def test_pictures_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(script.UserError, match='pip install matplotlib'):
        pictures.draw_losses({})


def test_confusion_matrix_counts_and_names_the_classes(monkeypatch):
    pytest.importorskip('matplotlib')
    figures, names = [], ['cat', 'dog', 'fish']
    monkeypatch.setattr(pictures, 'save', lambda figure, name: figures.append(figure))
    pictures.draw_confusion(np.array([0, 0, 2, 0]), np.array([0, 1, 2, 1]), names)
    (axes,) = figures[0].axes
    for labels in axes.get_xticklabels(), axes.get_yticklabels():
        assert [label.get_text() for label in labels] == names
    counts = {text.get_position(): int(text.get_text()) for text in axes.texts}
    assert counts.pop((0, 0)) == 1 and counts.pop((1, 0)) == 2 and counts.pop((2, 2)) == 1
    assert len(counts) == 6 and not any(counts.values())
