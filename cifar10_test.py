"""Tests of the tutorial, in the order in which data flows through it.

    python -m pytest cifar10_test.py         or        python cifar10_test.py

Nothing here needs the data set: the tests make small files in its format. What the
code computes is compared with NumPy, closed forms and counts. Where chance plays a
part, the limits are five standard deviations wide or more.
"""

import contextlib
import os
import re
import sys

# The numbers are to be the same on every machine, whatever GPU it has.
os.environ['CUDA_VISIBLE_DEVICES'] = '-1'

import numpy as np
import pytest

import cifar10
import cifar10_eval
import cifar10_input
import cifar10_multi_gpu_train
import cifar10_train

import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
FLAGS(sys.argv[:1])

TRAINING_FILES = ['data_batch_%d.bin' % i for i in range(1, 6)]

# Name: shape, standard deviation of the weights or value of the biases, decay.
MODEL = {
    'conv1/weights': ([5, 5, 3, 64], 0.05),
    'conv1/biases': ([64], 0.0),
    'conv2/weights': ([5, 5, 64, 64], 0.05),
    'conv2/biases': ([64], 0.1),
    'local3/weights': ([2304, 384], 0.04),
    'local3/biases': ([384], 0.1),
    'local4/weights': ([384, 192], 0.04),
    'local4/biases': ([192], 0.1),
    'softmax_linear/weights': ([192, 10], 1 / 192),
    'softmax_linear/biases': ([10], 0.0),
}
CHECKPOINT_NAMES = sorted(['global_step'] + list(MODEL) +
                          [name + '/ExponentialMovingAverage' for name in MODEL])


# --- Fixtures and helpers ----------------------------------------------------

@pytest.fixture(autouse=True)
def fresh_graph():
    with tf.Graph().as_default() as graph:
        yield graph


@pytest.fixture
def flags():
    """A function that sets flags until the end of the test."""
    before = {}

    def set_flags(**values):
        for name, value in values.items():
            before.setdefault(name, FLAGS[name].value)
            setattr(FLAGS, name, value)

    yield set_flags
    for name, value in before.items():
        setattr(FLAGS, name, value)


@pytest.fixture
def folder(tmp_path, flags):
    """The folder of the .bin files, still empty; --data_dir leads to it."""
    flags(data_dir=str(tmp_path))
    path = tmp_path / 'cifar-10-batches-bin'
    path.mkdir()
    return path


def records(images, labels):
    """The bytes of records, from [n, 32, 32, 3] uint8 and [n]."""
    return b''.join(bytes([label]) + image.transpose(2, 0, 1).tobytes()
                    for image, label in zip(images, labels))


def random_images(n, seed=0, size=32):
    return np.random.RandomState(seed).randint(0, 256, [n, size, size, 3]).astype(np.uint8)


def numbered_images(numbers):
    """[n, 32, 32, 3] uint8 images whose numbers can be read after any distortion.

    They repeat a tile of 8x8 pixels, so that each window of 24x24 holds the same
    pixels. In a channel, 1 to 63 pixels of the tile are bright: a digit of the number.
    """
    digits = 1 + np.asarray(numbers)[:, np.newaxis] // 63 ** np.arange(3) % 63
    bright = np.arange(64)[:, np.newaxis] < digits[:, np.newaxis, :]
    return np.tile(bright.reshape(-1, 8, 8, 3), [1, 4, 4, 1]).astype(np.uint8) * 255


def numbers_of(images):
    """The numbers of distorted numbered_images, [n, 24, 24, 3]."""
    middle = (images.min(axis=(1, 2), keepdims=True) + images.max(axis=(1, 2), keepdims=True)) / 2
    count = np.sum(images > middle, axis=(1, 2))
    assert np.all(count % 9 == 0), 'not an image as made by numbered_images'
    return np.dot(count // 9 - 1, 63 ** np.arange(3))


def write_numbered(folder, counts, names=TRAINING_FILES):
    """Writes files of so many numbered images, 0, 1, 2, ...; the last digit is the label."""
    first = 0
    for name, count in zip(names, counts):
        numbers = np.arange(first, first + count)
        (folder / name).write_bytes(records(numbered_images(numbers), numbers % 10))
        first += count


def write_empty_images(folder, count, names=TRAINING_FILES):
    """Writes files of `count` records of zeros, which take no room on the disk."""
    for name in names:
        with open(str(folder / name), 'wb') as file:
            file.truncate(count * 3073)


@contextlib.contextmanager
def running():
    """A session with initial variables and running queues."""
    with tf.Session(config=cifar10.session_config()) as session:
        session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
        coordinator = tf.train.Coordinator()
        threads = tf.train.start_queue_runners(session, coordinator)
        try:
            yield session
        finally:
            coordinator.request_stop()
            coordinator.join(threads, stop_grace_period_secs=30)


@contextlib.contextmanager
def initialized():
    """A session with initial variables; queues stay empty."""
    with tf.Session(config=cifar10.session_config()) as session:
        session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
        yield session


def evaluate(tensors):
    with tf.Session() as session:
        return session.run(tensors)


def is_uniform(values, low, high, bins=8):
    """Do the values spread evenly over [low, high], and do none lie outside?"""
    count, _ = np.histogram(values, bins, (low, high))
    expected = len(values) / bins
    return count.sum() == len(values) and np.all(abs(count - expected) < 6 * expected ** 0.5)


# --- The modules -------------------------------------------------------------

def test_both_trainers_and_the_evaluator_can_be_imported_by_one_process():
    assert {'batch_size', 'max_steps', 'num_gpus', 'eval_dir'} <= set(FLAGS)
    for script in cifar10_train, cifar10_multi_gpu_train, cifar10_eval:
        assert callable(script.main)


# --- Records -----------------------------------------------------------------

def test_a_single_read_gives_key_label_and_pixels_of_one_record(tmp_path):
    images, labels = random_images(3), [7, 0, 9]
    path = tmp_path / 'some.bin'
    path.write_bytes(records(images, labels))
    record = cifar10_input.read_cifar10(
        tf.train.string_input_producer([str(path)], shuffle=False))

    assert (record.height, record.width, record.depth) == (32, 32, 3)
    assert (record.label.dtype, record.label.shape.as_list()) == (tf.int32, [1])
    assert (record.uint8image.dtype, record.uint8image.shape.as_list()) == (tf.uint8, [32, 32, 3])
    assert (record.key.dtype, record.key.shape.as_list()) == (tf.string, [])
    with running() as session:
        for i in range(3):
            key, label, image = session.run([record.key, record.label, record.uint8image])
            assert key.decode() == '%s:%d' % (path, i)
            assert label.tolist() == [labels[i]]
            np.testing.assert_array_equal(image, images[i])


def test_the_planes_of_a_record_are_red_green_and_blue(tmp_path):
    path = tmp_path / 'some.bin'
    red, green, blue = (np.arange(1024) + shift for shift in (0, 50, 100))
    path.write_bytes(bytes([3]) + np.concatenate([red, green, blue]).astype(np.uint8).tobytes())
    record = cifar10_input.read_cifar10(tf.train.string_input_producer([str(path)]))
    with running() as session:
        image = session.run(record.uint8image)
    assert image[0, 0].tolist() == [0, 50, 100]
    assert image[0, 31].tolist() == [31, 81, 131]  # The end of the first row.
    assert image[1, 0].tolist() == [32, 82, 132]   # The start of the second.
    assert image[31, 31].tolist() == [1023 % 256, 1073 % 256, 1123 % 256]


def test_a_read_of_many_records_stops_at_the_end_of_a_file(tmp_path):
    images, labels = random_images(9), [5, 0, 9, 1, 1, 8, 2, 3, 4]
    first, second = tmp_path / 'first.bin', tmp_path / 'second.bin'
    first.write_bytes(records(images[:6], labels[:6]))
    second.write_bytes(records(images[6:], labels[6:]))
    record = cifar10_input.read_cifar10(
        tf.train.string_input_producer([str(first), str(second)], num_epochs=1, shuffle=False), 4)

    assert (record.height, record.width, record.depth) == (32, 32, 3)
    assert (record.label.dtype, record.label.shape.as_list()) == (tf.int32, [None, 1])
    assert record.uint8image.dtype == tf.uint8
    assert record.uint8image.shape.as_list() == [None, 32, 32, 3]
    assert (record.key.dtype, record.key.shape.as_list()) == (tf.string, [None])
    with running() as session:
        for path, within, overall in [(first, range(4), slice(0, 4)),
                                      (first, range(4, 6), slice(4, 6)),
                                      (second, range(3), slice(6, 9))]:
            keys, label, image = session.run([record.key, record.label, record.uint8image])
            assert [key.decode() for key in keys] == ['%s:%d' % (path, i) for i in within]
            assert label.tolist() == [[each] for each in labels[overall]]
            np.testing.assert_array_equal(image, images[overall])
        with pytest.raises(tf.errors.OutOfRangeError):
            session.run(record.key)


@pytest.mark.parametrize('size', [0, 1, 3072, 3074, 2 * 3073 - 1, None])
@pytest.mark.parametrize('build', [
    lambda folder: cifar10_input.distorted_inputs(folder, 1),
    lambda folder: cifar10_input.inputs(False, folder, 1),
    lambda folder: cifar10_input.num_examples(False, folder),
], ids=['distorted_inputs', 'inputs', 'num_examples'])
def test_a_file_that_is_missing_or_not_made_of_whole_records_is_named(folder, size, build):
    write_empty_images(folder, 2)
    path = folder / 'data_batch_4.bin'
    path.unlink()
    if size is not None:
        path.write_bytes(b'\0' * size)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        build(str(folder))


def test_examples_are_counted_for_each_set(folder):
    write_numbered(folder, [3, 1, 4, 1, 5])
    write_numbered(folder, [9], ['test_batch.bin'])
    assert cifar10_input.num_examples(False, str(folder)) == 14
    assert cifar10_input.num_examples(True, str(folder)) == 9


# --- Distortion --------------------------------------------------------------

def position_images(n):
    """Pixels that tell where they were: (row, column, number of the image modulo 256)."""
    images = np.empty([n, 32, 32, 3], np.uint8)
    images[..., 0] = np.arange(32)[:, np.newaxis]
    images[..., 1] = np.arange(32)
    images[..., 2] = np.arange(n)[:, np.newaxis, np.newaxis]
    return images


def test_every_crop_occurs_plain_and_flipped_and_no_other():
    n = 4050
    crops = evaluate(cifar10_input.random_crop_and_flip(position_images(n)))
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


def test_brightness_is_one_random_number_from_minus_63_to_63_for_each_image():
    images = random_images(4000, size=4).astype(np.float32)
    delta = evaluate(cifar10_input.random_brightness(tf.constant(images))) - images
    np.testing.assert_allclose(delta, np.broadcast_to(delta[:, :1, :1, :1], delta.shape),
                               atol=1e-4)
    assert is_uniform(delta[:, 0, 0, 0], -63 - 1e-4, 63 + 1e-4)


def test_contrast_is_one_random_factor_from_0_2_to_1_8_of_the_distance_from_channel_means():
    images = random_images(4000, size=4).astype(np.float32) + np.float32([0, 100, 1000])
    changed = evaluate(cifar10_input.random_contrast(tf.constant(images)))
    mean = images.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(changed.mean(axis=(1, 2), keepdims=True), mean, rtol=1e-5)
    factor = (changed - mean).std(axis=(1, 2, 3)) / (images - mean).std(axis=(1, 2, 3))
    assert is_uniform(factor, 0.2 - 1e-4, 1.8 + 1e-4)
    np.testing.assert_allclose(
        changed, mean + (images - mean) * factor[:, np.newaxis, np.newaxis, np.newaxis],
        atol=0.01)


def numpy_standardize(images):
    """(x - mean) / max(stddev, 1 / sqrt(number of values))."""
    images = images.astype(np.float64)
    deviation = images.std(axis=(1, 2, 3), keepdims=True)
    return ((images - images.mean(axis=(1, 2, 3), keepdims=True)) /
            np.maximum(deviation, images[0].size ** -0.5))


def test_standardized_images_have_mean_0_and_stddev_1():
    images = (random_images(50, size=24) * np.linspace(0.01, 3, 50)[:, None, None, None] +
              np.linspace(-100, 100, 50)[:, None, None, None]).astype(np.float32)
    standard = evaluate(cifar10_input.standardize(tf.constant(images)))
    np.testing.assert_allclose(standard.mean(axis=(1, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(standard.std(axis=(1, 2, 3)), 1, rtol=1e-3)
    np.testing.assert_allclose(standard, numpy_standardize(images), atol=1e-2)


def test_images_of_one_colour_become_zeros():
    images = np.ones([5, 24, 24, 3], np.float32)
    images *= np.float32([0, 0.1, 1, 128, 255])[:, None, None, None]
    np.testing.assert_allclose(evaluate(cifar10_input.standardize(tf.constant(images))), 0,
                               atol=2e-3)
    # And the whole distortion. A float32 mean of 1,728 equal values is off in the
    # seventh digit, and what is left of them is multiplied by the root of 1,728.
    grey = tf.constant(np.full([100, 32, 32, 3], 200, np.uint8))
    np.testing.assert_allclose(evaluate(cifar10_input.distort(grey)), 0, atol=0.1)


def test_hardly_any_contrast_is_not_blown_up():
    images = np.zeros([1, 24, 24, 3], np.float32)
    images[0, 5, 6, 1] = 0.5  # The stddev is half of its lower limit.
    standard = evaluate(cifar10_input.standardize(tf.constant(images)))
    np.testing.assert_allclose(standard, numpy_standardize(images), atol=1e-5)
    assert 0.4 < standard.std() < 0.6


def test_the_whole_distortion_crops_flips_changes_contrast_and_standardizes():
    n = 2000
    # Red and green: a checkerboard of 100 +- 10, and one of 50 +- 10. Blue is a ramp.
    board = np.where((np.arange(32)[:, np.newaxis] + np.arange(32)) % 2, 10, -10)
    image = np.stack([100 + board, 50 + board, np.tile(2 * np.arange(32), [32, 1])], axis=-1)
    distorted = evaluate(cifar10_input.distort(
        tf.constant(np.tile(image.astype(np.uint8), [n, 1, 1, 1]))))
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


def test_images_of_one_batch_are_distorted_differently():
    same = tf.constant(np.tile(random_images(1), [200, 1, 1, 1]))
    distort = cifar10_input.distort(same)
    with tf.Session() as session:
        first, second = session.run(distort), session.run(distort)
    assert len(np.unique(np.concatenate([first, second]).reshape(400, -1), axis=0)) == 400


# --- Training input ----------------------------------------------------------

def test_training_batches_are_full_endless_and_keep_label_and_image_together(folder):
    write_numbered(folder, [40, 40, 40, 300, 80])
    images, labels = cifar10_input.distorted_inputs(str(folder), 100)
    assert (images.dtype, images.shape.as_list()) == (tf.float32, [100, 24, 24, 3])
    assert (labels.dtype, labels.shape.as_list()) == (tf.int32, [100])
    seen = set()
    with running() as session:
        for _ in range(100):  # 20 epochs.
            batch, batch_labels = session.run([images, labels])
            assert batch.shape == (100, 24, 24, 3) and batch_labels.shape == (100,)
            numbers = numbers_of(batch)
            np.testing.assert_array_equal(batch_labels, numbers % 10)
            np.testing.assert_allclose(batch.mean(axis=(1, 2, 3)), 0, atol=1e-4)
            np.testing.assert_allclose(batch.std(axis=(1, 2, 3)), 1, rtol=1e-3)
            seen.update(numbers)
    assert seen == set(range(500))


def first_training_numbers(folder):
    with tf.Graph().as_default():
        images, _ = cifar10_input.distorted_inputs(str(folder), 100)
        with running() as session:
            return numbers_of(session.run(images))


def test_training_batches_are_shuffled_differently_in_each_run(folder):
    write_numbered(folder, [200] * 5)
    first, second = first_training_numbers(folder), first_training_numbers(folder)
    assert len(set(first // 200)) > 1  # From more than one file.
    assert np.mean(np.diff(first) == 1) < 0.2
    assert list(first) != list(second)


def test_40_percent_of_an_epoch_stay_in_the_training_queue(folder, capsys):
    write_numbered(folder, [40] * 5)
    images, _ = cifar10_input.distorted_inputs(str(folder), 10)
    assert 'Filling queue with 80 CIFAR images' in capsys.readouterr().out
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


def test_the_training_queue_of_cifar_10_holds_20000_images_and_16_threads_fill_it(
        folder, capsys, fresh_graph):
    write_empty_images(folder, 10000)
    cifar10_input.distorted_inputs(str(folder), 128)
    assert capsys.readouterr().out == ('Filling queue with 20000 CIFAR images before starting to '
                                       'train. This will take a few seconds.\n')
    _, examples = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
    assert len(examples.enqueue_ops) == 16
    assert examples.queue.queue_ref.op.get_attr('min_after_dequeue') == 20000
    assert {op.device for op in fresh_graph.get_operations()} == {'/device:CPU:0'}


def test_a_batch_larger_than_the_training_set_is_an_error_of_the_flag(folder, flags):
    write_numbered(folder, [2] * 5)
    flags(batch_size=11)
    with pytest.raises(tf.flags.IllegalFlagValueError, match='--batch_size=11.*10 images'):
        cifar10.distorted_inputs()
    flags(batch_size=10)
    images, _ = cifar10.distorted_inputs()
    assert images.shape.as_list() == [10, 24, 24, 3]


# --- Evaluation input --------------------------------------------------------

def one_pass(images, labels):
    """The batches of images and of labels until OutOfRangeError."""
    batches = []
    with running() as session:
        with pytest.raises(tf.errors.OutOfRangeError):
            while len(batches) < 1000:
                batches.append(session.run([images, labels]))
        with pytest.raises(tf.errors.OutOfRangeError):
            session.run(images)
    return list(zip(*batches))


@pytest.mark.parametrize('eval_data, names, counts, batch_size, sizes', [
    (False, TRAINING_FILES, [7, 1, 700, 20, 13], 50, [50] * 14 + [41]),
    (True, ['test_batch.bin'], [600], 128, [128] * 4 + [88]),
    (True, ['test_batch.bin'], [300], 100, [100] * 3),
    (True, ['test_batch.bin'], [5], 100, [5]),
])
def test_evaluation_gives_each_record_exactly_once(
        folder, fresh_graph, eval_data, names, counts, batch_size, sizes):
    write_empty_images(folder, 3, TRAINING_FILES + ['test_batch.bin'])
    write_numbered(folder, counts, names)
    images, labels = cifar10_input.inputs(eval_data, str(folder), batch_size)
    assert (images.dtype, images.shape.as_list()) == (tf.float32, [None, 24, 24, 3])
    assert (labels.dtype, labels.shape.as_list()) == (tf.int32, [None])
    assert {op.device for op in fresh_graph.get_operations()} == {'/device:CPU:0'}
    _, examples = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
    assert len(examples.enqueue_ops) == 16

    images, labels = one_pass(images, labels)
    assert [len(batch) for batch in images] == [len(batch) for batch in labels] == sizes
    numbers = numbers_of(np.concatenate(images))
    assert sorted(numbers) == list(range(sum(counts)))
    np.testing.assert_array_equal(np.concatenate(labels), numbers % 10)


def test_evaluation_images_are_standardized_central_crops(folder, flags):
    pixels = random_images(10)
    (folder / 'test_batch.bin').write_bytes(records(pixels, range(10)))
    flags(batch_size=4)
    images, labels = one_pass(*cifar10.inputs(eval_data=True))
    images, labels = np.concatenate(images), np.concatenate(labels)
    np.testing.assert_allclose(images[np.argsort(labels)],
                               numpy_standardize(pixels[:, 4:28, 4:28]), atol=1e-4)


# --- The model ---------------------------------------------------------------

def random_weights(seed=0, **scale):
    """A value for each of the ten variables, biases too; by default of initial size."""
    random = np.random.RandomState(seed)
    return {name: (random.normal(0, stddev or 0.1, shape) *
                   scale.get(name.split('/')[0], 1)).astype(np.float32)
            for name, (shape, stddev) in MODEL.items()}


def set_variables(session, values):
    for variable in tf.trainable_variables():
        variable.load(values[variable.op.name], session)


def numpy_convolution(images, kernel):
    """5x5, SAME: two rows and columns of zeros on each side."""
    _, height, width, _ = images.shape
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], mode='constant')
    return sum(np.dot(padded[:, i:i + height, j:j + width], kernel[i, j])
               for i in range(5) for j in range(5))


def numpy_max_pool(images):
    """3x3, stride 2, SAME: an even size needs one row and column, which go behind."""
    _, height, width, _ = images.shape
    padded = np.pad(images, [(0, 0), (0, 1), (0, 1), (0, 0)], mode='constant',
                    constant_values=-np.inf)
    return np.max([padded[:, i:i + height:2, j:j + width:2] for i in range(3) for j in range(3)],
                  axis=0)


def numpy_normalization(images):
    """Over the channel itself and up to four on either side."""
    squares = np.stack([np.sum(images[..., max(0, channel - 4):channel + 5] ** 2, axis=-1)
                        for channel in range(images.shape[-1])], axis=-1)
    return images / (1 + 0.001 / 9 * squares) ** 0.75


def numpy_logits(values, images):
    def relu(x):
        return np.maximum(x, 0)

    values = {name: value.astype(np.float64) for name, value in values.items()}
    x = images.astype(np.float64)
    x = relu(numpy_convolution(x, values['conv1/weights']) + values['conv1/biases'])
    x = numpy_normalization(numpy_max_pool(x))
    x = relu(numpy_convolution(x, values['conv2/weights']) + values['conv2/biases'])
    x = numpy_max_pool(numpy_normalization(x)).reshape(len(images), -1)
    x = relu(np.dot(x, values['local3/weights']) + values['local3/biases'])
    x = relu(np.dot(x, values['local4/weights']) + values['local4/biases'])
    return np.dot(x, values['softmax_linear/weights']) + values['softmax_linear/biases']


def numpy_cross_entropy(logits, labels):
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    return np.mean(log_sum - shifted[np.arange(len(labels)), labels])


def numpy_decay(values):
    return sum(0.004 * np.sum(values[layer + '/weights'].astype(np.float64) ** 2) / 2
               for layer in ('local3', 'local4'))


def example_batch(n, seed=0):
    images = numpy_standardize(random_images(n, seed, size=24)).astype(np.float32)
    return images, np.random.RandomState(seed).randint(0, 10, n).astype(np.int32)


def image_placeholder():
    return tf.placeholder(tf.float32, [None, 24, 24, 3])


def test_the_model_has_1068298_parameters_in_ten_float32_variables_on_the_cpu():
    cifar10.inference(image_placeholder())
    variables = tf.trainable_variables()
    assert {variable.op.name: variable.shape.as_list() for variable in variables} == {
        name: shape for name, (shape, _) in MODEL.items()}
    assert len(variables) == 10
    assert sum(np.prod(variable.shape.as_list()) for variable in variables) == 1068298
    assert {variable.dtype.base_dtype for variable in variables} == {tf.float32}
    assert {variable.device for variable in variables} == {'/device:CPU:0'}


def test_weights_start_from_truncated_normals_and_biases_from_constants():
    cifar10.inference(image_placeholder())
    with running() as session:
        values = session.run({variable.op.name: variable for variable in tf.trainable_variables()})
    for name, (_, parameter) in MODEL.items():
        value = values[name].astype(np.float64)
        if name.endswith('biases'):
            np.testing.assert_array_equal(value, np.float32(parameter))
            continue
        # Cut off at two standard deviations, a normal distribution keeps 0.8796 of its own.
        stddev = 0.8796 * parameter
        error = value.size ** -0.5
        assert abs(value).max() <= 2.0001 * parameter, name
        assert abs(value).max() > 1.9 * parameter, name
        assert abs(value.mean()) < 6 * error * stddev, name
        assert abs(value.std() / stddev - 1) < 5 * error, name


def test_layers_have_the_shapes_of_the_design_for_any_batch_size(fresh_graph):
    images = image_placeholder()
    logits = cifar10.inference(images)
    assert logits.shape.as_list() == [None, 10] and logits.dtype == tf.float32
    shapes = {'conv1/Conv2D': [24, 24, 64], 'pool1': [12, 12, 64],
              'conv2/Conv2D': [12, 12, 64], 'pool2': [6, 6, 64],
              'local3/MatMul': [384], 'local4/MatMul': [192], 'softmax_linear/MatMul': [10]}
    layers = {name: fresh_graph.get_tensor_by_name(name + ':0') for name in shapes}
    batch, _ = example_batch(5)
    with running() as session:
        for n in 1, 5:
            values = session.run(layers, {images: batch[:n]})
            assert {name: list(value.shape) for name, value in values.items()} == {
                name: [n] + shape for name, shape in shapes.items()}
        together = session.run(logits, {images: batch})
        alone = [session.run(logits, {images: batch[i:i + 1]})[0] for i in range(5)]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('scale', [dict(), dict(conv1=100, conv2=10)],
                         ids=['as at the start', 'with large activations'])
def test_logits_are_those_of_numpy(scale):
    images = image_placeholder()
    logits = cifar10.inference(images)
    values = random_weights(**scale)
    batch, _ = example_batch(2)
    with running() as session:
        set_variables(session, values)
        actual = session.run(logits, {images: batch})
    expected = numpy_logits(values, batch)
    assert expected.std() > 0.01
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize('scale', [0.1, 1, 30, 1000])
def test_the_gradient_of_normalization_is_right(scale):
    random = np.random.RandomState(0)
    values, upstream, direction = random.normal(0, 1, [3, 2, 3, 3, 20])
    values *= scale
    if scale > 10:  # The normalizer is far from 1.
        assert np.median(abs(numpy_normalization(values) / values)) < 0.9
    x, dy = tf.constant(values, tf.float32), tf.constant(upstream, tf.float32)
    y = cifar10.local_response_normalization('norm', x)
    built_in = tf.nn.local_response_normalization(x, 4, 1.0, 0.001 / 9.0, 0.75)
    y, dx, built_in_dx = evaluate(
        [y, tf.gradients(y, x, dy)[0], tf.gradients(built_in, x, dy)[0]])

    np.testing.assert_allclose(y, numpy_normalization(values), rtol=1e-4)
    np.testing.assert_allclose(dx, built_in_dx, rtol=1e-3, atol=1e-4 * abs(built_in_dx).max())
    h = 1e-5 * scale
    slope = np.sum(upstream * (numpy_normalization(values + h * direction) -
                               numpy_normalization(values - h * direction))) / (2 * h)
    np.testing.assert_allclose(np.sum(dx * direction), slope, rtol=1e-3)


def test_the_loss_is_the_cross_entropy_plus_decay_of_local3_and_local4():
    batch, labels = example_batch(6)
    logits = cifar10.inference(tf.constant(batch))
    total_loss = cifar10.loss(logits, tf.constant(labels))
    assert total_loss.shape.as_list() == []
    terms = {term.op.name: term for term in tf.get_collection('losses')}
    assert sorted(terms) == ['cross_entropy', 'local3/weight_loss', 'local4/weight_loss']
    values = random_weights(conv1=5, local3=2, softmax_linear=30)
    with running() as session:
        set_variables(session, values)
        logits, total_loss, terms = session.run([logits, total_loss, terms])

    cross_entropy = numpy_cross_entropy(logits.astype(np.float64), labels)
    assert abs(cross_entropy - np.log(10)) > 0.01
    np.testing.assert_allclose(terms['cross_entropy'], cross_entropy, rtol=1e-5)
    for layer in 'local3', 'local4':
        squares = np.sum(values[layer + '/weights'].astype(np.float64) ** 2)
        np.testing.assert_allclose(terms[layer + '/weight_loss'], 0.002 * squares, rtol=1e-4)
    np.testing.assert_allclose(total_loss, cross_entropy + numpy_decay(values), rtol=1e-4)


def test_training_starts_at_a_loss_between_4_6_and_4_8():
    batch, labels = example_batch(128)
    total_loss = cifar10.loss(cifar10.inference(tf.constant(batch)), tf.constant(labels))
    with running() as session:
        assert 4.6 < session.run(total_loss) < 4.8


def test_gradients_of_the_loss_are_those_of_finite_differences():
    batch, labels = example_batch(2)
    total_loss = cifar10.loss(cifar10.inference(tf.constant(batch)), tf.constant(labels))
    gradients = dict(zip(MODEL, tf.gradients(
        total_loss, [variable for name in MODEL
                     for variable in tf.trainable_variables(name + '$')])))
    # Activations large enough for normalization to matter, logits that are no tie.
    values = random_weights(conv1=100, conv2=10, softmax_linear=10)
    with running() as session:
        set_variables(session, values)
        gradients = session.run(gradients)

    def loss_at(name, shift):
        moved = dict(values)
        moved[name] = values[name].astype(np.float64) + shift
        return numpy_cross_entropy(numpy_logits(moved, batch), labels) + numpy_decay(moved)

    random = np.random.RandomState(1)
    for name, gradient in gradients.items():
        assert gradient.shape == values[name].shape
        largest = np.argsort(abs(gradient), axis=None)[-3:]
        directions = [random.normal(0, 1, gradient.shape)]
        directions += [np.eye(1, gradient.size, i).reshape(gradient.shape) for i in largest]
        for direction in directions:
            h = 1e-6 * values[name].std()
            slope = (loss_at(name, h * direction) - loss_at(name, -h * direction)) / (2 * h)
            np.testing.assert_allclose(
                np.sum(gradient * direction), slope, rtol=2e-3,
                atol=1e-4 * np.linalg.norm(gradient), err_msg=name)


# --- Training ----------------------------------------------------------------

def learning_rate():
    """The tensor that TensorBoard shows as learning_rate."""
    scalars = [summary.op for summary in tf.get_collection(tf.GraphKeys.SUMMARIES)
               if summary.op.type == 'ScalarSummary']
    rate, = [op.inputs[1] for op in scalars
             if op.inputs[0].op.get_attr('value').string_val == [b'learning_rate']]
    return rate


def toy(slope):
    """A step of training on the loss sum(slope * x). Returns global_step, x, the op."""
    global_step = tf.train.get_or_create_global_step()
    x = tf.get_variable('x', [3], initializer=tf.zeros_initializer())
    return global_step, x, cifar10.train(tf.reduce_sum(slope * x), global_step)


def assert_learning_rates(session, global_step, rate, boundary):
    for n in 1, 2, 3:
        for step, expected in [(n * boundary - 1, 0.1 ** n), (n * boundary, 0.1 ** (n + 1))]:
            global_step.load(step, session)
            np.testing.assert_allclose(session.run(rate), expected, rtol=1e-5)


# 350 epochs make 350 * 50,000 / 128 = 136,718.75 steps.
@pytest.mark.parametrize('records_per_file, batch_size, boundary', [
    (10000, 128, 136718), (10000, 100, 175000), (20, 10, 3500)])
def test_the_learning_rate_drops_tenfold_every_350_epochs(
        folder, flags, records_per_file, batch_size, boundary):
    write_empty_images(folder, records_per_file)
    flags(batch_size=batch_size)
    global_step, x, train_op = toy([1.0, 1.0, 1.0])
    with running() as session:
        assert_learning_rates(session, global_step, learning_rate(), boundary)
        # And it is the rate with which variables move.
        for step, rate in [(0, 0.1), (boundary - 1, 0.1), (boundary, 0.01)]:
            global_step.load(step, session)
            x.load([0.0, 0.0, 0.0], session)
            session.run(train_op)
            np.testing.assert_allclose(session.run(x), -rate, rtol=1e-5)
            assert session.run(global_step) == step + 1


def test_without_data_the_epoch_is_that_of_cifar_10(tmp_path, flags):
    flags(data_dir=str(tmp_path), batch_size=128)
    global_step, _, _ = toy([1.0, 1.0, 1.0])
    with running() as session:
        assert_learning_rates(session, global_step, learning_rate(), 136718)


def test_averages_follow_their_formula_after_the_step(tmp_path, flags):
    flags(data_dir=str(tmp_path))
    slope = np.array([1.0, -2.0, 30.0])
    global_step, x, train_op = toy(tf.constant(slope, tf.float32))
    average, = [variable for variable in tf.global_variables()
                if variable.op.name == 'x/ExponentialMovingAverage']
    with running() as session:
        x_now = shadow = np.zeros(3)
        for n in range(1, 21):
            session.run(train_op)
            x_now = x_now - 0.1 * slope
            decay = min(0.9999, (1 + n) / (10 + n))
            shadow = decay * shadow + (1 - decay) * x_now
            np.testing.assert_allclose(session.run(x), x_now, rtol=1e-5)
            np.testing.assert_allclose(session.run(average), shadow, rtol=1e-5)
        assert session.run(global_step) == 20

        # Late, the decay is 0.9999: (1 + n) / (10 + n) is larger from n = 89,990 on.
        global_step.load(130000, session)
        x.load([0.0, 0.0, 0.0], session)
        average.load([0.0, 0.0, 0.0], session)
        session.run(train_op)
        np.testing.assert_allclose(session.run(average), 0.0001 * -0.1 * slope, rtol=1e-3)


def batches_of(images, labels):
    """Stands in for cifar10.distorted_inputs: these images, in this order, endlessly."""
    def inputs():
        return tf.train.batch([tf.constant(images), tf.constant(labels)], FLAGS.batch_size,
                              enqueue_many=True)
    return inputs


def variables_after(build_step, steps, values):
    """The 21 variables after some steps from these values; their averages start there too."""
    with tf.Graph().as_default():
        global_step = tf.train.get_or_create_global_step()
        step = build_step(global_step)
        with running() as session:
            for variable in tf.global_variables():
                name = variable.op.name.replace('/ExponentialMovingAverage', '')
                if name in values:
                    variable.load(values[name], session)
            losses = [session.run([step.train_op, step.loss])[1] for _ in range(steps)]
            return losses, session.run(
                {variable.op.name: variable for variable in tf.global_variables()})


def test_a_step_is_plain_gradient_descent(flags, monkeypatch, tmp_path):
    batch, labels = example_batch(8)
    values = random_weights()
    flags(batch_size=8, data_dir=str(tmp_path))
    with tf.Graph().as_default():
        loss = cifar10.loss(cifar10.inference(tf.constant(batch)), tf.constant(labels))
        gradients = {variable.op.name: tf.gradients(loss, variable)[0]
                     for variable in tf.trainable_variables()}
        with running() as session:
            set_variables(session, values)
            gradients, loss = session.run([gradients, loss])

    monkeypatch.setattr(cifar10, 'distorted_inputs', batches_of(batch, labels))
    losses, after = variables_after(cifar10_train.build_step, 1, values)
    np.testing.assert_allclose(losses, [loss], rtol=1e-5)
    assert after['global_step'] == 1
    for name in MODEL:
        change = after[name] - values[name]
        np.testing.assert_allclose(change, -0.1 * gradients[name], err_msg=name, rtol=1e-3,
                                   atol=1e-3 * abs(change).max() + 1e-7)
        # After step 1 the decay is 2 / 11.
        np.testing.assert_allclose(
            after[name + '/ExponentialMovingAverage'],
            2 / 11 * values[name] + 9 / 11 * after[name], rtol=1e-4, atol=1e-6)


def write_hues(folder):
    """Writes 200 images of four hues with noise; the hue is the label."""
    random = np.random.RandomState(0)
    for name in TRAINING_FILES:
        labels = np.arange(40) % 4
        angle = 2 * np.pi * (labels[:, np.newaxis] / 4 + np.arange(3) / 3)
        colours = 128 + 60 * np.cos(angle)
        images = colours[:, np.newaxis, np.newaxis] + random.uniform(-30, 30, [40, 32, 32, 3])
        (folder / name).write_bytes(records(images.astype(np.uint8), labels))


def test_four_hues_are_learnt_from_files(folder, flags):
    write_hues(folder)
    flags(batch_size=16)
    images, labels = cifar10.distorted_inputs()
    logits = cifar10.inference(images)
    train_op = cifar10.train(cifar10.loss(logits, labels), tf.train.get_or_create_global_step())
    right = tf.equal(tf.argmax(logits, 1, output_type=tf.int32), labels)
    with running() as session:
        accuracy = [np.mean(session.run([right, train_op])[0]) for _ in range(80)]
    assert np.mean(accuracy[:2]) < 0.8
    assert np.mean(accuracy[-10:]) > 0.95


# --- Several GPUs ------------------------------------------------------------

@pytest.fixture
def towers(flags, monkeypatch):
    """A function that builds towers; returns the Step, images and labels of each tower."""
    def build(num_gpus, batch_size):
        flags(num_gpus=num_gpus, batch_size=batch_size)
        images, labels = [], []
        inference, loss = cifar10.inference, cifar10.loss
        monkeypatch.setattr(cifar10, 'inference',
                            lambda batch: images.append(batch) or inference(batch))
        monkeypatch.setattr(cifar10, 'loss',
                            lambda logits, batch: labels.append(batch) or loss(logits, batch))
        step = cifar10_multi_gpu_train.build_step(tf.train.get_or_create_global_step())
        return step, images, labels
    return build


def test_each_tower_takes_images_of_its_own(towers, flags, monkeypatch, tmp_path):
    def distorted_inputs():
        numbers = tf.train.range_input_producer(10000, shuffle=False).dequeue_many(
            FLAGS.batch_size)
        images = tf.ones([FLAGS.batch_size, 24, 24, 3]) * tf.reshape(
            tf.cast(numbers, tf.float32), [-1, 1, 1, 1])
        return images, numbers % 10

    flags(data_dir=str(tmp_path))
    monkeypatch.setattr(cifar10, 'distorted_inputs', distorted_inputs)
    step, images, labels = towers(num_gpus=2, batch_size=4)
    assert len(images) == len(labels) == 2
    seen = []
    with running() as session:
        for _ in range(10):
            batches, batch_labels, _ = session.run([images, labels, step.loss])
            for batch, batch_label in zip(batches, batch_labels):
                numbers = batch[:, 0, 0, 0].astype(int)
                np.testing.assert_array_equal(batch_label, numbers % 10)
                seen.extend(numbers)
    assert sorted(seen) == list(range(80))  # Two towers of 4, ten times: none twice or lost.


def test_towers_take_labelled_images_from_the_files(folder, towers):
    write_numbered(folder, [10] * 5)
    step, images, labels = towers(num_gpus=2, batch_size=6)
    assert step.num_images == 12
    with running() as session:
        for _ in range(3):
            batches, batch_labels, _ = session.run([images, labels, step.train_op])
            for batch, batch_label in zip(batches, batch_labels):
                assert batch.shape == (6, 24, 24, 3)
                np.testing.assert_array_equal(batch_label, numbers_of(batch) % 10)


def test_averaged_gradients_are_the_mean_of_numpy():
    random = np.random.RandomState(0)
    shapes = [[2, 3], [4], []]
    variables = [tf.get_variable('v%d' % i, shape) for i, shape in enumerate(shapes)]
    gradients = [[random.normal(0, 1, shape).astype(np.float32) for shape in shapes]
                 for _ in range(3)]
    averaged = cifar10_multi_gpu_train.average_gradients(
        [[(tf.constant(gradient), variable) for gradient, variable in zip(tower, variables)]
         for tower in gradients])
    assert [variable for _, variable in averaged] == variables
    assert {gradient.device for gradient, _ in averaged} == {'/device:CPU:0'}
    for actual, expected in zip(evaluate([gradient for gradient, _ in averaged]),
                                zip(*gradients)):
        np.testing.assert_allclose(actual, np.mean(expected, axis=0), rtol=1e-5, atol=1e-6)


def test_two_towers_do_what_one_does_with_a_batch_of_twice_the_size(flags, monkeypatch, tmp_path):
    batch, labels = example_batch(8)
    values = random_weights()
    flags(data_dir=str(tmp_path))
    monkeypatch.setattr(cifar10, 'distorted_inputs', batches_of(batch, labels))
    flags(batch_size=8)
    one_losses, one = variables_after(cifar10_train.build_step, 3, values)
    flags(batch_size=4, num_gpus=2)
    two_losses, two = variables_after(cifar10_multi_gpu_train.build_step, 3, values)
    np.testing.assert_allclose(one_losses, two_losses, rtol=1e-4)
    assert sorted(one) == sorted(two) == CHECKPOINT_NAMES
    assert one['global_step'] == two['global_step'] == 3
    for name in MODEL:
        for name in name, name + '/ExponentialMovingAverage':
            change = one[name] - values[name.replace('/ExponentialMovingAverage', '')]
            np.testing.assert_allclose(two[name], one[name], rtol=1e-5, err_msg=name,
                                       atol=1e-3 * abs(change).max())


def test_towers_have_gpus_scopes_and_a_schedule_of_their_own_and_share_variables(
        folder, towers, fresh_graph):
    write_empty_images(folder, 10000)
    towers(num_gpus=2, batch_size=128)
    for i in range(2):
        ops = [op for op in fresh_graph.get_operations() if op.name.startswith('tower_%d/' % i)]
        heavy = [op for op in ops if op.type in ('Conv2D', 'MatMul', 'MaxPool', 'LRN')
                 or op.type.startswith(('Conv2DBackprop', 'MaxPoolGrad'))]
        assert {op.device for op in heavy} == {'/device:GPU:%d' % i}
        assert {op.type for op in heavy} >= {'Conv2D', 'MatMul', 'MaxPool', 'LRN', 'MaxPoolGrad',
                                             'Conv2DBackpropFilter', 'Conv2DBackpropInput'}
        names = {op.name for op in ops}
        for layer in 'conv1/Conv2D', 'conv2/Conv2D', 'local3/MatMul', 'softmax_linear/MatMul':
            assert 'tower_%d/%s' % (i, layer) in names
    assert {variable.device for variable in tf.trainable_variables()} == {'/device:CPU:0'}
    assert len(tf.trainable_variables()) == 10
    # 350 * 50,000 / (2 * 128) = 68,359.375.
    with initialized() as session:
        assert_learning_rates(session, tf.train.get_global_step(), learning_rate(), 68359)


# --- 16 bits -----------------------------------------------------------------

@pytest.fixture
def loss_scaling(monkeypatch):
    """What --use_fp16 does on a GPU that has float16; the rewrite finds none here."""
    monkeypatch.setattr(cifar10, 'half_precision', lambda: 'float16')
    yield
    tf.train.experimental.disable_mixed_precision_graph_rewrite()


def test_a_step_with_gradients_that_overflow_is_skipped(loss_scaling, flags, tmp_path):
    flags(data_dir=str(tmp_path))
    slope = tf.placeholder(tf.float32, [3])
    global_step, x, train_op = toy(slope)
    assert sorted(variable.op.name for variable in tf.global_variables()) == [
        'global_step', 'x', 'x/ExponentialMovingAverage']
    with running() as session:
        for values, expected_x, expected_step in [
                ([1, 2, 3], [-0.1, -0.2, -0.3], 1),
                ([1e38, 0, 0], [-0.1, -0.2, -0.3], 1),
                ([np.inf, 0, 0], [-0.1, -0.2, -0.3], 1),
                ([0, np.nan, 0], [-0.1, -0.2, -0.3], 1),
                ([1, 2, 3], [-0.2, -0.4, -0.6], 2)]:
            session.run(train_op, {slope: values})
            np.testing.assert_allclose(session.run(x), expected_x, rtol=1e-5)
            assert session.run(global_step) == expected_step


def test_16_bits_are_used_only_where_they_are_to_be_had(flags, monkeypatch):
    in_rewriter = hasattr(tf.ConfigProto().graph_options.rewrite_options,
                          'auto_mixed_precision_onednn_bfloat16')
    for use_fp16, gpu, cpu, expected in [
            (False, True, True, None),
            (True, True, True, 'float16'),
            (True, True, False, 'float16'),
            (True, False, True, 'bfloat16' if in_rewriter else None),
            (True, False, False, None)]:
        flags(use_fp16=use_fp16)
        monkeypatch.setattr(tf.test, 'is_gpu_available', lambda *_, **__: gpu)
        monkeypatch.setattr(cifar10, '_cpu_has_bfloat16', lambda: cpu)
        assert cifar10.half_precision() == expected


@pytest.mark.skipif(not tf.__version__.startswith('2.'), reason='bfloat16 on CPUs: TensorFlow 2')
def test_bfloat16_is_an_option_of_the_session(monkeypatch):
    for precision in None, 'bfloat16':
        monkeypatch.setattr(cifar10, 'half_precision', lambda: precision)
        config = cifar10.session_config(log_device_placement=True)
        options = config.graph_options.rewrite_options
        assert (options.auto_mixed_precision_onednn_bfloat16 == options.ON) == bool(precision)
        assert config.allow_soft_placement and config.log_device_placement


def test_ops_may_move_to_where_they_can_run():
    assert cifar10.session_config().allow_soft_placement
    with tf.device('/gpu:7'):
        two = tf.constant(1) + tf.constant(1)
    with running() as session:
        assert session.run(two) == 2


# --- Checkpoints -------------------------------------------------------------

@pytest.mark.parametrize('trainer', [cifar10_train, cifar10_multi_gpu_train],
                         ids=['one device', 'two towers'])
@pytest.mark.parametrize('precision', ['float32', 'float16'])
def test_a_checkpoint_holds_exactly_the_21_variables(
        folder, flags, request, tmp_path, trainer, precision):
    if precision == 'float16':
        request.getfixturevalue('loss_scaling')
    write_numbered(folder, [2] * 5)
    flags(batch_size=2, num_gpus=2)
    trainer.build_step(tf.train.get_or_create_global_step())
    assert sorted(variable.op.name for variable in tf.global_variables()) == CHECKPOINT_NAMES
    with initialized() as session:
        path = tf.train.Saver().save(session, str(tmp_path / 'model.ckpt'), global_step=0)
    reader = tf.train.load_checkpoint(path)
    shapes, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    assert sorted(shapes) == CHECKPOINT_NAMES
    for name in CHECKPOINT_NAMES:
        shape, _ = MODEL.get(name.replace('/ExponentialMovingAverage', ''), ([], None))
        assert shapes[name] == shape
        assert types[name] == (tf.int64 if name == 'global_step' else tf.float32)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a checkpoint of two variables for each step; returns the folder."""
    def save(*steps):
        tf.get_variable('weights', [1000], tf.float32)
        tf.get_variable('biases', [10], tf.float32)
        saver = tf.train.Saver(max_to_keep=0)
        with initialized() as session:
            for step in steps:
                saver.save(session, str(tmp_path / 'model.ckpt'), global_step=step)
        return tmp_path
    return save


def test_checkpoints_are_listed_newest_first_and_nothing_else(saved):
    folder = saved(9, 1000, 0, 10)
    for name in ['other.ckpt-11.index', 'model.ckpt-12.meta', 'model.ckpt-.index',
                 'model.ckpt-13.index.tmp', 'model.ckpt-14.data-00000-of-00001',
                 'old-model.ckpt-15.index', 'events.out.tfevents.1', 'model.ckpt.index']:
        (folder / name).write_bytes(b'')
    assert cifar10.checkpoints(str(folder)) == [
        (step, str(folder / ('model.ckpt-%d' % step))) for step in (1000, 10, 9, 0)]


def test_the_state_file_does_not_decide_what_is_there(saved):
    folder = saved(1, 2)
    (folder / 'checkpoint').write_bytes(b'\xff nonsense')
    assert [checkpoint.step for checkpoint in cifar10.checkpoints(str(folder))] == [2, 1]
    (folder / 'checkpoint').unlink()
    assert [checkpoint.step for checkpoint in cifar10.checkpoints(str(folder))] == [2, 1]


def test_a_folder_that_is_empty_or_missing_has_no_checkpoints(tmp_path):
    assert cifar10.checkpoints(str(tmp_path)) == []
    assert cifar10.checkpoints(str(tmp_path / 'none')) == []


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xff  # Not in the middle: an index has unused bytes there.
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b'')


@pytest.mark.parametrize('suffix', ['.data-00000-of-00001', '.index'])
@pytest.mark.parametrize('damage', [flip_a_byte, truncate, empty, lambda path: path.unlink()],
                         ids=['flip_a_byte', 'truncate', 'empty', 'delete'])
def test_a_damaged_checkpoint_is_found_out_and_passed_over(saved, capsys, suffix, damage):
    folder = saved(3, 4)
    newest = cifar10.checkpoints(str(folder))[0]
    assert cifar10.checkpoint_damage(newest.path) is None
    assert cifar10_train.newest_checkpoint(str(folder)) == newest
    assert capsys.readouterr().out == ''

    damage(folder / ('model.ckpt-4' + suffix))
    reason = cifar10.checkpoint_damage(newest.path)
    assert reason and '\n' not in reason
    assert cifar10_train.newest_checkpoint(str(folder)).step == 3
    # Without its index it is no checkpoint any more; else a line names it.
    listed = newest in cifar10.checkpoints(str(folder))
    assert (newest.path in capsys.readouterr().out) == listed


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_checkpoint_with_a_number_that_is_not_finite_is_passed_over(saved, tmp_path, value):
    folder = saved(3)
    with tf.Graph().as_default():
        tf.get_variable('good', initializer=np.float32([-3e38, 0, 3e38]))
        tf.get_variable('bad', initializer=np.float32([-3e38, 0, value]))
        with initialized() as session:
            path = tf.train.Saver().save(session, str(tmp_path / 'model.ckpt'), global_step=4)
    assert re.search(r'\bbad\b', cifar10.checkpoint_damage(path))
    assert cifar10_train.newest_checkpoint(str(folder)).step == 3


def test_a_checkpoint_that_does_not_fit_is_told_by_its_variable(saved):
    path = str(saved(5) / 'model.ckpt-5')
    variables = {variable.op.name: variable for variable in tf.global_variables()}
    assert cifar10.checkpoint_misfit(path, variables) is None
    assert cifar10.checkpoint_misfit(path, {'weights': variables['weights']}) is None
    assert cifar10.checkpoint_misfit(path, {'biases': variables['weights']}) is not None

    with tf.Graph().as_default():
        for name, shape, dtype, expected in [
                ('missing', [10], tf.float32, ['missing']),
                ('weights', [999], tf.float32, ['weights', '1000', '999']),
                ('biases', [10], tf.float64, ['biases', 'float32', 'float64'])]:
            variable = tf.get_variable(name, shape, dtype)
            misfit = cifar10.checkpoint_misfit(path, {name: variable})
            assert all(word in misfit for word in expected)


def test_the_mark_of_a_finished_run_can_be_set_and_taken_back(tmp_path):
    folder = str(tmp_path)
    assert cifar10.finished_step(folder) is None
    cifar10.mark_finished(folder, None)
    cifar10.mark_finished(folder, 1234)
    assert cifar10.finished_step(folder) == 1234
    assert cifar10.checkpoints(folder) == []
    cifar10.mark_finished(folder, None)
    assert cifar10.finished_step(folder) is None
    assert os.listdir(folder) == []
    cifar10.mark_finished(folder, 0)
    assert cifar10.finished_step(folder) == 0
    mark, = tmp_path.iterdir()
    mark.write_bytes(b'')
    assert cifar10.finished_step(folder) is None


if __name__ == '__main__':
    sys.exit(pytest.main([__file__] + sys.argv[1:]))
