"""Tests of the experiments, on small data."""

import os
import re

from absl.testing import flagsaver
import numpy as np
import pytest

import cifar10_input
from experiments import cuda_convnet, faster
from support.compat import tf
from tests import reference


@pytest.mark.parametrize(
    'command, first_loss, variable, shape',
    [
        ('cuda_convnet.py --four_files_first', 5.49, 'fc10/weights/Momentum', [1152, 10]),
        ('faster.py --num_gpus=2', 2.3, 'local3/weights' + reference.AVERAGE, [2304, 384]),
    ],
)
def test_experiment_trains_and_evaluates(
    start, data_dir, tmp_path, command, first_loss, variable, shape
):
    flags = f'--data_dir={data_dir}', f'--train_dir={tmp_path}', '--batch_size=8', '--max_steps=2'
    name, *own = command.split()
    script = start('experiments/' + name, *flags, *own)
    assert script.wait() == 0, script.stdout + script.stderr
    found = float(re.search(r': step 0, loss = (\S+)', script.stdout).group(1))
    assert found == pytest.approx(first_loss, abs=0.1)
    assert script.stdout.count('precision @ 1 = ') == 2 and '10 views' in script.stdout
    values = reference.read_checkpoint(f'{tmp_path}/model.ckpt-2')
    assert list(values[variable].shape) == shape


def evaluate(*tensors):
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        return session.run(tensors[0] if len(tensors) == 1 else tensors)


@pytest.mark.parametrize(
    'net, parameters, first_loss', [('13pct', 1116490, 5.49), ('11pct', 2112970, 8.68)]
)
def test_cuda_convnet_size_and_first_loss(net, parameters, first_loss):
    images = np.random.RandomState(1).uniform(-120, 120, [4, 24, 24, 3]).astype(np.float32)
    with flagsaver.flagsaver(net=net):
        loss = cuda_convnet.loss(cuda_convnet.inference(tf.constant(images)), tf.range(4))
    variables = tf.trainable_variables()
    assert sum(variable.shape.num_elements() for variable in variables) == parameters
    loss, values = evaluate(loss, {variable.op.name: variable for variable in variables})
    assert loss == pytest.approx(first_loss, abs=0.02)  # Most of it is weight decay.
    for layer, stddev in ('conv1', 0.0001), ('conv2', 0.01):
        assert values[layer + '/weights'].std() == pytest.approx(stddev, rel=0.05)


def test_cuda_convnet_locally_connected_layer_matches_numpy():
    shapes = [2, 3, 4, 5], [3, 4, 9 * 5, 7], [3, 4, 7]
    random = np.random.RandomState(3)
    images, *values = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    output = cuda_convnet.locally_connected('local', tf.constant(images), 7)
    with tf.Session() as session:
        for variable, value in zip(tf.trainable_variables(), values):
            variable.load(value, session)
        found = session.run(output)
    weights, biases = values
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], 'constant')
    for y, x in np.ndindex(3, 4):
        window = padded[:, y : y + 3, x : x + 3].reshape(2, 45)
        expected = np.maximum(window @ weights[y, x] + biases[y, x], 0)
        np.testing.assert_allclose(found[:, y, x], expected, rtol=1e-4, atol=1e-4)


def test_cuda_convnet_update_matches_numpy():
    """Four steps with known gradients. The rate of the weights drops after the second and third."""
    random = np.random.RandomState(4)
    start, gradients = random.normal(size=[2, 3]), random.normal(size=[4, 2, 3])
    variables = [
        tf.get_variable(name, initializer=start[i].astype(np.float32))
        for i, name in enumerate(['local3/weights', 'local3/biases'])
    ]
    gradient = tf.placeholder(tf.float32, [2, 3])
    loss = tf.reduce_sum(gradient * tf.stack(variables))
    step = tf.train.get_or_create_global_step()
    steps_before = [0, 1, 46876, 50782]
    with flagsaver.flagsaver(max_steps=54688):
        optimizer = cuda_convnet.optimizer(step, 128)
        pairs = optimizer.compute_gradients(loss)
        train = cuda_convnet.apply_gradients(optimizer, pairs, loss, step)
    expected, change = start.copy(), np.zeros([2, 3])
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for before, value, rate in zip(steps_before, gradients, [0.001, 0.001, 0.0001, 0.00001]):
            step.load(before, session)
            session.run(train, {gradient: value})
            change = 0.9 * change - np.array([[rate], [0.002]]) * value
            expected += change
        assert session.run(step) == steps_before[-1] + 1
        np.testing.assert_allclose(session.run(variables), expected, atol=1e-6)


def raw_images(data_dir, eval_data):
    """The images in the files, [n, 32, 32, 3] float64."""
    files = cifar10_input.data_files(eval_data, f'{data_dir}/cifar-10-batches-bin')
    records = np.concatenate([np.fromfile(path, np.uint8) for path in files]).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).astype(float)


def test_cuda_convnet_inputs_are_crops_minus_the_mean_image(data_dir):
    mean = raw_images(data_dir, eval_data=False).mean(axis=0)[4:28, 4:28]
    with flagsaver.flagsaver(data_dir=data_dir, batch_size=400):
        images, _ = cuda_convnet.inputs(True, num_epochs=1, num_views=10)
    with tf.train.SingularMonitoredSession() as session:
        found = session.run(images).reshape(40, 10, -1)
    raw = raw_images(data_dir, eval_data=True)
    # The order of the images is up to the threads. View 9 is the mirrored lower right corner.
    for view, crop in (0, raw[:, 4:28, 4:28]), (9, raw[:, 8:, 8:][:, :, ::-1]):
        expected = (crop - mean).reshape(40, -1)
        in_order = [values[np.lexsort(values.round(2).T)] for values in (found[:, view], expected)]
        np.testing.assert_allclose(*in_order, atol=1e-3)


def test_cuda_convnet_four_files_first(data_dir):
    step = tf.train.get_or_create_global_step()
    with flagsaver.flagsaver(data_dir=data_dir, four_files_first=True):
        files = cuda_convnet.training_files()
    with tf.Session() as session:
        for value, expected in (0, 4), (31249, 4), (31250, 5):
            step.load(value, session)
            names = [os.path.basename(path.decode()) for path in session.run(files)]
            assert names == [f'data_batch_{i + 1}.bin' for i in range(expected)]


def test_faster_orthogonalize_singular_values():
    random = np.random.RandomState(4).normal(size=(75, 40))
    left, _, right = np.linalg.svd(random, full_matrices=False)
    before = np.geomspace(0.02, 0.6, 40)
    before[0] = 1e-3  # Too small.
    before /= np.linalg.norm(before)
    matrix = left @ np.diag(before) @ right
    found = evaluate(faster.orthogonalize(tf.constant(matrix, tf.float32)))
    after = np.diag(left.T @ found @ right.T)
    inside = before > 0.018
    assert 5 < inside.sum() < 40
    assert 0.67 < after[inside].min() and after[inside].max() < 1.21
    assert after[0] / before[0] == pytest.approx(40, rel=0.05)
    # The singular vectors do not change.
    np.testing.assert_allclose(left @ np.diag(after) @ right, found, atol=1e-3)


def test_faster_muon_update_matches_numpy():
    """Two steps with different gradients. Only the step of hidden weights is orthogonalized."""
    random = np.random.RandomState(5)
    names = 'local3/weights', 'local3/biases', 'softmax_linear/weights'
    start, first, second = random.normal(size=[3, 3, 6, 4]).astype(np.float32)
    variables = [
        tf.get_variable(name, initializer=value, use_resource=True)
        for name, value in zip(names, start)
    ]
    gradients = tf.placeholder(tf.float32, [3, 6, 4])
    optimizer = faster.Muon(0.5, faster.MOMENTUM, use_nesterov=True)
    train = optimizer.apply_gradients(zip(tf.unstack(gradients), variables))
    matrix = tf.placeholder(tf.float32, [6, 4])
    orthogonal = faster.orthogonalize(matrix) * 1.5**0.5  # 6 rows, 4 columns.
    expected, momentum = start.copy(), np.zeros_like(start)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for gradient in first, second:
            session.run(train, {gradients: gradient})
            momentum = faster.MOMENTUM * momentum + gradient
            step = gradient + faster.MOMENTUM * momentum
            hidden_step = session.run(orthogonal, {matrix: step[0]})
            step[0] = faster.HIDDEN_RATE * hidden_step + faster.DECAY * expected[0]
            expected -= 0.5 * step
        found = session.run(variables)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_faster_learning_rate_rises_and_falls():
    with flagsaver.flagsaver(max_steps=1000):
        rates = evaluate(*[faster.learning_rate(tf.constant(n)) for n in (0, 49, 50, 525, 999)])
    assert rates == pytest.approx([0.0002, 0.01, 0.01, 0.005, 1e-5 / 0.95], rel=1e-3)


def test_faster_mix_matches_numpy():
    values = np.random.RandomState(6).normal(size=[3, 2, 4, 1]).astype(np.float32)
    found, numbers = evaluate(
        faster.mix(tf.constant(values)), faster.mix(tf.one_hot([0, 1, 2, 3, 4], 5))
    )
    first, second, third = values
    np.testing.assert_allclose(found, [first, second, (first + third) / 2], rtol=1e-5)
    part = 0.75**4 / 2  # Of the second to last.
    np.testing.assert_allclose(numbers[3], [0, part, 0, 1 - part, 0], rtol=1e-5)


def test_faster_loss_matches_numpy():
    logits = np.array([[3, 1, 0], [0, -2, 5]], np.float32)
    logarithms = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = 0.9 * np.array([[1, 0, 0], [0.5, 0.5, 0]]) + 0.1 / 3
    found = evaluate(faster.loss(tf.constant(logits), tf.constant([0, 1])))
    assert found == pytest.approx(-(targets * logarithms).sum(1).mean(), rel=1e-5)
