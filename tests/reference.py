"""The network and its files once more, without the code under test: NumPy, to compare with."""

import pathlib

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


def records(images, labels):
    """The bytes of records, from [n, 32, 32, 3] uint8 and [n]."""
    planes = [image.transpose(2, 0, 1).tobytes() for image in images]
    return b''.join(bytes([label]) + each for label, each in zip(labels, planes))


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
    folder = pathlib.Path(str(data_dir), DATA_FOLDER)
    folder.mkdir(parents=True)
    fifth = (len(images) - test_images) // 5
    ends = test_images + fifth * np.arange(6)
    for name, begin, end in zip(['test_batch.bin'] + TRAINING_FILES, [0, *ends], ends):
        (folder / name).write_bytes(records(images[begin:end], labels[begin:end]))


def numbered_images(numbers):
    """[n, 32, 32, 3] uint8 images whose numbers can be read after any distortion."""
    # Tiles of 8x8, so that any window holds the same. The bright pixels of a channel are a digit.
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
    parts = np.split(np.arange(sum(counts)), np.cumsum(counts))
    for name, numbers in zip(names, parts):
        data = records(numbered_images(numbers), numbers % 10)
        pathlib.Path(str(folder), name).write_bytes(data)


def write_zeros(folder, count, names=TRAINING_FILES):
    """Writes files of `count` black images with label 0, which take no room on the disk."""
    for name in names:
        with pathlib.Path(str(folder), name).open('wb') as file:
            file.truncate(count * 3073)


def random_variables(seed=0, **scale):
    """Values for the ten variables: of initial size, times a factor for a layer in `scale`."""
    random, values = np.random.RandomState(seed), {}
    for name, (shape, stddev) in MODEL.items():
        factor = scale.get(name.split('/')[0], 1)
        values[name] = np.float32(random.normal(0, stddev or 0.1, shape) * factor)
    return values


def variables_of_seven_classes(seed):
    """As random_variables(), far apart in what they predict."""
    values = random_variables(seed, local3=3, local4=3, softmax_linear=20)
    return {name: values[name][..., : 7 if 'softmax' in name else None] for name in values}


def checkpoint_values(step, variables, averages):
    """All 21 values of a checkpoint, by name."""
    averages = {name + AVERAGE: averages[name] for name in averages}
    return dict(averages, **variables, global_step=np.int64(step))


def write_checkpoint(folder, step, values):
    """Writes a checkpoint without any help of the code under test. Returns its path."""
    path = f'{folder}/model.ckpt-{step}'
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    names = sorted(values)
    where = dict(prefix=path, tensor_names=names, shape_and_slices=[''] * len(names))
    with tf.Graph().as_default(), tf.Session() as session:
        tensors = [tf.constant(values[name]) for name in names]
        session.run(tf.raw_ops.SaveV2(tensors=tensors, **where))
    return path


def read_checkpoint(path):
    """Dict of name -> value."""
    reader = tf.train.load_checkpoint(str(path))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def standardize(images):
    """(x - mean) / max(stddev, 1 / sqrt(number of values)), image by image."""
    images, each = images.astype(np.float64), dict(axis=(1, 2, 3), keepdims=True)
    return (images - images.mean(**each)) / np.maximum(images.std(**each), images[0].size ** -0.5)


def convolution(images, kernel):
    """5x5, SAME: two rows and columns of zeros on each side."""
    _, height, width, _ = images.shape
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], mode='constant')
    windows = [padded[:, i : i + height, j : j + width] for i in range(5) for j in range(5)]
    return sum(map(np.dot, windows, kernel.reshape(25, *kernel.shape[2:])))


def max_pool(images):
    """3x3, stride 2, SAME: an even size needs one row and column, which go behind."""
    _, height, width, _ = images.shape
    padded = np.pad(images, [(0, 0), (0, 1), (0, 1), (0, 0)], 'constant', constant_values=-np.inf)
    windows = [padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return np.max(windows, axis=0)


def normalization(images):
    """Over the channel itself and up to four on either side."""
    padded = np.pad(images**2, [(0, 0), (0, 0), (0, 0), (4, 4)], mode='constant')
    squares = sum(padded[..., i : i + images.shape[-1]] for i in range(9))
    return images / (1 + 0.001 / 9 * squares) ** 0.75


def logits(variables, images):
    """[n, 24, 24, 3] -> [n, 10]."""

    def layer(name, x, multiply=np.dot, lowest=0):
        weights, biases = np.float64(variables[name + '/weights']), variables[name + '/biases']
        return np.maximum(multiply(x, weights) + biases, lowest)

    x = normalization(max_pool(layer('conv1', images, convolution)))
    x = max_pool(normalization(layer('conv2', x, convolution)))
    x = layer('local3', x.reshape(len(images), -1))
    return layer('softmax_linear', layer('local4', x), lowest=-np.inf)


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
    shares = np.exp([logits(variables, standardize(view)) for view in views])
    return np.mean(shares / shares.sum(axis=2, keepdims=True), axis=0)


def cross_entropy(logits, labels):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels])


def decay(variables):
    """The weight decay in the loss."""
    weights = [np.float64(variables[layer + '/weights']) for layer in ('local3', 'local4')]
    return sum(0.004 * np.sum(each**2) / 2 for each in weights)
