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
LINE = re.compile(r'^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: precision @ 1 = (\d\.\d{3}.*)$', re.M)


@pytest.fixture
def evaluate(known_precision, tmp_path, capsys):
    """Function that evaluates in this process. Returns the lines, and what they say of precision.

    It evaluates the checkpoints in tmp_path, once, if no flag says otherwise.
    """

    def run(**flags):
        folders = dict(checkpoint_dir=str(tmp_path), eval_dir=str(tmp_path / 'eval'))
        defaults = dict(folders, data_dir=known_precision.data_dir, batch_size=16, run_once=True)
        values = dict(defaults, **flags)
        harness.set_flags(**{name: value for name, value in values.items() if value is not None})
        cifar10_eval.main()
        output = capsys.readouterr().out
        return output.splitlines(), LINE.findall(output)

    return run


@pytest.fixture
def checkpoint(known_precision, tmp_path):
    """A checkpoint of step 12, whose averages give the known precision. The variables are 0."""
    return write_checkpoint(tmp_path, 12, known_precision.variables)


def write_checkpoint(folder, step, averages, **changes):
    variables = {name: np.zeros(shape, np.float32) for name, (shape, _) in reference.MODEL.items()}
    values = reference.checkpoint_values(step, variables, averages)
    return reference.write_checkpoint(folder, step, dict(values, **changes))


def finish(folder):
    """Leaves a folder as a trainer does that has reached step 12 of 12."""
    (folder / 'checkpoint').write_text('model_checkpoint_path: "model.ckpt-12"\n')
    (folder / 'finished').write_text('12\n')


@pytest.mark.parametrize(
    'flags, images, precision, label',
    [
        (dict(batch_size=7, run_once=False), 40, '0.575', ''),  # 23 of 40.
        (dict(eval_data='train_eval'), 300, '0.400', ' (training set)'),
        (dict(use_moving_averages=False), 40, None, ' (no averages)'),
    ],
)
def test_precision_counts_each_image_once(
    evaluate, known_precision, checkpoint, tmp_path, flags, images, precision, label
):
    finish(tmp_path)  # Even without --run_once, the evaluator ends.
    # Without averages all logits are equal, which counts as class 0.
    precision = precision or f'{known_precision.zeros / 40:.3f}'
    lines, precisions = evaluate(**flags)
    assert f'Evaluating {checkpoint} on {images} images.' in lines
    assert precisions == [precision + label]
    (file,) = events.by_file(tmp_path / 'eval')
    assert events.curve(file, 'Precision @ 1' + label) == [(12, pytest.approx(float(precision)))]


def test_num_examples_limits_the_images_and_use_fp16_is_reported(evaluate, checkpoint):
    lines, precisions = evaluate(num_examples=19, use_fp16=True)
    assert ('--use_fp16' in lines[0] or 'float16' in lines[0]) and '19 images' in lines[1]
    # About 17 of the 40 are wrong. The threads decide which 19 come first.
    assert precisions[0] in [f'{right / 19:.3f}' for right in range(1, 20)]


def test_precision_of_ten_views_is_numpys(evaluate, known_precision, tmp_path):
    images, labels = reference.rectangle_images(5), known_precision.labels[:5]
    probabilities = reference.probabilities(known_precision.variables, images, 10)
    second, first = np.sort(probabilities, axis=1)[:, -2:].T
    assert min(first - second) > 1e-4, 'too close for float32'
    expected = np.mean(probabilities.argmax(axis=1) == labels)
    assert expected < 1, 'the precision of one view'
    images, labels = np.tile(images, [6, 1, 1, 1]), np.tile(labels, 6)
    reference.write_data(tmp_path / 'ten', images, labels, test_images=5)
    write_checkpoint(tmp_path, 12, known_precision.variables)
    _, precisions = evaluate(data_dir=str(tmp_path / 'ten'), views='10')
    assert precisions == [f'{expected:.3f} (10 views)']


def test_single_classic_checkpoint_is_evaluated_once_into_the_default_folder(
    evaluate, known_precision, tmp_path
):
    classic = {'global_step': np.float32(7), 'conv1/weight_loss/avg': np.float32(1)}
    checkpoint = write_checkpoint(tmp_path / 'run', 7, known_precision.variables, **classic)
    write_checkpoint(tmp_path / 'run', 99, known_precision.variables)
    lines, precisions = evaluate(checkpoint_dir=checkpoint, eval_dir=None, run_once=False)
    assert checkpoint in lines[1] and precisions == ['0.575']
    assert len(events.by_file(tmp_path / 'run_eval')) == 1


def test_evaluator_waits_and_evaluates_each_checkpoint_once(interrupted_run):
    run = interrupted_run
    assert run.evaluator.status() == 0 and run.evaluator.stderr == ''
    evaluated = re.findall(r'^\w+ (/.*ckpt-\d+) .*\n.*precision', run.evaluator.stdout, re.M)
    steps = 0, run.stopped_at, run.finished_at
    assert evaluated == [f'{run.train_dir}/model.ckpt-{step}' for step in steps]
    assert len(run.evaluator.lines) == 3 + 2 * len(steps)


@pytest.mark.parametrize('fault', ['damaged', r'biases.*\[191\]', '2 classes', 'No such file'])
def test_unusable_checkpoint_is_skipped_by_name(
    evaluate, known_precision, checkpoint, tmp_path, monkeypatch, fault
):
    finish(tmp_path)
    if fault == 'damaged':
        harness.cut_in_half(checkpoint + DATA)
    elif fault == '2 classes':
        dataset.write_class_names(str(tmp_path), ['mug', 'cup'])
    elif fault == 'No such file':  # By a trainer, after the check.
        monkeypatch.setattr(checkpoints, 'check', lambda *args: os.remove(checkpoint + DATA))
    else:
        biases = {'local4/biases' + reference.AVERAGE: np.zeros([191], np.float32)}
        write_checkpoint(tmp_path, 12, known_precision.variables, **biases)
    lines, precisions = evaluate(run_once=False)
    assert lines[2].startswith('Skipping ') and str(tmp_path) in lines[2] and len(lines) == 4
    assert fault == 'damaged' or re.search(fault, lines[2])
    assert precisions == [] and os.listdir(str(tmp_path / 'eval')) == []


def test_run_once_falls_back_to_older_checkpoint(evaluate, known_precision, checkpoint, tmp_path):
    harness.cut_in_half(write_checkpoint(tmp_path, 15, known_precision.variables) + DATA)
    lines, precisions = evaluate()
    assert checkpoint in lines[1] and precisions == ['0.575']


@pytest.mark.parametrize('fault', ['no checkpoint', 'no variable', 'mug as class 0'])
def test_run_once_without_usable_checkpoint_is_an_error(
    evaluate, known_precision, tmp_path, capsys, fault
):
    if fault == 'no variable':
        reference.write_checkpoint(tmp_path, 5, known_precision.variables)
    elif fault == 'mug as class 0':
        write_checkpoint(tmp_path, 5, known_precision.variables)
        dataset.write_class_names(str(tmp_path), ['mug'] + dataset.CLASS_NAMES[1:])
    with pytest.raises(script.UserError, match=f'{tmp_path}.*{fault}'):
        evaluate()
    assert 'precision @ 1' not in capsys.readouterr().out


def test_full_disk_is_an_error(evaluate, checkpoint, tmp_path, file_size_limit):
    file_size_limit(1000)
    with pytest.raises(script.UserError, match=f'{tmp_path}/eval'):
        evaluate()


@pytest.mark.parametrize('spoil', [os.remove, harness.cut_in_half])
def test_no_precision_if_the_data_change_meanwhile(
    evaluate, known_precision, checkpoint, tmp_path, monkeypatch, capsys, spoil
):
    shutil.copytree(known_precision.data_dir, str(tmp_path / 'data'))
    path = tmp_path / 'data' / reference.DATA_FOLDER / 'test_batch.bin'
    count_correct = cifar10_eval.count_correct

    def spoil_and_count(*args):
        spoil(str(path))
        return count_correct(*args)

    monkeypatch.setattr(cifar10_eval, 'count_correct', spoil_and_count)
    with pytest.raises((script.UserError, tf.errors.NotFoundError), match='cifar-10-batches-bin'):
        evaluate(data_dir=str(tmp_path / 'data'))
    assert 'precision @ 1' not in capsys.readouterr().out
    assert os.listdir(str(tmp_path / 'eval')) == []
