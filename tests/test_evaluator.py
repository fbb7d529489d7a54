"""Tests of cifar10_eval.py: the figure that it prints, and when it prints none."""

import collections
import os
import re
import shutil

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import cifar10_eval
from support import script
from tests import events
from tests import harness
from tests import reference

FLAGS = tf.flags.FLAGS
PRECISION = re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: precision @ 1 = (\d\.\d{3})$')


@pytest.fixture
def evaluate(known, tmp_path, capsys):
    """Function that evaluates the checkpoints in tmp_path, with these flags, in this process.

    It returns the lines of output and the precisions in them.
    """

    def run(**flags):
        defaults = dict(
            data_dir=known.data_dir,
            checkpoint_dir=str(tmp_path),
            eval_dir=str(tmp_path / 'eval'),
            batch_size=16,
            run_once=True,
        )
        for name, value in dict(defaults, **flags).items():
            setattr(FLAGS, name, value)
        cifar10_eval.main()
        lines = capsys.readouterr().out.splitlines()
        return lines, [match.group(1) for match in map(PRECISION.match, lines) if match]

    return run


def write_checkpoint(folder, step, averages, **changes):
    """Writes a checkpoint whose variables are all 0. Returns its path."""
    variables = {name: np.zeros(shape, np.float32) for name, (shape, _) in reference.MODEL.items()}
    values = reference.checkpoint_values(step, variables, averages)
    values.update(changes)
    return reference.write_checkpoint(folder, step, values)


def finish(folder, step):
    """Leaves a folder as a trainer does that has reached its last step."""
    (folder / 'checkpoint').write_text(f'model_checkpoint_path: "model.ckpt-{step}"\n')
    (folder / 'finished').write_text(f'{step}\n')


def steps_with_precision(eval_dir):
    return [
        step
        for session in events.sessions(eval_dir)
        for step, _ in events.curve(session, 'Precision @ 1')
    ]


# --- The figure --------------------------------------------------------------


@pytest.mark.parametrize('batch_size', [1, 7, 16, 128])
def test_precision_is_that_of_the_averages_and_each_image_counts_once(
    evaluate, known, tmp_path, batch_size
):
    path = write_checkpoint(tmp_path, 12, known.variables)
    lines, precisions = evaluate(batch_size=batch_size)
    assert precisions == ['0.575']  # 23 of 40.
    assert lines[1:-1] == [f'Evaluating {path} on 40 images.']


def test_with_a_flag_it_is_that_of_the_variables_and_a_tie_of_all_classes_is_no_hit(
    evaluate, known, tmp_path
):
    write_checkpoint(tmp_path, 12, known.variables)
    _, precisions = evaluate(use_moving_averages=False)
    assert precisions == [f'{known.zeros / 40:.3f}']


def test_num_examples_limits_how_many_images_count(evaluate, known, tmp_path):
    path = write_checkpoint(tmp_path, 12, known.variables)
    lines, precisions = evaluate(num_examples=19)
    assert lines[1] == f'Evaluating {path} on 19 of 40 images.'
    # 17 of the 40 are wrong. The threads decide on which 19 come first.
    assert precisions[0] in [f'{right / 19:.3f}' for right in range(2, 20)]


def test_train_eval_takes_the_training_set(evaluate, known, tmp_path):
    path = write_checkpoint(tmp_path, 12, known.variables)
    lines, precisions = evaluate(eval_data='train_eval')
    assert lines[1] == f'Evaluating {path} on 300 images.'
    assert precisions == ['0.400']


def test_the_precision_of_a_trained_network_is_numpys(life):
    values = reference.read_checkpoint(f'{life.train_dir}/model.ckpt-{life.finished_at}')
    averages = {name: values[name + reference.AVERAGE] for name in reference.MODEL}
    logits = reference.evaluation_logits(averages, reference.rectangle_images(340)[:40])
    labels = np.random.RandomState(8).randint(0, 10, 340)[:40]  # As in data_dir.
    ranked = np.sort(logits, axis=1)
    doubtful = np.count_nonzero(ranked[:, -1] - ranked[:, -2] < 1e-5)
    printed = float(re.findall('precision @ 1 = (.*)', life.evaluator.stdout)[-1])
    assert doubtful < 4
    assert abs(printed - np.mean(logits.argmax(axis=1) == labels)) <= doubtful / 40 + 0.0006


def test_a_checkpoint_of_another_copy_of_the_tutorial_is_evaluated(evaluate, known, tmp_path):
    values = reference.checkpoint_values(7, {}, known.variables)
    values['global_step'] = np.float32(7)
    values['conv1/weight_loss/avg'] = np.float32(1)
    reference.write_checkpoint(tmp_path, 7, values)
    (tmp_path / 'checkpoint').write_text('model_checkpoint_path: "/gone/model.ckpt-7"\n')
    _, precisions = evaluate()
    assert precisions == ['0.575']
    assert steps_with_precision(tmp_path / 'eval') == [7]


# --- Ten views ---------------------------------------------------------------


Viewed = collections.namedtuple('Viewed', 'data_dir averages variables precision')


@pytest.fixture(scope='module')
def viewed(tmp_path_factory):
    """10 images for the test and 50 for training, and NumPy's precisions; no two are equal."""
    images = reference.rectangle_images(10)
    averages, variables = (reference.random_variables(i, local3=3, local4=3) for i in (1, 2))
    of_averages, of_variables = (
        reference.probabilities(each, images, 10) for each in (averages, variables)
    )
    for probabilities in of_averages, of_variables:
        ranked = np.sort(probabilities, axis=1)
        assert (ranked[:, -1] - ranked[:, -2] > 1e-4).all(), 'too close a race for float32'
    predicted = of_averages.argmax(axis=1)
    labels = np.tile(predicted, 6)
    labels[[2, 5, 9]] += 1
    labels[10:30] += 1
    labels %= 10
    precision = {
        'averages': 0.7,
        'variables': np.mean(of_variables.argmax(axis=1) == labels[:10]),
        'train_eval': 0.6,
        'one view': np.mean(
            reference.evaluation_logits(averages, images).argmax(axis=1) == labels[:10]
        ),
    }
    assert len(set(precision.values())) == 4, 'too dull a network for a test'
    folder = str(tmp_path_factory.mktemp('viewed'))
    reference.write_data(folder, np.tile(images, [6, 1, 1, 1]), labels, test_images=10)
    return Viewed(folder, averages, variables, precision)


@pytest.mark.parametrize(
    'of, flags',
    [
        ('averages', {}),
        ('variables', {'use_moving_averages': False}),
        ('train_eval', {'eval_data': 'train_eval'}),
    ],
)
def test_the_precision_of_ten_views_is_numpys_and_has_a_tag_of_its_own(
    evaluate, viewed, tmp_path, of, flags
):
    values = reference.checkpoint_values(12, viewed.variables, viewed.averages)
    path = reference.write_checkpoint(tmp_path, 12, values)
    lines, of_one_view = evaluate(data_dir=viewed.data_dir, views='10', **flags)
    assert of_one_view == []
    n = 50 if of == 'train_eval' else 10
    assert lines[1] == f'Evaluating {path} on {n} images (10 views).'
    assert lines[2].endswith(f': precision @ 1 = {viewed.precision[of]:.3f} (10 views)')
    (session,) = events.sessions(tmp_path / 'eval')
    tags = [tag for tag in events.kinds(session) if 'recision' in tag]
    assert tags == ['Precision @ 1 (10 views)']
    assert events.curve(session, tags[0]) == [(12, pytest.approx(viewed.precision[of]))]


def test_with_one_view_text_and_tag_are_what_they_were(evaluate, viewed, tmp_path):
    path = write_checkpoint(tmp_path, 12, viewed.averages)
    lines, precisions = evaluate(data_dir=viewed.data_dir, views='1')
    assert lines[1] == f'Evaluating {path} on 10 images.'
    assert precisions == [f'{viewed.precision["one view"]:.3f}']
    (session,) = events.sessions(tmp_path / 'eval')
    assert [tag for tag in events.kinds(session) if 'recision' in tag] == ['Precision @ 1']


# --- Beside a trainer --------------------------------------------------------


def test_it_waits_evaluates_each_checkpoint_once_and_ends_with_the_training(life):
    assert life.evaluator.status() == 0
    assert life.evaluator.errors == []
    lines = life.evaluator.lines
    assert lines[1] == f'Evaluating checkpoints in {life.train_dir} as they come.'
    assert lines[2:-1:2] == [
        f'Evaluating {life.train_dir}/model.ckpt-{step} on 40 images.'
        for step in (0, life.resumed_at, life.finished_at)
    ]
    assert [line for line in lines[3:-1:2] if not PRECISION.match(line)] == []
    assert lines[-1] == (
        f'Training finished at step {life.finished_at}; no newer checkpoint will come.'
    )


def test_started_after_the_training_it_evaluates_the_last_checkpoint_and_ends_at_once(
    start, life, data_dir, tmp_path
):
    evaluator = start(
        harness.EVAL,
        f'--data_dir={data_dir}',
        f'--checkpoint_dir={life.train_dir}',
        f'--eval_dir={tmp_path}',
    )
    evaluator.wait_for('precision')
    assert evaluator.wait(harness.AT_ONCE) == 0
    assert evaluator.stdout.count('precision') == 1
    assert steps_with_precision(tmp_path) == [life.finished_at]


# --- No figure ---------------------------------------------------------------


def flip_bytes(path):
    with open(path + '.data-00000-of-00001', 'r+b') as file:
        file.seek(2000000)
        file.write(b'damage' * 100)


def cut_short(path):
    os.truncate(path + '.data-00000-of-00001', 1000)


def remove_data(path):
    os.remove(path + '.data-00000-of-00001')


def empty_index(path):
    os.truncate(path + '.index', 0)


DAMAGES = [flip_bytes, cut_short, remove_data, empty_index]


def assert_skipped(lines, path, reason):
    skipping, finished = lines[2:]
    assert re.match(f'Skipping {re.escape(path)}: .*{reason}', skipping)
    assert finished.startswith('Training finished at step 5;')


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(evaluate, known, tmp_path, damage):
    path = write_checkpoint(tmp_path, 5, known.variables)
    damage(path)
    finish(tmp_path, 5)
    lines, precisions = evaluate(run_once=False)
    assert_skipped(lines, path, '.')
    assert precisions == steps_with_precision(tmp_path / 'eval') == []


@pytest.mark.parametrize(
    'value, reason',
    [
        (np.full([192], np.nan, np.float32), 'is not finite'),
        (np.zeros([191], np.float32), r'.*\[191\].*\[192\]'),
        (np.zeros([192], np.float64), 'float64.*float32'),
        (None, ''),
    ],
    ids=['NaN', 'shape', 'type', 'missing'],
)
def test_a_checkpoint_of_no_use_is_skipped_with_the_name_of_the_variable(
    evaluate, known, tmp_path, value, reason
):
    name = 'local4/biases' + reference.AVERAGE
    values = reference.checkpoint_values(5, {}, dict(known.variables))
    del values[name]
    if value is not None:
        values[name] = value
    path = reference.write_checkpoint(tmp_path, 5, values)
    finish(tmp_path, 5)
    lines, precisions = evaluate(run_once=False)
    assert_skipped(lines, path, f'{name}.*{reason}')
    assert precisions == steps_with_precision(tmp_path / 'eval') == []


def test_run_once_passes_over_a_damaged_checkpoint_to_the_one_before(evaluate, known, tmp_path):
    good, damaged = (write_checkpoint(tmp_path, step, known.variables) for step in (3, 5))
    flip_bytes(damaged)
    lines, precisions = evaluate()
    assert lines[1] == f'Evaluating {good} on 40 images.'
    assert precisions == ['0.575']


def test_run_once_with_a_checkpoint_of_another_model_is_an_error(evaluate, known, tmp_path, capsys):
    path = reference.write_checkpoint(tmp_path, 5, known.variables)
    with pytest.raises(script.UserError, match=f'{path}.*conv1/biases{reference.AVERAGE}'):
        evaluate()
    assert 'precision' not in capsys.readouterr().out


def test_run_once_without_a_checkpoint_ends_with_one_line_and_status_1(start, known, tmp_path):
    evaluator = start(
        harness.EVAL,
        f'--data_dir={known.data_dir}',
        f'--checkpoint_dir={tmp_path}',
        f'--eval_dir={tmp_path}/eval',
        '--run_once',
    )
    assert evaluator.wait() == 1
    assert len(evaluator.errors) == 1
    assert re.search(f'no checkpoint in {tmp_path}', evaluator.errors[0])


# The images have been counted by then, and none has been read.
_BREAK_INPUT = '''
import os
from support import checkpoints
misfit = checkpoints.misfit
def break_input(*args):
    %s
    return misfit(*args)
checkpoints.misfit = break_input
'''


@pytest.mark.parametrize(
    'fault, named',
    [
        ('os.remove(%r)', 'test_batch.bin; No such file'),
        ('os.truncate(%r, 20 * 3073)', 'only 20 of 40 images could be read'),
    ],
    ids=['removed', 'cut short'],
)
def test_where_the_input_fails_or_ends_early_there_is_no_figure(
    start, known, tmp_path, fault, named
):
    shutil.copytree(known.data_dir, str(tmp_path / 'data'))
    write_checkpoint(tmp_path, 12, known.variables)
    path = str(tmp_path / 'data' / reference.DATA_FOLDER / 'test_batch.bin')
    evaluator = start(
        harness.EVAL,
        f'--data_dir={tmp_path}/data',
        f'--checkpoint_dir={tmp_path}',
        f'--eval_dir={tmp_path}/eval',
        '--run_once',
        before=_BREAK_INPUT % (fault % path),
    )
    assert evaluator.wait() == 1
    assert named in evaluator.stderr
    assert 'precision @ 1' not in evaluator.stdout
    assert steps_with_precision(tmp_path / 'eval') == []
