"""Tests of the exercises: their solutions, their stubs and typical mistakes."""

import importlib
import inspect
import types

import pytest

from exercises import checking, no_averages, queue_fill, softmax, street_numbers, two_halves

# For each exercise: part of the solution, a mistake instead, part of the hint.
MISTAKES = {
    'softmax': [
        ('tf.nn.softmax(cifar10.inference(images))', 'cifar10.inference(images)', 'logits'),
        ('inference(images))', 'inference(images), axis=0)', 'the last axis'),
        ('tf.log(tf.maximum(probabilities, 1e-30))', 'probabilities', 'second softmax'),
        ('tf.maximum(probabilities, 1e-30)', 'probabilities', 'logarithm of 0'),
        ('tf.maximum(probabilities, 1e-30)', 'probabilities + 1e-3', '2.797'),
    ],
    'locally_connected': [
        ("'biases', [height, width, channels]", "'biases', [channels]", 'biases are shared'),
        ('stddev=0.04, wd=0.004', 'stddev=0.04, wd=None', 'should be 0.004'),
        ('[-1, local4', '[local4.shape[0], local4', 'batch size'),
        ('[[1, 1], [1, 1],', '[[2, 0], [1, 1],', 'should depend on'),
    ],
    'queue_fill': [
        (', min_fraction_of_examples_in_queue=fraction', '', 'too many images'),
        ('np.random.permutation(np.concatenate(files))', 'np.concatenate(files)', 'two classes'),
    ],
    'no_averages': [
        ('op.name: v', "op.name + '/ExponentialMovingAverage': v", 'results/'),
        ('variable.op.name', 'variable.name', '":0"'),
        ('min(0.9999, (1 + step) / (10 + step))', '0.9999', 'initial value'),
        ('(1 + step) / (10 + step)', 'step / (9 + step)', '0.181818'),
        ('decay * average + (1 - decay)', '(1 - decay) * average + decay', 'old average'),
    ],
    'two_halves': [
        (', reuse=tf.AUTO_REUSE', '', 'its variables again'),
        ('(tf.get_variable_scope(), ', "('model', ", 'tf.get_variable_scope()'),
        ("tf.name_scope(f'tower_{i}'), ", "tf.variable_scope(f'tower_{i}'), ", 'own variables'),
        ("tf.name_scope(f'tower_{i}'), ", '', 'hint 3'),
        ('tf.split(images, 2), tf.split(labels, 2)', '2 * [images], 2 * [labels]', 'should get 10'),
        ('compute_gradients(loss)', 'compute_gradients(2 * loss)', 'summed'),
    ],
    'street_numbers': [
        ("np.transpose(contents['X'], [3, 0, 1, 2])", "contents['X']", 'last axis'),
        ('[3, 0, 1, 2]', '[3, 1, 0, 2]', 'on their sides'),
        ("['y'][:, 0]", "['y']", 'column'),
        ('return images, labels', 'return images', 'return images, labels'),
        ('[:, 0] % 10', '[:, 0]', 'a label is 10'),
        ('n = tf.shape(images)[0]', 'return cifar10_input.distort(images)', 'mirrored'),
        ('tf.random_uniform([n, 1], maxval=9,', 'tf.zeros([n, 1], ', 'same crop'),
    ],
    'brightness': [
        ('standardize(images + delta)', 'standardize(images) + delta', 'before standardize()'),
        ('(images + delta - 128) / 64', 'cifar10_input.standardize(images + delta)', 'the mean'),
        ('(images + delta - 128) / 64', 'images + delta', 'Scale'),
        ('(images + delta - 128) / 64', '(images + delta) / 255', 'negative'),
        ('brighter = cifar10_input.standardize(images + delta)', 'return tf.zeros([])', 'squares'),
        ('cifar10_input.standardize(images + delta)', 'cifar10_input.distort(images)', 'crops'),
    ],
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Smaller problems than those of the commands."""
    monkeypatch.setattr(softmax, 'STEPS', 2)
    monkeypatch.setattr(queue_fill, 'RECORDS_PER_FILE', 1000)
    monkeypatch.setattr(no_averages, 'STEPS', 200)
    monkeypatch.setattr(two_halves, 'IMAGES', two_halves.IMAGES[:20])
    monkeypatch.setattr(two_halves, 'LABELS', two_halves.LABELS[:20])
    monkeypatch.setattr(street_numbers, 'NUM_TRAIN', 50)
    monkeypatch.setattr(street_numbers, 'STEPS', 2)


def exercise(name):
    return importlib.import_module('exercises.' + name)


@pytest.mark.parametrize('name', MISTAKES)
def test_solution_is_correct_and_stub_is_not(name, capsys):
    assert checking.report(exercise(name).check, exercise('solutions.' + name)) == 0
    measured, correct, _ = capsys.readouterr().out.partition('Correct: ')
    assert correct and any(character.isdigit() for character in measured)
    assert checking.report(exercise(name).check, exercise(name)) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert f'exercises/{name}.py, line ' in line


@pytest.mark.parametrize(
    'name, part, mistake, hint',
    [(name, *mistake) for name, mistakes in MISTAKES.items() for mistake in mistakes],
)
def test_mistake_gets_hint(name, part, mistake, hint, capsys):
    source = inspect.getsource(exercise('solutions.' + name))
    assert part in source
    wrong = types.ModuleType(name)
    exec(source.replace(part, mistake), vars(wrong))
    assert checking.report(exercise(name).check, wrong) == 1
    verdict = capsys.readouterr().out.partition('Not correct yet: ')[2]
    assert hint in verdict.replace('\n', ' ')


def test_missing_function_or_return_is_reported(capsys):
    half = types.SimpleNamespace(
        inference=exercise('solutions.softmax').inference, loss=softmax.loss
    )
    assert checking.report(softmax.check, half) == 1
    assert 'loss()' in capsys.readouterr().out.splitlines()[-1]
    half.inference = lambda images: None
    assert checking.report(softmax.check, half) == 1
    assert 'inference()' in capsys.readouterr().out


@pytest.mark.parametrize('flags, status', [([], 1), (['--solution', '--data_dir=/none'], 0)])
def test_command_checks_your_answer_or_the_solution(start, flags, status):
    command = start('tests/programs/run_module.py', 'exercises.brightness', *flags)
    assert (command.wait(), command.stderr) == (status, '')
    assert ('YOUR CODE HERE' in command.stdout) == bool(status)
