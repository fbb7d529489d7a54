"""Tests of cifar10_eval.py: the precision that it prints, and when it prints none."""

import os
import re
import shutil

import numpy as np
import pytest

import cifar10_eval
from support import checkpoints, dataset, script
from support.compat import tf
from tests import events, harness, reference

DATA = '.data-00000-of-00001'
LINE = re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: precision @ 1 = (\d\.\d{3})(.*)$')


@pytest.fixture
def evaluate(known_precision, tmp_path, capsys):
    """Function that evaluates the checkpoints in tmp_path, with these flags, in this process.

    It returns the lines of output and the precisions in them.
    """

    def run(**flags):
        folders = dict(checkpoint_dir=str(tmp_path), eval_dir=str(tmp_path / 'eval'))
        defaults = dict(folders, data_dir=known_precision.data_dir, batch_size=16, run_once=True)
        values = dict(defaults, **flags)
        harness.set_flags(**{name: value for name, value in values.items() if value is not None})
        cifar10_eval.main()
        lines = capsys.readouterr().out.splitlines()
        return lines, [match.group(1) for match in map(LINE.match, lines) if match]

    return run


@pytest.fixture
def checkpoint(known_precision, tmp_path):
    """The path of a checkpoint of step 12; its averages give the known precision, and the
    variables are 0."""
    return write_checkpoint(tmp_path, 12, known_precision.variables)


def write_checkpoint(folder, step, averages, **changes):
    variables = {name: np.zeros(shape, np.float32) for name, (shape, _) in reference.MODEL.items()}
    values = reference.checkpoint_values(step, variables, averages)
    return reference.write_checkpoint(folder, step, dict(values, **changes))


def finish(folder, step):
    """Leaves a folder as a trainer does that has reached its last step."""
    (folder / 'checkpoint').write_text(f'model_checkpoint_path: "model.ckpt-{step}"\n')
    (folder / 'finished').write_text(f'{step}\n')


def precisions_shown(eval_dir):
    """[(tag, step, precision)] in the event files of a folder, rounded."""
    return [
        (value.tag, step, round(value.simple_value, 3))
        for file in events.by_file(eval_dir)
        for step, value in events.values(file)
        if 'recision' in value.tag
    ]


@pytest.mark.parametrize('batch_size', [7, 128])
def test_precision_is_that_of_the_averages_over_each_image_once(
    evaluate, checkpoint, tmp_path, batch_size
):
    lines, precisions = evaluate(batch_size=batch_size)
    assert precisions == ['0.575']  # 23 of 40.
    assert checkpoint in lines[1] and '40 images' in lines[1]
    assert precisions_shown(tmp_path / 'eval') == [('Precision @ 1', 12, 0.575)]


def test_precision_without_averages_counts_a_tie_as_wrong(
    evaluate, known_precision, checkpoint, tmp_path
):
    _, precisions = evaluate(use_moving_averages=False)
    assert precisions == [f'{known_precision.zeros / 40:.3f}']
    ((tag, _, _),) = precisions_shown(tmp_path / 'eval')
    assert tag == 'Precision @ 1 (no averages)'


def test_precision_on_training_set_has_its_own_tag(evaluate, checkpoint, tmp_path):
    lines, precisions = evaluate(eval_data='train_eval')
    assert '300 images' in lines[1] and precisions == ['0.400']
    assert precisions_shown(tmp_path / 'eval') == [('Precision @ 1 (training set)', 12, 0.4)]


def test_num_examples_limits_the_images(evaluate, checkpoint):
    lines, precisions = evaluate(num_examples=19)
    assert '19 images' in lines[1]
    # 17 of the 40 are wrong. The threads decide which 19 come first.
    assert precisions[0] in [f'{right / 19:.3f}' for right in range(2, 20)]


def test_precision_of_ten_views_is_numpys(evaluate, known_precision, tmp_path):
    images, labels = reference.rectangle_images(5), known_precision.labels[:5]
    probabilities = reference.probabilities(known_precision.variables, images, 10)
    ranked = np.sort(probabilities, axis=1)
    assert (ranked[:, -1] - ranked[:, -2] > 1e-4).all(), 'too close for float32'
    expected = np.mean(probabilities.argmax(axis=1) == labels)
    assert expected < 1, 'the precision of one view'
    reference.write_data(
        tmp_path / 'ten', np.tile(images, [6, 1, 1, 1]), np.tile(labels, 6), test_images=5
    )
    write_checkpoint(tmp_path, 12, known_precision.variables)
    lines, precisions = evaluate(data_dir=str(tmp_path / 'ten'), views='10')
    assert precisions == [f'{expected:.3f}'] and LINE.match(lines[-1]).group(2) == ' (10 views)'
    assert precisions_shown(tmp_path / 'eval') == [
        ('Precision @ 1 (10 views)', 12, round(expected, 3))
    ]


def test_use_fp16_evaluates_nearly_as_well(evaluate, checkpoint):
    lines, precisions = evaluate(use_fp16=True)
    assert '--use_fp16' in lines[0] or 'float16' in lines[0]
    assert float(precisions[0]) == pytest.approx(0.575, abs=0.06)


def test_checkpoint_of_a_classic_trainer_is_evaluated(evaluate, known_precision, tmp_path):
    changes = {'global_step': np.float32(7), 'conv1/weight_loss/avg': np.float32(1)}
    write_checkpoint(tmp_path, 7, known_precision.variables, **changes)
    (tmp_path / 'checkpoint').write_text('model_checkpoint_path: "/gone/model.ckpt-7"\n')
    assert evaluate()[1] == ['0.575']


def test_single_checkpoint_is_evaluated_once(evaluate, known_precision, checkpoint, tmp_path):
    write_checkpoint(tmp_path, 99, known_precision.variables)
    lines, precisions = evaluate(checkpoint_dir=checkpoint, run_once=False)
    assert checkpoint in lines[1] and precisions == ['0.575']


def test_default_eval_dir_depends_on_checkpoint_dir(evaluate, checkpoint, tmp_path):
    shutil.copytree(str(tmp_path), str(tmp_path / 'run'))
    for place in tmp_path / 'run', tmp_path / 'run/model.ckpt-12':
        evaluate(eval_dir=None, checkpoint_dir=str(place))
    assert len(precisions_shown(tmp_path / 'run_eval')) == 2


def test_evaluator_waits_and_evaluates_each_checkpoint_once(interrupted_run):
    run = interrupted_run
    assert run.evaluator.status() == 0
    assert run.evaluator.stderr == ''
    evaluated = re.findall(
        r'^\w+ (/.*/model\.ckpt-\d+) .*\n.*precision', run.evaluator.stdout, re.M
    )
    steps = 0, run.stopped_at, run.finished_at
    assert evaluated == [f'{run.train_dir}/model.ckpt-{step}' for step in steps]
    assert len(run.evaluator.lines) == 3 + 2 * len(steps)


def test_evaluator_started_after_training_ends_at_once(evaluate, checkpoint, tmp_path):
    finish(tmp_path, 12)
    lines, precisions = evaluate(run_once=False)
    assert precisions == ['0.575'] and 'finished' in lines[-1]


@pytest.mark.parametrize(
    'fault, reason',
    [('data', '.'), ('index', '.'), ('nan', 'local4/biases'), ('shape', r'local4/biases.*\[191\]')],
)
def test_unusable_checkpoint_is_skipped_by_name(
    evaluate, known_precision, checkpoint, tmp_path, fault, reason
):
    if fault in ('data', 'index'):
        harness.cut_in_half(checkpoint + ('.index' if fault == 'index' else DATA))
    else:
        biases = np.full([192], np.nan) if fault == 'nan' else np.zeros([191])
        changes = {'local4/biases' + reference.AVERAGE: biases.astype(np.float32)}
        write_checkpoint(tmp_path, 12, known_precision.variables, **changes)
    finish(tmp_path, 12)
    lines, precisions = evaluate(run_once=False)
    assert re.match(f'Skipping {checkpoint}: .*{reason}', lines[2])
    assert precisions == [] and os.listdir(str(tmp_path / 'eval')) == []


@pytest.mark.parametrize('when', ['before the check', 'after the check'])
def test_checkpoint_deleted_while_being_read_is_skipped(
    evaluate, checkpoint, tmp_path, monkeypatch, when
):
    check = checkpoints.check

    def delete(path, variables=None):
        os.remove(path + '.index')
        os.remove(path + DATA)

    def check_and_delete(path, variables=None):
        for call in [delete, check] if when == 'before the check' else [check, delete]:
            call(path, variables)

    monkeypatch.setattr(checkpoints, 'check', check_and_delete)
    finish(tmp_path, 12)
    lines, precisions = evaluate(run_once=False)
    assert lines[2].startswith(f'Skipping {checkpoint}: ')
    assert precisions == [] and len(lines) == 4


def test_run_once_falls_back_to_an_older_checkpoint(
    evaluate, known_precision, checkpoint, tmp_path
):
    harness.cut_in_half(write_checkpoint(tmp_path, 15, known_precision.variables) + DATA)
    lines, precisions = evaluate()
    assert checkpoint in lines[1] and precisions == ['0.575']


@pytest.mark.parametrize('run_once', [True, False], ids=['once', 'again and again'])
@pytest.mark.parametrize('names', [['mug', 'cup'], ['mug'] + dataset.CLASS_NAMES[1:]])
def test_model_of_other_classes_is_not_evaluated(
    evaluate, checkpoint, tmp_path, capsys, names, run_once
):
    dataset.write_class_names(str(tmp_path), names)
    finish(tmp_path, 12)
    output = ''
    try:
        output = '\n'.join(evaluate(run_once=run_once)[0])
    except script.UserError as error:
        output = str(error) + capsys.readouterr().out
    assert str(tmp_path) in output and ('mug' in output or '2 classes' in output)
    assert 'precision @ 1' not in output and os.listdir(str(tmp_path / 'eval')) == []


@pytest.mark.parametrize('fault', ['no checkpoint', 'other model'])
def test_run_once_without_usable_checkpoint_is_an_error(
    evaluate, known_precision, tmp_path, capsys, fault
):
    if fault == 'other model':
        reference.write_checkpoint(tmp_path, 5, known_precision.variables)
    with pytest.raises(script.UserError, match=f'{tmp_path}'):
        evaluate()
    assert 'precision @ 1' not in capsys.readouterr().out


def test_full_disk_is_an_error(evaluate, checkpoint, tmp_path, file_size_limit):
    file_size_limit(1000)
    with pytest.raises(script.UserError, match=f'{tmp_path}/eval'):
        evaluate()


@pytest.mark.parametrize('fault', ['removed', 'cut short'])
def test_no_precision_if_the_data_change_meanwhile(
    evaluate, known_precision, checkpoint, tmp_path, monkeypatch, capsys, fault
):
    shutil.copytree(known_precision.data_dir, str(tmp_path / 'data'))
    path = str(tmp_path / 'data' / reference.DATA_FOLDER / 'test_batch.bin')
    count_correct = cifar10_eval.count_correct

    def break_and_count(*args):
        os.remove(path) if fault == 'removed' else os.truncate(path, 20 * 3073)
        return count_correct(*args)

    monkeypatch.setattr(cifar10_eval, 'count_correct', break_and_count)
    with pytest.raises((script.UserError, tf.errors.NotFoundError), match='cifar-10-batches-bin'):
        evaluate(data_dir=str(tmp_path / 'data'))
    assert 'precision @ 1' not in capsys.readouterr().out
    assert os.listdir(str(tmp_path / 'eval')) == []
