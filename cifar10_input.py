"""The input pipeline: CIFAR-10 records on disk -> batches of images and labels.

    string_input_producer          a queue of file names, in random order for training; one thread
      -> FixedLengthRecordReader   up to 256 records per read  |
      -> decode                    labels and images           |  16 threads
      -> distort                   crop, flip, contrast ...    |
      -> RandomShuffleQueue        20,000 images or more       |
      -> dequeue_many              a batch, as part of the training step

`distorted_inputs` builds this pipeline for training, `inputs` a plain one for evaluation. These
functions compute nothing: each call adds operations (ops) to a graph, which a session runs later.
Each queue has a queue runner: threads that run the ops that fill the queue, over and over. The
trainer's session starts them; the evaluator starts them itself.

Every stage works on many images at once, because for one small image most of the time is the
overhead of launching the op.

A record is 3,073 bytes: one byte for the label, then the red, the green and the blue plane of 32
rows of 32 bytes each (https://www.cs.toronto.edu/~kriz/cifar.html).
"""

import os
import types

from support import dataset
from support.compat import tf

RECORD_SIZE = 32  # Height and width of the images in the files.
IMAGE_SIZE = 24  # Height and width of the crops that the network sees.
RECORD_DEPTH = 3
LABEL_BYTES = 1
RECORD_BYTES = LABEL_BYTES + RECORD_SIZE * RECORD_SIZE * RECORD_DEPTH

# These describe CIFAR-10. Other data sets in the same format are counted; see num_examples().
NUM_CLASSES = 10
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 50000
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = 10000

NUM_PREPROCESS_THREADS = 16
RECORDS_PER_READ = 256

MAX_BRIGHTNESS_DELTA = 63.0
CONTRAST_RANGE = (0.2, 1.8)


def data_files(eval_data, data_dir):
    """Paths of the five training files or, if `eval_data`, of the one test file."""
    names = ['test_batch.bin'] if eval_data else [f'data_batch_{i}.bin' for i in range(1, 6)]
    return [os.path.join(data_dir, name) for name in names]


def num_examples(eval_data, data_dir):
    """The number of records in these files. FileNotFoundError if one does not exist."""
    return sum(os.path.getsize(path) // RECORD_BYTES for path in data_files(eval_data, data_dir))


def num_examples_per_epoch(data_dir, constant):
    """The size of the training set: `constant` if a program has changed it, else a count."""
    try:
        return num_examples(False, data_dir) if constant == 50000 else constant
    except FileNotFoundError:  # The program has its own input.
        return constant


def read_cifar10(filename_queue, num_records=None):
    """Reads one record, or up to `num_records` of them, from the files in a queue.

    A read of many records stops at the end of a file, so n below varies.

    Returns:
      An object with the attributes
        height, width, depth: 32, 32, 3.
        key: string, FILE:RECORD. Shape [], or [n] for many records.
        label: int32, the number of the class. Shape [1], or [n, 1].
        uint8image: uint8. Shape [32, 32, 3], or [n, 32, 32, 3].
    """
    result = types.SimpleNamespace(height=RECORD_SIZE, width=RECORD_SIZE, depth=RECORD_DEPTH)
    reader = tf.FixedLengthRecordReader(record_bytes=RECORD_BYTES)
    if num_records is None:
        result.key, value = reader.read(filename_queue)
    else:
        result.key, value = reader.read_up_to(filename_queue, num_records)
    records = tf.reshape(tf.decode_raw(value, tf.uint8), [-1, RECORD_BYTES])
    labels = tf.cast(records[:, :LABEL_BYTES], tf.int32)
    planes = tf.reshape(records[:, LABEL_BYTES:], [-1, RECORD_DEPTH, RECORD_SIZE, RECORD_SIZE])
    images = tf.transpose(planes, [0, 2, 3, 1])
    is_single = num_records is None
    result.label, result.uint8image = (labels[0], images[0]) if is_single else (labels, images)
    return result


# --- Distortion ----------------------------------------------------------------
#
# Every image of a batch gets its own random numbers. tf.image has functions of the same names for
# single images; given a batch, they would use one random number for all of it.


def random_crop_and_flip(images):
    """[n, 32, 32, 3] -> [n, 24, 24, 3]: a random crop of each image, half of them mirrored."""
    n = tf.shape(images)[0]

    def random_window():  # [n, 24]: the indices of adjacent rows or columns of each image.
        first = tf.random_uniform([n, 1], maxval=RECORD_SIZE - IMAGE_SIZE + 1, dtype=tf.int32)
        return first + tf.range(IMAGE_SIZE)

    rows, columns = random_window(), random_window()
    is_mirrored = tf.random_uniform([n]) < 0.5
    columns = tf.where(is_mirrored, columns[:, ::-1], columns)  # Reversed, they mirror the image.
    images = tf.gather(images, rows, axis=1, batch_dims=1)
    return tf.gather(images, columns, axis=2, batch_dims=1)


def random_brightness(images):
    """Adds a random number from [-63, 63) to each image of [n, height, width, 3].

    standardize() subtracts the mean, so this has no effect. It is here because the tutorial has it.
    """
    delta = tf.random_uniform(
        [tf.shape(images)[0], 1, 1, 1], -MAX_BRIGHTNESS_DELTA, MAX_BRIGHTNESS_DELTA
    )
    return images + delta


def random_contrast(images):
    """Multiplies the difference between each pixel and its channel's mean by a random factor.

    Images are [n, height, width, 3]. Each has a factor of its own, from [0.2, 1.8).
    """
    factor = tf.random_uniform([tf.shape(images)[0], 1, 1, 1], *CONTRAST_RANGE)
    mean = tf.reduce_mean(tf.reduce_mean(images, axis=1, keepdims=True), axis=2, keepdims=True)
    # Broadcasting over a last axis of size 3 is slow, so tile the mean to a full row.
    mean = tf.tile(mean, [1, 1, tf.shape(images)[2], 1])
    return (images - mean) * factor + mean


# Gives each image of [..., height, width, 3] float32 mean 0 and standard deviation 1.
standardize = tf.image.per_image_standardization


def distort(images):
    """[n, 32, 32, 3] uint8 -> [n, 24, 24, 3] float32, distorted and standardized."""
    images = tf.cast(random_crop_and_flip(images), tf.float32)
    return standardize(random_contrast(random_brightness(images)))


def central_crop(images):
    """[n, 32, 32, 3] -> [n, 24, 24, 3]."""
    return tf.image.resize_image_with_crop_or_pad(images, IMAGE_SIZE, IMAGE_SIZE)


# --- Batches -------------------------------------------------------------------


def distorted_inputs(data_dir, batch_size, distort=distort, min_fraction_of_examples_in_queue=0.4):
    """Endless shuffled batches of distorted training images. Pinned to the CPU.

    Args:
      data_dir: the folder that holds data_batch_1.bin ... data_batch_5.bin.
      batch_size: images per batch.
      distort: function from [n, 32, 32, 3] uint8 to n float32 images for the network; by default
        the one above.
      min_fraction_of_examples_in_queue: the queue keeps at least this part of an epoch, so that a
        batch mixes images from all files. The first batch waits until the queue is that full.

    Returns:
      images: [batch_size, 24, 24, 3] float32, each with mean 0 and standard deviation 1.
      labels: [batch_size] int32.
    """
    num_examples(False, data_dir)  # Fails now, and not in a thread, if a file is missing.
    examples_per_epoch = num_examples_per_epoch(data_dir, NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN)
    min_queue_examples = int(examples_per_epoch * min_fraction_of_examples_in_queue)
    kind = 'CIFAR images' if dataset.class_names(data_dir) == dataset.CLASS_NAMES else 'images'
    print(
        f'Filling queue with {min_queue_examples} {kind} before starting to train. '
        'This will take a few seconds.'
    )

    with tf.device('/cpu:0'), tf.name_scope('input'):
        filename_queue = tf.train.string_input_producer(data_files(False, data_dir))
        record = read_cifar10(filename_queue, RECORDS_PER_READ)
        with tf.name_scope('distort'):
            images = distort(record.uint8image)
        images, labels = tf.train.shuffle_batch(
            [images, record.label[:, 0]],
            batch_size=batch_size,
            num_threads=NUM_PREPROCESS_THREADS,
            capacity=min_queue_examples + 3 * max(batch_size, RECORDS_PER_READ),
            min_after_dequeue=min_queue_examples,
            enqueue_many=True,
        )
    return images, labels


def inputs(
    eval_data, data_dir, batch_size, num_epochs=None, crop=central_crop, standardize=standardize
):
    """Batches of undistorted images from the test set or the training set. Pinned to the CPU.

    Args:
      eval_data: True for the test set, False for the training set.
      data_dir: the folder that holds the .bin files.
      batch_size: images per batch.
      num_epochs: None for endless batches. 1 for one pass: each record once, in no fixed order. Its
        last batch may be smaller. TensorFlow counts the epochs in a local variable, so run
        tf.local_variables_initializer() first.
      crop: function of [n, 32, 32, 3] uint8 images; by default the one above.
      standardize: function of the crops as float32, 0 to 255; by default the one above.

    Returns:
      images: [n, 24, 24, 3] float32, each with mean 0 and standard deviation 1.
      labels: [n] int32. n is batch_size, but unknown (None) with `num_epochs`.

    Raises:
      tf.errors.OutOfRangeError: when run after the last batch of `num_epochs`.
    """
    num_examples(eval_data, data_dir)  # Fails now, and not in a thread, if a file is missing.
    with tf.device('/cpu:0'), tf.name_scope('input'):
        filename_queue = tf.train.string_input_producer(
            data_files(eval_data, data_dir), num_epochs=num_epochs, shuffle=False
        )
        record = read_cifar10(filename_queue, RECORDS_PER_READ)
        images = standardize(tf.cast(crop(record.uint8image), tf.float32))
        return tf.train.batch(
            [images, record.label[:, 0]],
            batch_size=batch_size,
            num_threads=NUM_PREPROCESS_THREADS,
            capacity=3 * max(batch_size, RECORDS_PER_READ),
            enqueue_many=True,
            allow_smaller_final_batch=num_epochs is not None,
        )
