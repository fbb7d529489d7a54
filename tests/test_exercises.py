"""Tests of the exercises: each in its quick form, on small data."""

import json
import os
import re

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_input
from exercises import locally_connected, softmax
from tests import harness
from tests import reference


@pytest.fixture
def exercise(start, data_dir):
    """Function that runs an exercise to its end and returns what it says."""

    def run(name, *flags):
        common = [f'--data_dir={data_dir}', '--batch_size=8']
        script = start(f'exercises/{name}.py', *common, *flags)
        assert script.wait() == 0, script.stdout + script.stderr
        return script.stdout

    return run


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


def test_softmax_changes_neither_precision_nor_gradients(exercise):
    said = exercise('softmax')
    precisions = numbers(r'precision (\S+)', said)
    assert len(precisions) == 2 and precisions[0] == precisions[1]
    assert numbers(r'first loss (\S+)', said) == pytest.approx([4.68, 4.68], abs=0.02)
    assert numbers(r'gradients differ by (\S+)', said)[0] < 1e-4
    fused, adapted = re.findall(r'ahead by 200: loss (\S+), gradient (\S+)', said)
    assert fused == ('200.0', '-1.0') and adapted[0] == 'inf'


def test_softmax_is_applied_once_to_what_is_predicted(monkeypatch):
    images = tf.constant(np.random.RandomState(2).normal(size=[3, 10, 24, 24, 3]), tf.float32)
    with tf.variable_scope('', reuse=tf.AUTO_REUSE):
        expected = cifar10.probabilities(images, 10, 10)
        monkeypatch.setattr(cifar10, 'inference', softmax.inference)
        found = softmax.probabilities(images, 10, 10)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        found, expected = session.run([found, expected])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.ptp(expected) > 0.01  # A second softmax would make them all alike.


def test_locally_connected_layers_are_those_of_cuda_convnet(exercise, tmp_path):
    said = exercise('locally_connected', '--max_steps=2', f'--train_dir={tmp_path}')
    # The decay is the same each time; the cross entropy is that of eight images.
    assert numbers(r': step 0, loss = (\S+)', said) == pytest.approx([7.24], abs=0.2)
    assert re.search(r'precision @ 1 of \S+-2: 0\.\d{4}$', said, re.MULTILINE)
    values = reference.read_checkpoint(f'{tmp_path}/model.ckpt-2')
    model = {name: value for name, value in values.items() if name.endswith(('weights', 'biases'))}
    assert sum(value.size for value in model.values()) == 2112970
    assert model['local4/biases'].shape == (6, 6, 32)


def test_a_locally_connected_layer_has_filters_of_each_positions_own():
    random = np.random.RandomState(3)
    maps, weights, biases = (
        random.normal(size=shape).astype(np.float32)
        for shape in ([2, 3, 4, 5], [3, 4, 9 * 5, 7], [3, 4, 7])
    )
    output = locally_connected.locally_connected('local', tf.constant(maps), 7)
    with tf.Session() as session:
        for variable, value in zip(tf.trainable_variables(), (weights, biases)):
            variable.load(value, session)
        found = session.run(output)
    padded = np.pad(maps, [(0, 0), (1, 1), (1, 1), (0, 0)], 'constant')
    for y in range(3):
        for x in range(4):
            window = padded[:, y : y + 3, x : x + 3].reshape(2, 45)
            expected = np.maximum(window @ weights[y, x] + biases[y, x], 0)
            np.testing.assert_allclose(found[:, y, x], expected, rtol=1e-4, atol=1e-4)


def test_queue_fill_draws_what_a_batch_is_made_of(exercise, tmp_path):
    pytest.importorskip('matplotlib')
    said = exercise('queue_fill', f'--picture={tmp_path}/classes.png')
    fractions, shares = numbers(r'(0\.\d+): first', said), numbers(r'makes (\d+)%', said)
    assert fractions == [0.4, 0.05, 0.005] and len(shares) == 3
    assert os.path.getsize(tmp_path / 'classes.png') > 5000


def test_queue_fill_sorts_all_records_by_class(data_dir, tmp_path):
    pytest.importorskip('matplotlib')
    from exercises import queue_fill

    def records(folder):
        data = [np.fromfile(path, np.uint8) for path in cifar10_input.data_files(False, folder)]
        return np.concatenate(data).reshape(-1, cifar10_input.RECORD_BYTES)

    source = f'{data_dir}/cifar-10-batches-bin'
    queue_fill.write_sorted(source, str(tmp_path))
    before, after = records(source), records(tmp_path)
    assert (np.diff(before[:, 0].astype(int)) < 0).any()
    assert (np.diff(after[:, 0].astype(int)) >= 0).all()
    assert sorted(map(bytes, before)) == sorted(map(bytes, after))


def test_no_averages_compares_five_checkpoints(exercise, tmp_path):
    pytest.importorskip('matplotlib')
    folders = f'--train_dir={tmp_path}/train', f'--picture={tmp_path}/averages.png'
    said = exercise('no_averages', '--max_steps=10', *folders)
    assert numbers(r'\n(\d+)\s+0\.\d+\s+0\.\d+', said) == [2, 4, 6, 8, 10]
    assert os.path.getsize(tmp_path / 'averages.png') > 5000
    assert harness.saved_steps(tmp_path / 'train')[-1] == 10


def test_two_halves_make_the_step_of_a_whole(exercise, tmp_path):
    said = exercise('two_halves', '--rounds=1', f'--trace={tmp_path}/trace')
    assert numbers(r'gradients differ by (\S+)', said)[0] < 1e-4
    rates = numbers(r'x \d+: (\d+) images/s', said)
    assert len(rates) == 2 and min(rates) > 0
    for towers in 1, 2:
        events = json.loads(harness.read(f'{tmp_path}/trace-{towers}.json'))['traceEvents']
        assert any('Conv2D' in event['name'] for event in events)


def test_street_numbers_takes_svhns_files_and_trains_three_times(start, exercise, tmp_path):
    scipy_io = pytest.importorskip('scipy.io')
    source = tmp_path / 'svhn'
    source.mkdir()
    for name, number in ('train', 60), ('test', 20):
        images = np.random.RandomState(number).randint(0, 256, [32, 32, 3, number], np.uint8)
        labels = np.arange(1, number + 1)[:, np.newaxis] % 10 + 1
        scipy_io.savemat(str(source / f'{name}_32x32.mat'), {'X': images, 'y': labels})
    folder = f'--data_dir={tmp_path}/data'
    assert start('cifar10_convert.py', str(source), folder).wait() == 0
    said = exercise('street_numbers', folder, '--max_steps=1')
    assert len(numbers(r': precision @ 1 = (\S+)', said)) == 3
    values = reference.read_checkpoint(f'{tmp_path}/data/another_network/model.ckpt-1')
    assert 'conv3/weights' in values


def test_street_numbers_writes_digits_as_svhn_does(tmp_path):
    scipy_io = pytest.importorskip('scipy.io')
    datasets = pytest.importorskip('sklearn.datasets')
    from exercises import street_numbers

    street_numbers.write_digits(str(tmp_path))
    digits = datasets.load_digits()
    train, test = (scipy_io.loadmat(f'{tmp_path}/{name}_32x32.mat') for name in ('train', 'test'))
    assert train['X'].shape == (32, 32, 3, 1497) and test['X'].shape == (32, 32, 3, 300)
    # One in six is for the test, the first to begin with; a zero is a 10.
    assert digits.target[0] == 0 and test['y'][0] == 10
    np.testing.assert_array_equal(test['y'][:, 0] % 10, digits.target[::6])
    np.testing.assert_array_equal(train['y'][:5, 0], digits.target[1:6])
    pixels = test['X'][::4, ::4, 1, 7] * (16 / 255)
    np.testing.assert_allclose(pixels, digits.images[42], atol=0.07)
