"""The network and its files once more, by NumPy and by hand, to compare with.

Here stands what the tests know of the model without asking the code under test.
"""

import os

import numpy as np

from support.compat import tf

TRAINING_FILES = [f'data_batch_{i}.bin' for i in range(1, 6)]
DATA_FILES = TRAINING_FILES + ['test_batch.bin']
DATA_FOLDER = 'cifar-10-batches-bin'

# Name: shape, standard deviation of the weights or value of the biases.
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
LAYERS = ['conv1', 'conv2', 'local3', 'local4', 'softmax_linear']
AVERAGE = '/ExponentialMovingAverage'
CHECKPOINT_NAMES = sorted(['global_step'] + list(MODEL) + [name + AVERAGE for name in MODEL])


# --- Records -----------------------------------------------------------------


def records(images, labels):
    """The bytes of records, from [n, 32, 32, 3] uint8 and [n]."""
    return b''.join(
        bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels)
    )


def random_images(n, seed=0, size=32):
    return np.random.RandomState(seed).randint(0, 256, [n, size, size, 3]).astype(np.uint8)


def rectangle_images(n):
    """[n, 32, 32, 3] uint8 images of colored rectangles. Unlike noise they differ."""
    random = np.random.RandomState(7)
    images = random.randint(0, 256, [n, 1, 1, 3]) + random.randint(0, 20, [n, 32, 32, 3])
    for image in images:
        for _ in range(4):
            y, x = random.randint(0, 28, 2)
            height, width = random.randint(4, 20, 2)
            image[y : y + height, x : x + width] = random.randint(0, 256, 3)
    return images.clip(0, 255).astype(np.uint8)


def write_data(data_dir, images, labels, test_images):
    """Writes the six files of a data set: the first images to the test set, the rest in fifths."""
    folder = os.path.join(str(data_dir), DATA_FOLDER)
    os.makedirs(folder)
    parts = [slice(0, test_images)]
    fifth = (len(images) - test_images) // 5
    parts += [slice(test_images + i * fifth, test_images + (i + 1) * fifth) for i in range(5)]
    for name, part in zip(['test_batch.bin'] + TRAINING_FILES, parts):
        with open(os.path.join(folder, name), 'wb') as file:
            file.write(records(images[part], labels[part]))


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
        with open(os.path.join(str(folder), name), 'wb') as file:
            file.write(records(numbered_images(numbers), numbers % 10))
        first += count


def write_zeros(folder, count, names=TRAINING_FILES):
    """Writes files of `count` black images with label 0, which take no room on the disk."""
    for name in names:
        with open(os.path.join(str(folder), name), 'wb') as file:
            file.truncate(count * 3073)


# --- Checkpoints -------------------------------------------------------------


def random_variables(seed=0, **scale):
    """A value for each of the ten variables, biases too; by default of initial size.

    Args:
      scale: layer=factor for its variables.
    """
    random = np.random.RandomState(seed)
    return {
        name: (random.normal(0, stddev or 0.1, shape) * scale.get(name.split('/')[0], 1)).astype(
            np.float32
        )
        for name, (shape, stddev) in MODEL.items()
    }


def variables_of_seven_classes(seed):
    """As random_variables(), far apart in what they predict."""
    values = random_variables(seed, local3=3, local4=3, softmax_linear=20)
    last = {name: values[name][..., :7] for name in values if 'softmax' in name}
    return dict(values, **last)


def checkpoint_values(step, variables, averages):
    """All 21 values of a checkpoint, by name."""
    values = {name + AVERAGE: value for name, value in averages.items()}
    values.update(variables, global_step=np.int64(step))
    return values


def write_checkpoint(folder, step, values):
    """Writes a checkpoint without any help of the code under test. Returns its path."""
    path = os.path.join(str(folder), f'model.ckpt-{step}')
    os.makedirs(str(folder), exist_ok=True)
    names = sorted(values)
    with tf.Graph().as_default(), tf.Session() as session:
        session.run(
            tf.raw_ops.SaveV2(
                prefix=path,
                tensor_names=names,
                shape_and_slices=[''] * len(names),
                tensors=[tf.constant(values[name]) for name in names],
            )
        )
    return path


def read_checkpoint(path):
    """Dict of name -> value."""
    reader = tf.train.load_checkpoint(str(path))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


# --- The network -------------------------------------------------------------


def standardize(images):
    """(x - mean) / max(stddev, 1 / sqrt(number of values)), image by image."""
    images = images.astype(np.float64)
    deviation = images.std(axis=(1, 2, 3), keepdims=True)
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return (images - mean) / np.maximum(deviation, images[0].size ** -0.5)


def convolution(images, kernel):
    """5x5, SAME: two rows and columns of zeros on each side."""
    _, height, width, _ = images.shape
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], mode='constant')
    return sum(
        np.dot(padded[:, i : i + height, j : j + width], kernel[i, j])
        for i in range(5)
        for j in range(5)
    )


def max_pool(images):
    """3x3, stride 2, SAME: an even size needs one row and column, which go behind."""
    _, height, width, _ = images.shape
    padding = [(0, 0), (0, 1), (0, 1), (0, 0)]
    padded = np.pad(images, padding, mode='constant', constant_values=-np.inf)
    windows = [padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return np.max(windows, axis=0)


def normalization(images):
    """Over the channel itself and up to four on either side."""
    squares = np.stack(
        [
            np.sum(images[..., max(0, channel - 4) : channel + 5] ** 2, axis=-1)
            for channel in range(images.shape[-1])
        ],
        axis=-1,
    )
    return images / (1 + 0.001 / 9 * squares) ** 0.75


def logits(variables, images):
    """[n, 24, 24, 3] -> [n, 10]."""

    def relu(x):
        return np.maximum(x, 0)

    values = {name: value.astype(np.float64) for name, value in variables.items()}
    x = images.astype(np.float64)
    x = relu(convolution(x, values['conv1/weights']) + values['conv1/biases'])
    x = normalization(max_pool(x))
    x = relu(convolution(x, values['conv2/weights']) + values['conv2/biases'])
    x = max_pool(normalization(x)).reshape(len(images), -1)
    x = relu(np.dot(x, values['local3/weights']) + values['local3/biases'])
    x = relu(np.dot(x, values['local4/weights']) + values['local4/biases'])
    return np.dot(x, values['softmax_linear/weights']) + values['softmax_linear/biases']


def evaluation_logits(variables, images):
    """[n, 32, 32, 3] uint8 -> [n, 10]: what the evaluator has to find."""
    return logits(variables, standardize(images[:, 4:28, 4:28]))


def probabilities(variables, images, num_views):
    """[n, 32, 32, 3] uint8 -> [n, classes]: softmax outputs, averaged over one view or ten."""
    edge = images.shape[1] // 4
    middle, first, last = slice(edge // 2, -edge // 2), slice(None, -edge), slice(edge, None)
    views = [images[:, middle, middle]]
    if num_views == 10:
        views += [images[:, y, x] for y in (first, last) for x in (first, last)]
        views += [np.flip(view, axis=2) for view in views]
    shares = [np.exp(logits(variables, standardize(view))) for view in views]
    return np.mean([each / each.sum(axis=1, keepdims=True) for each in shares], axis=0)


def cross_entropy(logits, labels):
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    return np.mean(log_sum - shifted[np.arange(len(labels)), labels])


def decay(variables):
    """The weight decay in the loss."""
    return sum(
        0.004 * np.sum(variables[layer + '/weights'].astype(np.float64) ** 2) / 2
        for layer in ('local3', 'local4')
    )
