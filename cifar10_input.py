"""CIFAR-10 records on disk -> batches of images and labels.

    string_input_producer          names of the data files, in random order
      -> FixedLengthRecordReader   up to 256 records at a time   |
      -> decode                    labels and images             | in each of 16 threads
      -> distort, standardize      crop, flip, brightness ...    |
      -> RandomShuffleQueue        20,000 images or more
      -> dequeue_many              a batch, as part of the training step

`distorted_inputs` builds this pipeline for training, `inputs` its plain sibling
for evaluation. As everywhere in this tutorial, these functions compute nothing:
each call adds nodes (ops) to a graph. A session runs them later; it also starts
the queue runners, threads which run the ops up to a queue again and again.

Every stage works on many images at once: the cost of starting an op, a few
microseconds for each of some thirty of them, is paid once for 256 images.

A record of the binary version of the data set is 3,073 bytes: one label byte,
then the red, the green and the blue plane of 32 rows of 32 bytes each
(https://www.cs.toronto.edu/~kriz/cifar.html).
"""

import collections
import ctypes
import os

# Without an NVIDIA driver, TensorFlow need not tell that it misses one. Version 2 reads this
# while it is imported: who imports it before this module gets some lines more.
try:
    ctypes.CDLL('libcuda.so.1')
except OSError:
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import tensorflow.compat.v1 as tf

tf.logging.set_verbosity(tf.logging.ERROR)
tf.disable_v2_behavior()  # The same graphs and sessions in TensorFlow 2.
tf.enable_resource_variables()  # What has been read stays, whatever is written meanwhile.

RECORD_SIZE = 32  # Height and width of the images in the files ...
IMAGE_SIZE = 24  # ... and of what is cut out of them for the network.
RECORD_DEPTH = 3
LABEL_BYTES = 1
RECORD_BYTES = LABEL_BYTES + RECORD_SIZE * RECORD_SIZE * RECORD_DEPTH

# Of CIFAR-10. A data folder may hold any number of images, of 2 to 256 classes.
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 50000
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = 10000
NUM_CLASSES = 10
CLASS_NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
CLASS_NAMES_FILE = 'batches.meta.txt'

NUM_PREPROCESS_THREADS = 16
RECORDS_PER_READ = 256

MAX_BRIGHTNESS_DELTA = 63.0
CONTRAST_RANGE = (0.2, 1.8)

Record = collections.namedtuple('Record', 'height width depth key label uint8image')


def data_files(eval_data, data_dir):
    """Paths of the five training files or, if `eval_data`, of the one test file."""
    names = ['test_batch.bin'] if eval_data else [f'data_batch_{i}.bin' for i in range(1, 6)]
    return [os.path.join(data_dir, name) for name in names]


def num_examples(eval_data, data_dir):
    """The number of records in the training files or, if `eval_data`, in the test file."""
    return sum(os.path.getsize(path) // RECORD_BYTES for path in data_files(eval_data, data_dir))


def class_names(folder):
    """The names of the classes, in the order of their labels: CIFAR-10's, or others in a file.

    The file lies beside the data, one name a line, and beside the checkpoints of a model.
    """
    path = os.path.join(folder, CLASS_NAMES_FILE)
    if not os.path.exists(path):
        return CLASS_NAMES
    with open(path, encoding='utf-8-sig') as file:  # Windows marks the beginning.
        return [line.strip() for line in file if line.strip()]


def write_class_names(folder, names):
    """Writes what class_names() reads."""
    with open(os.path.join(folder, CLASS_NAMES_FILE), 'w', encoding='utf-8') as file:
        file.writelines(name + '\n' for name in names)


def read_cifar10(filename_queue, num_records=None):
    """Reads one record, or up to `num_records` of them, from the files in a queue.

    The pipeline below needs only label and uint8image of many; the rest is for other callers.

    Args:
      filename_queue: a queue of paths of CIFAR-10 binary files.
      num_records: None for a single example; otherwise the largest number of
        records per read. A read stops at the end of a file, so n below varies.

    Returns:
      A Record:
        height, width, depth: 32, 32, 3.
        key: string, FILE:RECORD. Shape [], or [n] for many records.
        label: int32, the number of the class. Shape [1], or [n, 1].
        uint8image: uint8. Shape [32, 32, 3], or [n, 32, 32, 3].
    """
    reader = tf.FixedLengthRecordReader(record_bytes=RECORD_BYTES)
    if num_records is None:
        key, value = reader.read(filename_queue)
        leading = []
    else:
        key, value = reader.read_up_to(filename_queue, num_records)
        leading = [-1]

    record = tf.reshape(tf.decode_raw(value, tf.uint8), leading + [RECORD_BYTES])
    label = tf.cast(record[..., :LABEL_BYTES], tf.int32)
    planes = tf.reshape(
        record[..., LABEL_BYTES:], leading + [RECORD_DEPTH, RECORD_SIZE, RECORD_SIZE]
    )
    image = tf.transpose(planes, [1, 2, 0] if num_records is None else [0, 2, 3, 1])
    return Record(RECORD_SIZE, RECORD_SIZE, RECORD_DEPTH, key, label, image)


def random_crop_and_flip(images, mirror=True):
    """[n, 32, 32, 3] -> [n, 24, 24, 3]: a random window of each image, mirrored in half of them.

    With `mirror` false, in none of them. Computes for each pixel of the result its number in
    the batch, then gathers the pixels: a crop shifts the numbers of the columns, a flip
    reverses them.
    """
    n = tf.shape(images)[0]

    def one_per_image(maxval):
        return tf.random_uniform([n, 1, 1], maxval=maxval, dtype=tf.int32)

    offset = tf.range(IMAGE_SIZE)
    rows = one_per_image(RECORD_SIZE - IMAGE_SIZE + 1) + offset[:, tf.newaxis]  # [n, 24, 1]
    # Where flip is 1, offset + flip * (23 - 2 * offset) counts down from 23.
    flip = one_per_image(2 if mirror else 1)
    columns = one_per_image(RECORD_SIZE - IMAGE_SIZE + 1) + offset  # [n, 1, 24]
    columns += flip * (IMAGE_SIZE - 1 - 2 * offset)
    image = tf.range(n)[:, tf.newaxis, tf.newaxis]  # [n, 1, 1]
    pixels = tf.reshape(images, [-1, RECORD_DEPTH])
    return tf.gather(pixels, (image * RECORD_SIZE + rows) * RECORD_SIZE + columns)


def random_brightness(images):
    """Adds a random number from [-63, 63) to each image of [n, height, width, 3]."""
    delta = tf.random_uniform(
        [tf.shape(images)[0], 1, 1, 1], -MAX_BRIGHTNESS_DELTA, MAX_BRIGHTNESS_DELTA
    )
    return images + delta


def random_contrast(images):
    """Scales each image's distance from its channels' means by a random factor from [0.2, 1.8)."""
    factor = tf.random_uniform([tf.shape(images)[0], 1, 1, 1], *CONTRAST_RANGE)
    # Rows first, and the mean as long as a row: TensorFlow is slow where it works on as few
    # as three channels at a time.
    mean = tf.reduce_mean(tf.reduce_mean(images, axis=1, keepdims=True), axis=2, keepdims=True)
    mean = tf.tile(mean, [1, 1, tf.shape(images)[2], 1])
    return (images - mean) * factor + mean


def standardize(images):
    """Gives each image of [..., height, width, 3] float32 mean 0 and stddev 1.

    The stddev that it divides by is at least 1/sqrt(number of values), so that
    images of a single colour become zeros:
    https://www.tensorflow.org/api_docs/python/tf/image/per_image_standardization
    """
    num_values = images.shape[-3:].num_elements()
    mean = tf.reduce_mean(images, axis=[-3, -2, -1], keepdims=True)
    centered = images - mean
    variance = tf.reduce_mean(tf.square(centered), axis=[-3, -2, -1], keepdims=True)
    return centered * tf.minimum(tf.rsqrt(variance), num_values**0.5)


def distort(images):
    """[n, 32, 32, 3] uint8 -> [n, 24, 24, 3] float32, each image distorted on its own."""
    with tf.name_scope('distort'):
        images = tf.cast(random_crop_and_flip(images), tf.float32)
        return standardize(random_contrast(random_brightness(images)))


def fixed_views(images, num_views):
    """[n, 32, 32, 3] uint8 -> [n, num_views, 24, 24, 3] float32, without randomness.

    One view is the centre. Ten are, as in cuda-convnet, the centre and the four corners, and
    the mirror images of these five.
    """
    last = RECORD_SIZE - IMAGE_SIZE
    windows = [(last // 2, last // 2)]
    if num_views == 10:
        windows += [(0, 0), (0, last), (last, 0), (last, last)]
    views = [images[:, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for y, x in windows]
    if num_views == 10:
        views += [view[:, :, ::-1] for view in views]
    return standardize(tf.cast(tf.stack(views, axis=1), tf.float32))


def distorted_inputs(data_dir, batch_size, min_fraction_of_examples_in_queue=0.4):
    """Endless shuffled batches of distorted training images. Pinned to the CPU.

    Args:
      data_dir: the folder that holds data_batch_1.bin ... data_batch_5.bin.
      min_fraction_of_examples_in_queue: images are drawn from a queue that never holds fewer
        than this part of the epoch, so that a batch mixes images from all over it. The first
        batch has to wait until the queue is that full: when the session has started.

    Returns:
      images: [batch_size, 24, 24, 3] float32, each of mean 0 and stddev 1.
      labels: [batch_size] int32.
    """
    min_queue_examples = int(num_examples(False, data_dir) * min_fraction_of_examples_in_queue)
    kind = 'CIFAR images' if class_names(data_dir) == CLASS_NAMES else 'images'
    print(
        f'Filling queue with {min_queue_examples} {kind} before starting to train. '
        'This will take a few seconds.',
        flush=True,
    )

    with tf.device('/cpu:0'), tf.name_scope('input'):
        filename_queue = tf.train.string_input_producer(data_files(False, data_dir))
        record = read_cifar10(filename_queue, RECORDS_PER_READ)
        images, labels = tf.train.shuffle_batch(
            [distort(record.uint8image), record.label[:, 0]],
            batch_size=batch_size,
            num_threads=NUM_PREPROCESS_THREADS,
            capacity=min_queue_examples + 3 * max(batch_size, RECORDS_PER_READ),
            min_after_dequeue=min_queue_examples,
            enqueue_many=True,
        )
    return images, labels


def inputs(eval_data, data_dir, batch_size, num_views=1):
    """One pass over the test set or the training set, undistorted. Pinned to the CPU.

    Every record comes exactly once, in an order that the threads decide. The
    count of epochs is a local variable (of the session, not saved): run
    `tf.local_variables_initializer()`.

    Args:
      eval_data: True for the test set, False for the training set.
      data_dir: the folder that holds the .bin files.
      batch_size: images per batch; the last batch is as small as it comes.
      num_views: 1 or 10; see fixed_views().

    Returns:
      images: [n, 24, 24, 3] float32, central crops, each of mean 0 and stddev 1; with
        num_views=10, [n, 10, 24, 24, 3].
      labels: [n] int32. n is at most batch_size.

    Raises:
      tf.errors.OutOfRangeError: when run after the last batch.
    """
    with tf.device('/cpu:0'), tf.name_scope('input'):
        filename_queue = tf.train.string_input_producer(
            data_files(eval_data, data_dir), num_epochs=1, shuffle=False
        )
        record = read_cifar10(filename_queue, RECORDS_PER_READ)
        views = fixed_views(record.uint8image, num_views)
        return tf.train.batch(
            [views[:, 0] if num_views == 1 else views, record.label[:, 0]],
            batch_size=batch_size,
            num_threads=NUM_PREPROCESS_THREADS,
            capacity=3 * max(batch_size, RECORDS_PER_READ),
            enqueue_many=True,
            allow_smaller_final_batch=True,
        )
