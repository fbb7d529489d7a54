"""Tests of what the tutorial computes, in the order in which data flows through it.

    python -m pytest cifar10_test.py         or        python cifar10_test.py

A network can be wrong and still learn something, so a falling loss proves little. These tests
compare each part with an independent result:

    NumPy                    records, standardization, layers, loss, predictions
    finite differences       gradients
    a formula                learning rate, moving averages, the loss of the first step
    a second computation     two towers, and one tower with a batch of twice the size
    counts and statistics    random crops, shuffling, initial weights
    marked data              images whose number can be read after any distortion

Limits on random numbers are at least five standard deviations wide. The tests write the small files
that they read; tests/reference.py has the functions for that, and the network in NumPy.
"""

import collections
import contextlib
import inspect
import os
import sys
import types

# The results should be the same on every machine, whatever GPU it has.
os.environ['CUDA_VISIBLE_DEVICES'] = '-1'

from absl.testing import flagsaver
import numpy as np
import pytest

import cifar10
import cifar10_eval
import cifar10_input
import cifar10_multi_gpu_train
import cifar10_train
from support import checkpoints, devices, views
from support.compat import tf
from tests import reference

FLAGS = cifar10.FLAGS
FLAGS(sys.argv[:1])

both_trainers = pytest.mark.parametrize(
    'trainer, num_gpus',
    [(cifar10_train, 1), (cifar10_multi_gpu_train, 2)],
    ids=['one device', 'two towers'],
)


@pytest.fixture(autouse=True)
def fresh_graph_and_flags():
    """Gives each test a new graph and restores the flags that it sets."""
    with flagsaver.flagsaver(), tf.Graph().as_default():
        yield


@pytest.fixture
def folder(tmp_path):
    """The empty folder of the .bin files in --data_dir."""
    FLAGS.data_dir = str(tmp_path)
    path = tmp_path / reference.DATA_FOLDER
    path.mkdir()
    return path


@contextlib.contextmanager
def initialized(use_fp16=False):
    """A session with initial variables and empty queues."""
    config = devices.session_config(use_fp16)
    config.operation_timeout_in_ms = 100000  # An error instead of a test that waits forever.
    with tf.Session(config=config) as session:
        session.run(tf.global_variables_initializer())
        yield session


@contextlib.contextmanager
def running():
    """A session with initial variables and running threads that fill the queues."""
    with initialized() as session:
        session.run(tf.local_variables_initializer())  # The epochs of inputs(num_epochs=1).
        coordinator = tf.train.Coordinator()
        threads = tf.train.start_queue_runners(session, coordinator)
        try:
            yield session
        finally:
            coordinator.request_stop()
            coordinator.join(threads, stop_grace_period_secs=30)


def evaluate(tensors):
    with tf.Session() as session:
        return session.run(tensors)


def is_uniform(values, low, high):
    """Are the values spread evenly over all of [low, high], with none outside?"""
    count, _ = np.histogram(values, 8, (low, high))
    expected, margin = len(values) / 8, (high - low) / 100
    even = np.all(abs(count - expected) < 6 * expected**0.5)
    from_end_to_end = min(values) < low + margin and max(values) > high - margin
    return even and from_end_to_end and count.sum() == len(values)


# --- The modules -------------------------------------------------------------


def test_constants_match_tutorial():
    assert cifar10_input.IMAGE_SIZE == cifar10.IMAGE_SIZE == 24
    assert cifar10_input.NUM_CLASSES == cifar10.NUM_CLASSES == 10
    for module in cifar10_input, cifar10:
        assert module.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN == 50000
        assert module.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL == 10000
    assert (cifar10.MOVING_AVERAGE_DECAY, cifar10.NUM_EPOCHS_PER_DECAY) == (0.9999, 350)
    assert (cifar10.LEARNING_RATE_DECAY_FACTOR, cifar10.INITIAL_LEARNING_RATE) == (0.1, 0.1)
    assert cifar10.TOWER_NAME == 'tower'
    assert cifar10.DATA_URL == 'http://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'


def test_functions_take_classic_arguments():
    for function, arguments in [
        (cifar10_input.read_cifar10, ['filename_queue']),
        (cifar10_input.distorted_inputs, ['data_dir', 'batch_size']),
        (cifar10_input.inputs, ['eval_data', 'data_dir', 'batch_size']),
        (cifar10.maybe_download_and_extract, []),
        (cifar10.distorted_inputs, []),
        (cifar10.inputs, ['eval_data']),
        (cifar10.inference, ['images']),
        (cifar10.loss, ['logits', 'labels']),
        (cifar10.train, ['total_loss', 'global_step']),
        (cifar10._variable_on_cpu, ['name', 'shape', 'initializer']),
        (cifar10._variable_with_weight_decay, ['name', 'shape', 'stddev', 'wd']),
        (cifar10._activation_summary, ['x']),
        (cifar10_train.train, []),
        (cifar10_multi_gpu_train.train, []),
        (cifar10_multi_gpu_train.average_gradients, ['tower_grads']),
        (cifar10_eval.evaluate, []),
    ]:
        parameters = inspect.signature(function).parameters.values()
        assert [each.name for each in parameters if each.default is each.empty] == arguments


def test_flags_have_classic_defaults():
    defaults = {
        'batch_size': 128,
        'data_dir': '/tmp/cifar10_data',
        'use_fp16': False,
        'train_dir': '/tmp/cifar10_train',
        'max_steps': 1000000,
        'log_device_placement': False,
        'log_frequency': 10,
        'num_gpus': 1,
        'eval_dir': '/tmp/cifar10_eval',
        'eval_data': 'test',
        'checkpoint_dir': '/tmp/cifar10_train',
        'eval_interval_secs': 300,
        'num_examples': 10000,
        'run_once': False,
    }
    assert {name: FLAGS[name].default for name in defaults} == defaults


# --- Records -----------------------------------------------------------------


def test_single_read_returns_key_label_and_planes(tmp_path):
    planes = np.random.RandomState(0).randint(0, 256, [3, 3, 32, 32]).astype(np.uint8)
    labels = [7, 0, 9]
    path = tmp_path / 'some.bin'
    path.write_bytes(b''.join(bytes([labels[i]]) + planes[i].tobytes() for i in range(3)))
    record = cifar10_input.read_cifar10(tf.train.string_input_producer([str(path)], shuffle=False))
    assert (record.height, record.width, record.depth) == (32, 32, 3)
    assert (record.label.dtype, record.label.shape.as_list()) == (tf.int32, [1])
    assert record.uint8image.shape.as_list() == [32, 32, 3]
    with running() as session:
        for i in range(3):
            key, label, image = session.run([record.key, record.label, record.uint8image])
            assert key.decode() == f'{path}:{i}'
            assert label.tolist() == [labels[i]]
            assert image.dtype == np.uint8
            for color in range(3):  # Red, green, blue.
                np.testing.assert_array_equal(image[..., color], planes[i, color])


def test_batch_read_stops_at_end_of_file(tmp_path):
    images, labels = reference.random_images(9), [5, 0, 9, 1, 1, 8, 2, 3, 4]
    first, second = tmp_path / 'first.bin', tmp_path / 'second.bin'
    first.write_bytes(reference.records(images[:6], labels[:6]))
    second.write_bytes(reference.records(images[6:], labels[6:]))
    paths = tf.train.string_input_producer([str(first), str(second)], num_epochs=1, shuffle=False)
    record = cifar10_input.read_cifar10(paths, 4)
    assert record.label.shape.as_list() == [None, 1]
    assert record.uint8image.shape.as_list() == [None, 32, 32, 3]
    with running() as session:
        for path, within, overall in [
            (first, range(4), slice(0, 4)),
            (first, range(4, 6), slice(4, 6)),
            (second, range(3), slice(6, 9)),
        ]:
            keys, label, image = session.run([record.key, record.label, record.uint8image])
            assert [key.decode() for key in keys] == [f'{path}:{i}' for i in within]
            assert label.tolist() == [[each] for each in labels[overall]]
            np.testing.assert_array_equal(image, images[overall])
        with pytest.raises(tf.errors.OutOfRangeError):
            session.run(record.key)


def test_num_examples_counts_records(folder):
    reference.write_numbered(folder, [3, 1, 4, 1, 5])
    reference.write_numbered(folder, [9], ['test_batch.bin'])
    assert cifar10_input.num_examples(False, str(folder)) == 14
    assert cifar10_input.num_examples(True, str(folder)) == 9


def test_missing_file_is_named(folder):
    reference.write_zeros(folder, 2)
    (folder / 'data_batch_4.bin').unlink()
    for build in [
        lambda: cifar10_input.num_examples(False, str(folder)),
        lambda: cifar10_input.distorted_inputs(str(folder), 1),
        lambda: cifar10_input.inputs(False, str(folder), 1),
    ]:
        with pytest.raises(FileNotFoundError, match='data_batch_4.bin'):
            build()


# --- Distortion --------------------------------------------------------------


def test_crop_and_flip_cover_all_windows():
    n = 4050
    images = np.empty([n, 32, 32, 3], np.uint8)  # Pixels that tell where they were.
    images[..., 0] = np.arange(32)[:, np.newaxis]
    images[..., 1] = np.arange(32)
    images[..., 2] = np.arange(n)[:, np.newaxis, np.newaxis] % 256
    crops = evaluate(cifar10_input.random_crop_and_flip(images))
    assert crops.shape == (n, 24, 24, 3) and crops.dtype == np.uint8
    top = crops[:, 0, 0, 0]
    left = crops[..., 1].min(axis=(1, 2))
    flipped = crops[:, 0, 0, 1] > crops[:, 0, 1, 1]

    # Each is a window of its own image, as it was or mirrored.
    window = np.arange(24)
    columns = np.where(flipped[:, np.newaxis], window[::-1], window) + left[:, np.newaxis]
    assert np.all(crops[..., 0] == (top[:, np.newaxis] + window)[:, :, np.newaxis])
    assert np.all(crops[..., 1] == columns[:, np.newaxis, :])
    assert np.all(crops[..., 2] == (np.arange(n) % 256)[:, np.newaxis, np.newaxis])

    # Each of the 9 * 9 offsets about 50 times, about half of them flipped.
    assert max(top) == max(left) == 8
    count = np.zeros([9, 9, 2])
    np.add.at(count, (top, left, flipped.astype(int)), 1)
    assert np.all(count > 0)
    assert np.all(abs(count.sum(axis=2) - 50) < 45)
    assert abs(flipped.mean() - 0.5) < 0.05


def test_brightness_shifts_each_image_once():
    images = reference.random_images(4000, size=4).astype(np.float32)
    delta = evaluate(cifar10_input.random_brightness(tf.constant(images))) - images
    np.testing.assert_allclose(delta, np.broadcast_to(delta[:, :1, :1, :1], delta.shape), atol=1e-4)
    assert is_uniform(delta[:, 0, 0, 0], -63 - 1e-4, 63 + 1e-4)


def test_contrast_scales_distance_from_channel_means():
    images = reference.random_images(4000, size=4).astype(np.float32) + np.float32([0, 100, 1000])
    changed = evaluate(cifar10_input.random_contrast(tf.constant(images)))
    mean = images.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(changed.mean(axis=(1, 2), keepdims=True), mean, rtol=1e-5)
    factor = (changed - mean).std(axis=(1, 2, 3)) / (images - mean).std(axis=(1, 2, 3))
    assert is_uniform(factor, 0.2 - 1e-4, 1.8 + 1e-4)
    factor = factor[:, np.newaxis, np.newaxis, np.newaxis]
    np.testing.assert_allclose(changed, mean + (images - mean) * factor, atol=0.01)


def test_standardize_gives_mean_0_and_stddev_1():
    images = reference.random_images(52, size=24) * np.linspace(0.01, 3, 52)[:, None, None, None]
    images = (images + np.linspace(-100, 100, 52)[:, None, None, None]).astype(np.float32)
    images[50], images[51] = 0, 255
    images[50, 5, 6, 1] = 0.5  # The stddev is half of its lower limit, 1 / sqrt(1,728).
    standard = evaluate(cifar10_input.standardize(tf.constant(images)))
    np.testing.assert_allclose(standard[:50].mean(axis=(1, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(standard[:50].std(axis=(1, 2, 3)), 1, rtol=1e-3)
    assert 0.4 < standard[50].std() < 0.6
    np.testing.assert_allclose(standard, reference.standardize(images), atol=1e-2)


def test_distort_applies_every_distortion():
    n = 2000
    # Red and green: a checkerboard of 100 +- 10, and one of 50 +- 10. Blue is a ramp.
    board = np.where((np.arange(32)[:, np.newaxis] + np.arange(32)) % 2, 10, -10)
    image = np.stack([100 + board, 50 + board, np.tile(2 * np.arange(32), [32, 1])], axis=-1)
    images = tf.constant(np.tile(image.astype(np.uint8), [n, 1, 1, 1]))
    distorted = evaluate(cifar10_input.distort(images))
    assert distorted.shape == (n, 24, 24, 3) and distorted.dtype == np.float32
    np.testing.assert_allclose(distorted.mean(axis=(1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(distorted.std(axis=(1, 2, 3)), 1, rtol=1e-3)

    red, green, blue = np.moveaxis(distorted, -1, 0)
    # Contrast scales the 10, and not the distance of 50 between the channels.
    distance = red.mean(axis=(1, 2)) - green.mean(axis=(1, 2))
    factor = red.std(axis=(1, 2)) / distance * 50 / 10
    assert is_uniform(factor, 0.2 - 1e-3, 1.8 + 1e-3)
    assert abs(np.mean(blue[:, 0, 0] > blue[:, 0, 23]) - 0.5) < 0.06
    # The mean of the ramp within the window, 2 * (left + 11.5), tells where it lies.
    left = (blue.mean(axis=(1, 2)) - green.mean(axis=(1, 2))) / distance * 50 / 2 + 25 - 11.5
    np.testing.assert_allclose(left, np.round(left), atol=0.01)
    assert set(np.round(left)) == set(range(9))


# --- Training input ----------------------------------------------------------


def test_training_batches_are_whole_and_endless(folder):
    reference.write_numbered(folder, [40, 40, 40, 300, 80])
    FLAGS.batch_size = 100
    images, labels = cifar10.distorted_inputs()
    assert (images.dtype, images.shape.as_list()) == (tf.float32, [100, 24, 24, 3])
    assert (labels.dtype, labels.shape.as_list()) == (tf.int32, [100])
    seen = set()
    with running() as session:
        for _ in range(100):  # 20 epochs.
            batch, batch_labels = session.run([images, labels])
            assert batch.shape == (100, 24, 24, 3) and batch_labels.shape == (100,)
            numbers = reference.numbers_of(batch)
            np.testing.assert_array_equal(batch_labels, numbers % 10)
            np.testing.assert_allclose(batch.mean(axis=(1, 2, 3)), 0, atol=1e-4)
            np.testing.assert_allclose(batch.std(axis=(1, 2, 3)), 1, rtol=1e-3)
            seen.update(numbers)
    assert seen == set(range(500))


def test_batch_larger_than_training_set(folder):
    reference.write_numbered(folder, [2] * 5)
    images, _ = cifar10_input.distorted_inputs(str(folder), 1000)
    with running() as session:
        numbers = reference.numbers_of(session.run(images))
    assert len(numbers) == 1000
    assert set(numbers) == set(range(10))


def test_training_order_differs_between_runs(folder):
    reference.write_numbered(folder, [200] * 5)
    orders = []
    for _ in range(2):
        with tf.Graph().as_default():
            images, _ = cifar10_input.distorted_inputs(str(folder), 100)
            with running() as session:
                orders.append(reference.numbers_of(session.run(images)).tolist())
    first, second = orders
    assert len({number // 200 for number in first}) > 1  # From more than one file.
    assert np.mean(np.diff(first) == 1) < 0.2
    assert first != second


def test_training_queue_keeps_40_percent_of_epoch(folder):
    reference.write_numbered(folder, [40] * 5)
    images, _ = cifar10_input.distorted_inputs(str(folder), 10)
    files, examples = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
    with tf.Session() as session:
        session.run(tf.local_variables_initializer())
        session.run(files.enqueue_ops[0])
        for _ in range(3):  # A read ends at the end of a file of 40.
            session.run(examples.enqueue_ops[0])
        assert session.run(examples.queue.size()) == 120
        for _ in range(4):
            session.run(images)
        with pytest.raises(tf.errors.DeadlineExceededError):
            session.run(images, options=tf.RunOptions(timeout_in_ms=500))
        assert session.run(examples.queue.size()) == 80


def test_training_queue_has_20000_images_and_16_threads(folder, capsys):
    reference.write_zeros(folder, 10000)
    cifar10_input.distorted_inputs(str(folder), 128)
    assert capsys.readouterr().out == (
        'Filling queue with 20000 CIFAR images before starting to train. '
        'This will take a few seconds.\n'
    )
    _, examples = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
    assert len(examples.enqueue_ops) == 16
    assert examples.queue.queue_ref.op.get_attr('min_after_dequeue') == 20000
    assert {op.device for op in tf.get_default_graph().get_operations()} == {'/device:CPU:0'}


# --- Evaluation input --------------------------------------------------------


def test_evaluation_batches_are_whole_and_endless(folder):
    reference.write_numbered(folder, [25], ['test_batch.bin'])
    FLAGS.batch_size = 10
    images, labels = cifar10.inputs(eval_data=True)
    assert images.shape.as_list() == [10, 24, 24, 3] and labels.shape.as_list() == [10]
    seen = collections.Counter()
    with initialized() as session:  # No local variables.
        coordinator = tf.train.Coordinator()
        threads = tf.train.start_queue_runners(session, coordinator)
        for _ in range(20):  # Eight epochs.
            batch, batch_labels = session.run([images, labels])
            numbers = reference.numbers_of(batch)
            np.testing.assert_array_equal(batch_labels, numbers % 10)
            seen.update(numbers)
        coordinator.request_stop()
        coordinator.join(threads)
    assert set(seen) == set(range(25)) and sum(seen.values()) == 200


def one_pass(images, labels):
    """All images and labels until OutOfRangeError, and the sizes of the batches."""
    batches = []
    with running() as session:
        with pytest.raises(tf.errors.OutOfRangeError):
            while len(batches) < 1000:
                batches.append(session.run([images, labels]))
    images, labels = (np.concatenate(each) for each in zip(*batches))
    return images, labels, [len(batch) for batch, _ in batches]


@pytest.mark.parametrize(
    'eval_data, names, counts, batch_size, sizes',
    [
        (False, reference.TRAINING_FILES, [7, 1, 700, 20, 13], 50, [50] * 14 + [41]),
        (True, ['test_batch.bin'], [300], 100, [100] * 3),
        (True, ['test_batch.bin'], [5], 1000, [5]),
    ],
    ids=['training set', 'whole batches', 'less than a batch'],
)
def test_one_epoch_returns_each_record_once(folder, eval_data, names, counts, batch_size, sizes):
    reference.write_zeros(folder, 3, reference.DATA_FILES)
    reference.write_numbered(folder, counts, names)
    images, labels = cifar10_input.inputs(eval_data, str(folder), batch_size, num_epochs=1)
    assert (images.dtype, images.shape.as_list()) == (tf.float32, [None, 24, 24, 3])
    assert (labels.dtype, labels.shape.as_list()) == (tf.int32, [None])
    assert {op.device for op in tf.get_default_graph().get_operations()} == {'/device:CPU:0'}
    _, examples = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
    assert len(examples.enqueue_ops) == 16

    images, labels, batch_sizes = one_pass(images, labels)
    assert batch_sizes == sizes
    numbers = reference.numbers_of(images)
    assert sorted(numbers) == list(range(sum(counts)))
    np.testing.assert_array_equal(labels, numbers % 10)


def test_evaluation_images_are_standardized_central_crops(folder):
    pixels = reference.random_images(10)
    (folder / 'test_batch.bin').write_bytes(reference.records(pixels, range(10)))
    inputs = cifar10_input.inputs(True, str(folder), batch_size=4, num_epochs=1)
    images, labels, sizes = one_pass(*inputs)
    assert sizes == [4, 4, 2]
    expected = reference.standardize(pixels[:, 4:28, 4:28])
    np.testing.assert_allclose(images[np.argsort(labels)], expected, atol=1e-4)


def test_ten_views_are_center_corners_and_mirror_images():
    pixels = reference.random_images(3)
    found = evaluate(views.crop(tf.constant(pixels), 10, 24))
    assert found.shape == (3, 10, 24, 24, 3)
    for i, (y, x) in enumerate([(4, 4), (0, 0), (0, 8), (8, 0), (8, 8)]):
        window = pixels[:, y : y + 24, x : x + 24]
        np.testing.assert_array_equal(found[:, i], window)
        np.testing.assert_array_equal(found[:, i + 5], window[:, :, ::-1])


# --- The model ---------------------------------------------------------------


def example_batch(n, seed=0):
    """[n, 24, 24, 3] standardized noise and [n] labels."""
    images = reference.standardize(reference.random_images(n, seed, size=24)).astype(np.float32)
    return images, np.random.RandomState(seed).randint(0, 10, n).astype(np.int32)


def batches_of(images, labels):
    """cifar10 as a model whose training input is these images, in this order, endlessly."""

    def distorted_inputs():
        tensors = [tf.constant(images), tf.constant(labels)]
        return tf.train.batch(tensors, FLAGS.batch_size, enqueue_many=True)

    return types.SimpleNamespace(**dict(vars(cifar10), distorted_inputs=distorted_inputs))


def set_variables(session, values):
    for variable in tf.trainable_variables():
        variable.load(values[variable.op.name], session)


def test_model_has_1068298_parameters_on_cpu():
    with tf.device('/gpu:0'):
        cifar10.inference(tf.zeros([1, 24, 24, 3]))
    variables = tf.trainable_variables()
    shapes = {variable.op.name: variable.shape.as_list() for variable in variables}
    assert len(variables) == 10
    assert shapes == {name: shape for name, (shape, _) in reference.MODEL.items()}
    assert sum(np.prod(shape) for shape in shapes.values()) == 1068298
    assert {variable.dtype.base_dtype for variable in variables} == {tf.float32}
    assert {variable.device for variable in variables} == {'/device:CPU:0'}


def test_initial_values_follow_their_distributions():
    cifar10.inference(tf.zeros([1, 24, 24, 3]))
    with initialized() as session:
        values = session.run({variable.op.name: variable for variable in tf.trainable_variables()})
    for name, (_, parameter) in reference.MODEL.items():
        value = values[name].astype(np.float64)
        if name.endswith('biases'):
            np.testing.assert_array_equal(value, np.float32(parameter))
            continue
        # Cut off at two standard deviations, a normal distribution keeps 0.8796 of its own.
        stddev = 0.8796 * parameter
        error = value.size**-0.5
        assert abs(value).max() <= 2.0001 * parameter, name
        assert abs(value).max() > 1.9 * parameter, name
        assert abs(value.mean()) < 6 * error * stddev, name
        assert abs(value.std() / stddev - 1) < 5 * error, name


@pytest.mark.parametrize('scale', [{}, dict(conv1=100, conv2=10)], ids=['initial', 'large'])
def test_logits_match_numpy(scale):
    images = tf.placeholder(tf.float32, [None, 24, 24, 3])
    logits = cifar10.inference(images)
    assert logits.shape.as_list() == [None, 10] and logits.dtype == tf.float32
    values = reference.random_variables(**scale)
    batch, _ = example_batch(2)
    with initialized() as session:
        set_variables(session, values)
        actual = session.run(logits, {images: batch})
    expected = reference.logits(values, batch)
    assert expected.std() > 0.01
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize('name', ['conv1', 'conv2', 'local3', 'local4', 'softmax_linear'])
def test_output_of_each_layer_is_named_after_it(name):
    cifar10.inference(np.zeros([2, 24, 24, 3]))
    graph = tf.get_default_graph()
    output = graph.get_tensor_by_name(f'{name}/{name}:0')
    with initialized() as session:
        summary = tf.Summary.FromString(session.run(tf.summary.merge_all()))
    tags = {value.tag for value in summary.value}
    assert f'{name}/activations' in tags and f'{name}/sparsity' in tags
    expected = 'Identity' if name == 'softmax_linear' else 'Relu'
    assert output.op.type == expected and output.shape.as_list()[0] == 2


def test_assigned_number_of_classes_counts(folder, monkeypatch):
    (folder / 'batches.meta.txt').write_text('left\nright\n')
    assert cifar10.inference(tf.zeros([1, 24, 24, 3])).shape.as_list() == [1, 2]
    monkeypatch.setattr(cifar10, 'NUM_CLASSES', 6)
    with tf.Graph().as_default():
        assert cifar10.inference(tf.zeros([1, 24, 24, 3])).shape.as_list() == [1, 6]


@pytest.mark.parametrize('scale', [0.1, 1, 30, 1000])
def test_normalization_matches_numpy_and_tensorflow(scale):
    random = np.random.RandomState(0)
    values, upstream = random.normal(0, 1, [2, 2, 3, 3, 20])
    values *= scale
    if scale > 10:  # The normalizer is far from 1.
        assert np.median(abs(reference.normalization(values) / values)) < 0.9
    x, dy = tf.constant(values, tf.float32), tf.constant(upstream, tf.float32)
    y = cifar10.local_response_normalization('norm1', x)
    assert y.name == 'norm1:0'
    built_in = tf.nn.local_response_normalization(x, 4, 1.0, 0.001 / 9.0, 0.75)
    y, dx, expected = evaluate([y, tf.gradients(y, x, dy)[0], tf.gradients(built_in, x, dy)[0]])

    np.testing.assert_allclose(y, reference.normalization(values), rtol=1e-4)
    np.testing.assert_allclose(dx, expected, rtol=1e-3, atol=1e-4 * abs(expected).max())


# --- Loss --------------------------------------------------------------------


def test_loss_is_cross_entropy_plus_decay():
    batch, labels = example_batch(6)
    logits = cifar10.inference(tf.constant(batch))
    total_loss = cifar10.loss(logits, tf.constant(labels))
    assert total_loss.shape.as_list() == []
    values = reference.random_variables(conv1=5, local3=2, softmax_linear=30)
    with initialized() as session:
        set_variables(session, values)
        logits, total_loss = session.run([logits, total_loss])
    cross_entropy = reference.cross_entropy(logits.astype(np.float64), labels)
    assert abs(cross_entropy - np.log(10)) > 0.01
    expected = cross_entropy + reference.decay(values)
    np.testing.assert_allclose(total_loss, expected, rtol=1e-4)


@pytest.mark.parametrize('scopes', [[], ['cost'], ['tower_0'], ['tower_12', 'cost']])
@pytest.mark.parametrize('dtype', [np.uint8, np.int64])
def test_first_loss_is_4_68(scopes, dtype):
    batch, labels = example_batch(128)
    is_tower = 'tower' in str(scopes)
    tf.add_to_collection('losses', tf.constant(1000.0 if is_tower else 0.0))
    with contextlib.ExitStack() as stack:
        if is_tower:
            stack.enter_context(tf.name_scope(scopes[0]))
        logits = cifar10.inference(batch)
        for name in scopes[is_tower:]:
            stack.enter_context(tf.name_scope(name))
        total_loss = cifar10.loss(logits, labels.astype(dtype))
    squares = (2304 * 384 + 384 * 192) * (0.8796 * 0.04) ** 2
    with initialized() as session:
        assert abs(session.run(total_loss) - (np.log(10) + 0.002 * squares)) < 0.1


def test_gradients_match_finite_differences():
    batch, labels = example_batch(2)
    total_loss = cifar10.loss(cifar10.inference(tf.constant(batch)), tf.constant(labels))
    gradients = {
        variable.op.name: tf.gradients(total_loss, variable)[0]
        for variable in tf.trainable_variables()
    }
    # Activations large enough for normalization to matter, logits that are no tie.
    values = reference.random_variables(conv1=100, conv2=10, softmax_linear=10)
    with initialized() as session:
        set_variables(session, values)
        gradients = session.run(gradients)

    def loss_at(name, shift):
        moved = dict(values)
        moved[name] = values[name].astype(np.float64) + shift
        logits = reference.logits(moved, batch)
        return reference.cross_entropy(logits, labels) + reference.decay(moved)

    random = np.random.RandomState(1)
    assert set(gradients) == set(reference.MODEL)
    for name, gradient in gradients.items():
        assert gradient.shape == values[name].shape
        largest = np.zeros_like(gradient)
        largest.flat[abs(gradient).argmax()] = 1
        for direction in random.normal(0, 1, gradient.shape), largest:
            h = 1e-6 * values[name].std()
            slope = (loss_at(name, h * direction) - loss_at(name, -h * direction)) / (2 * h)
            actual, atol = np.sum(gradient * direction), 1e-4 * np.linalg.norm(gradient)
            np.testing.assert_allclose(actual, slope, rtol=2e-3, atol=atol, err_msg=name)


# --- Training ----------------------------------------------------------------

LinearLoss = collections.namedtuple('LinearLoss', ['global_step', 'x', 'train_op'])


def linear_loss(slope):
    """A training step on the loss sum(slope * x)."""
    global_step = tf.train.get_or_create_global_step()
    x = tf.get_variable('x', [3], initializer=tf.zeros_initializer())
    return LinearLoss(global_step, x, cifar10.train(tf.reduce_sum(slope * x), global_step))


def assert_tenfold_drops(toy, boundary):
    """Does the learning rate drop every `boundary` steps? The slope has to be 1."""
    with initialized() as session:
        for step, rate in [
            (0, 0.1),
            (boundary - 1, 0.1),
            (boundary, 0.01),
            (2 * boundary - 1, 0.01),
            (2 * boundary, 0.001),
            (3 * boundary, 0.0001),
        ]:
            toy.global_step.load(step, session)
            toy.x.load([0.0, 0.0, 0.0], session)
            session.run(toy.train_op)
            np.testing.assert_allclose(session.run(toy.x), [-rate] * 3, rtol=1e-5)
            assert session.run(toy.global_step) == step + 1


# 350 epochs make 350 * 50,000 / 128 = 136,718.75 steps.
@pytest.mark.parametrize(
    'records_per_file, batch_size, boundary',
    [(10000, 128, 136718), (10000, 100, 175000), (20, 10, 3500)],
)
def test_learning_rate_drops_every_350_epochs(folder, records_per_file, batch_size, boundary):
    reference.write_zeros(folder, records_per_file)
    FLAGS.batch_size = batch_size
    assert_tenfold_drops(linear_loss([1.0, 1.0, 1.0]), boundary)


@pytest.mark.parametrize('dtype', [tf.int32, tf.float32])
def test_learning_rate_follows_assigned_epoch_without_data_files(folder, monkeypatch, dtype):
    monkeypatch.setattr(cifar10, 'NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN', 1000)
    FLAGS.batch_size = 100
    zero = tf.zeros_initializer()
    global_step = tf.get_variable('my_step', [], dtype, zero, trainable=False)
    x = tf.get_variable('x', [3], initializer=zero)
    train_op = cifar10.train(tf.reduce_sum(x), global_step)
    assert_tenfold_drops(LinearLoss(global_step, x, train_op), 3500)


def test_averages_follow_updated_variables(folder):
    reference.write_zeros(folder, 1000)
    FLAGS.batch_size = 1  # The learning rate stays at 0.1.
    slope = np.array([1.0, -2.0, 30.0])
    global_step, x, train_op = linear_loss(slope.astype(np.float32))
    variables = {variable.op.name: variable for variable in tf.global_variables()}
    average = variables['x/ExponentialMovingAverage']
    with initialized() as session:
        x_now = shadow = np.zeros(3)
        for n in range(1, 21):
            session.run(train_op)
            x_now = x_now - 0.1 * slope
            decay = min(0.9999, (1 + n) / (10 + n))
            shadow = decay * shadow + (1 - decay) * x_now
            np.testing.assert_allclose(session.run(x), x_now, rtol=1e-5)
            np.testing.assert_allclose(session.run(average), shadow, rtol=1e-5)

        # Late, the decay is 0.9999: (1 + n) / (10 + n) is larger from n = 89,990 on.
        global_step.load(130000, session)
        x.load([0.0, 0.0, 0.0], session)
        average.load([0.0, 0.0, 0.0], session)
        session.run(train_op)
        np.testing.assert_allclose(session.run(average), 0.0001 * -0.1 * slope, rtol=1e-3)


@both_trainers
def test_training_learns_four_hues(tmp_path, monkeypatch, trainer, num_gpus):
    labels = np.arange(200) % 4
    angle = 2 * np.pi * (labels[:, np.newaxis] / 4 + np.arange(3) / 3)
    colors = 128 + 60 * np.cos(angle)[:, np.newaxis, np.newaxis]
    images = colors + np.random.RandomState(0).uniform(-30, 30, [200, 32, 32, 3])
    reference.write_data(tmp_path, images.astype(np.uint8), labels, test_images=0)
    FLAGS.data_dir = str(tmp_path)
    # With so few images the usual rate of 0.1 kills a layer in one run of ten.
    monkeypatch.setattr(cifar10, 'INITIAL_LEARNING_RATE', 0.02)
    FLAGS.num_gpus, FLAGS.batch_size = num_gpus, 16 // num_gpus
    train_op, loss, images_per_step = trainer.build(cifar10)
    assert images_per_step == 16
    with running() as session:
        losses = [session.run([loss, train_op])[0] for _ in range(60)]
    # A network that only learns that there are four classes gains log(10) - log(4), less than 1.
    assert losses[0] - np.mean(losses[-10:]) > 1.8


# --- Several GPUs ------------------------------------------------------------


def tower_ops(i):
    ops = tf.get_default_graph().get_operations()
    return [op for op in ops if op.name.startswith(f'tower_{i}/')]


def test_towers_get_different_batches(folder):
    numbers = np.arange(400)
    images = np.ones([400, 24, 24, 3], np.float32) * numbers[:, np.newaxis, np.newaxis, np.newaxis]
    FLAGS.num_gpus, FLAGS.batch_size = 2, 4
    _, loss, _ = cifar10_multi_gpu_train.build(batches_of(images, (numbers % 10).astype(np.int32)))
    taken = []  # Of each tower: images and labels.
    for i in range(2):
        ops = {op.type: op for op in tower_ops(i)}
        convolution = tf.get_default_graph().get_operation_by_name(f'tower_{i}/conv1/Conv2D')
        entropy = ops['SparseSoftmaxCrossEntropyWithLogits']
        taken.append([convolution.inputs[0], entropy.inputs[1]])
    seen = []
    with running() as session:
        for _ in range(10):
            batches, _ = session.run([taken, loss])
            for images, labels in batches:
                numbers = images[:, 0, 0, 0].astype(int)
                np.testing.assert_array_equal(labels, numbers % 10)
                seen.extend(numbers)
    assert sorted(seen) == list(range(80))  # Two towers of 4, ten times: none twice or lost.


def losses_and_variables(trainer, model, steps, values):
    """The losses of some steps that start from these values, and the variables after them."""
    with tf.Graph().as_default():
        train_op, loss, _ = trainer.build(model)
        variables = {variable.op.name: variable for variable in tf.global_variables()}
        with running() as session:
            for name, value in values.items():
                variables[name].load(value, session)
                variables[name + reference.AVERAGE].load(value, session)
            losses = [session.run([loss, train_op])[0] for _ in range(steps)]
            return losses, session.run(variables)


def test_two_towers_equal_one_with_double_batch(folder):
    values = reference.random_variables()
    model = batches_of(*example_batch(8))
    FLAGS.batch_size = 8
    one_losses, one = losses_and_variables(cifar10_train, model, 3, values)
    FLAGS.num_gpus, FLAGS.batch_size = 2, 4
    two_losses, two = losses_and_variables(cifar10_multi_gpu_train, model, 3, values)
    assert len(set(one_losses)) == 3
    np.testing.assert_allclose(one_losses, two_losses, rtol=1e-4)
    assert one['global_step'] == two['global_step'] == 3
    for name, value in values.items():
        for each in name, name + reference.AVERAGE:
            atol = 1e-3 * abs(one[each] - value).max()
            np.testing.assert_allclose(two[each], one[each], rtol=1e-5, atol=atol, err_msg=each)


def test_towers_compute_on_gpus_and_cpu_updates(folder):
    reference.write_zeros(folder, 1)
    FLAGS.num_gpus = 2
    cifar10_multi_gpu_train.build(cifar10)
    for i in range(2):
        on_gpu = {op.type for op in tower_ops(i) if op.device == f'/device:GPU:{i}'}
        elsewhere = {op.type for op in tower_ops(i) if op.device != f'/device:GPU:{i}'}
        assert on_gpu >= {'Conv2D', 'Conv2DBackpropFilter', 'Conv2DBackpropInput'}
        assert on_gpu >= {'MaxPool', 'MaxPoolGrad', 'MatMul', 'L2Loss'}
        assert elsewhere == {'QueueDequeueV2'}
    assert len(tf.trainable_variables()) == 10
    assert {variable.device for variable in tf.trainable_variables()} == {'/device:CPU:0'}
    ops = tf.get_default_graph().get_operations()
    averages = [op for op in ops if op.name.startswith('average_gradients/')]
    updates = [op for op in ops if op.type == 'ApplyGradientDescent']
    assert len(averages) >= 10 and len(updates) == 10
    assert {op.device for op in averages + updates} == {'/device:CPU:0'}


def test_two_towers_halve_steps_per_epoch(folder, monkeypatch):
    def tower_loss(model, batches):
        return tf.reduce_sum(tf.get_variable('x', [3], initializer=tf.zeros_initializer()))

    reference.write_zeros(folder, 10000)
    monkeypatch.setattr(cifar10_multi_gpu_train, 'tower_loss', tower_loss)
    FLAGS.num_gpus, FLAGS.batch_size = 2, 128
    train_op, _, _ = cifar10_multi_gpu_train.build(cifar10)
    (x,) = tf.trainable_variables()
    # 350 * 50,000 / (2 * 128) = 68,359.375.
    assert_tenfold_drops(LinearLoss(tf.train.get_global_step(), x, train_op), 68359)


# --- Checkpoints -------------------------------------------------------------


@pytest.fixture
def loss_scaling(monkeypatch):
    """Makes --use_fp16 do what it does on a GPU with float16. The rewrite finds no GPU here."""
    monkeypatch.setattr(devices, 'half_precision', lambda use_fp16: 'float16')
    yield
    tf.train.experimental.disable_mixed_precision_graph_rewrite()


@both_trainers
@pytest.mark.parametrize('precision', ['float32', 'float16'])
def test_checkpoint_has_21_variables(folder, request, tmp_path, trainer, num_gpus, precision):
    if precision == 'float16':
        request.getfixturevalue('loss_scaling')
    reference.write_zeros(folder, 2)
    FLAGS.num_gpus, FLAGS.batch_size = num_gpus, 2
    trainer.build(cifar10)
    with initialized() as session:
        path = checkpoints.Saver(5).save(session, str(tmp_path / 'model.ckpt'))
    values = reference.read_checkpoint(path)
    assert sorted(values) == reference.CHECKPOINT_NAMES and len(values) == 21
    assert values['global_step'] == 0 and values['global_step'].dtype == np.int64
    for name, (shape, _) in reference.MODEL.items():
        assert values[name].dtype == np.float32 and list(values[name].shape) == shape
        # The averages start at what the variables start at.
        np.testing.assert_array_equal(values[name + reference.AVERAGE], values[name])


# --- 16 bits -----------------------------------------------------------------


def test_overflowing_step_is_skipped(folder, loss_scaling):
    reference.write_zeros(folder, 1)
    slope = tf.placeholder(tf.float32, [3])
    global_step, x, train_op = linear_loss(slope)
    summary = tf.summary.merge_all()  # tf.summary.histogram() raises if a value is not finite.
    with initialized() as session:
        for value, expected_x, expected_step in [
            ([1, 2, 3], [-0.1, -0.2, -0.3], 1),
            ([1e38, 0, 0], [-0.1, -0.2, -0.3], 1),
            ([np.inf, 0, 0], [-0.1, -0.2, -0.3], 1),
            ([0, np.nan, 0], [-0.1, -0.2, -0.3], 1),
            ([1, 2, 3], [-0.2, -0.4, -0.6], 2),
        ]:
            session.run([train_op, summary], {slope: value})
            np.testing.assert_allclose(session.run(x), expected_x, rtol=1e-5)
            assert session.run(global_step) == expected_step


# --- Precision ---------------------------------------------------------------


@pytest.mark.parametrize('network', ['random', 'zero'])
def test_prediction_is_largest_logit(folder, network):
    images = reference.rectangle_images(30)
    values = reference.random_variables(conv1=10, conv2=10)
    if network == 'zero':  # All ten logits are equal: the prediction is class 0, not every class.
        values = {name: np.zeros_like(value) for name, value in values.items()}
    predicted = reference.evaluation_logits(values, images).argmax(axis=1)
    assert network == 'zero' or len(set(predicted)) > 2
    labels = np.where(np.arange(30) < 9, predicted, (predicted + 1) % 10)
    (folder / 'test_batch.bin').write_bytes(reference.records(images, labels))
    is_correct = cifar10_eval.correct_predictions(cifar10)
    with running() as session:
        set_variables(session, values)
        right = session.run(is_correct)
    assert right.shape == (30,) and np.count_nonzero(right) == 9


if __name__ == '__main__':
    sys.exit(pytest.main([__file__] + sys.argv[1:]))
