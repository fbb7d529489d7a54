"""Exercise: street numbers instead of CIFAR-10.

    "Download the Street View House Numbers (SVHN) data set. Fork the CIFAR-10 tutorial and swap in
    the SVHN as the input data. Try adapting the network architecture to improve predictive
    performance."

http://ufldl.stanford.edu/housenumbers describes the files, train_32x32.mat and test_32x32.mat.
Each holds two arrays: X, [32, 32, 3, n] uint8, and y, [n, 1], where a 10 means the digit 0. Look
at distort() in cifar10_input.py: what is right for photos and wrong for digits? Write both
functions. The check makes up a file of the same format, with digits like those of a pocket
calculator, and trains the tutorial's network on them. Run `python -m exercises.street_numbers`.

Hints:
1. scipy.io.loadmat(path) returns a dict of arrays. np.transpose moves axes; np.reshape does not.
2. What does a calculator's 2 look like in a mirror?
3. tf.image.random_crop crops a single image. For a batch, look at random_crop_and_flip().

The check does not ask for another network. To go on with the real files, cifar10_convert.py turns
them into a data set for all scripts. For networks of your own, see exercises/README.md.
"""

import os
import tempfile

import numpy as np

import cifar10
import cifar10_input
from exercises import checking
from support import script
from support.compat import tf


def read_svhn(path):
    """Reads a file of SVHN.

    Returns:
      images: [n, 32, 32, 3] uint8.
      labels: [n] integers from 0 to 9, the digits.
    """
    raise checking.NotStartedError  # YOUR CODE HERE


def distort(images):
    """[n, 32, 32, 3] uint8 -> [n, 24, 24, 3] float32: random crops of digits, standardized."""
    raise checking.NotStartedError  # YOUR CODE HERE


# --- The check -----------------------------------------------------------------

# Each character is a row of three pixels: 5 is 101.
DIGITS = '75557 11111 71747 71717 55711 74717 74757 71111 75757 75717'.split()
NUM_TRAIN, STEPS = 2500, 200


def draw(digits):
    """[n] -> [n, 32, 32, 3] uint8: digits in random colors."""
    rows = np.array([list(characters) for characters in DIGITS]).astype(np.uint8)
    shapes = np.kron((rows[..., np.newaxis] >> np.array([2, 1, 0])) & 1, np.ones([1, 3, 5]))
    shapes = np.pad(shapes, [(0, 0), (8, 9), (8, 9)], 'constant')[..., np.newaxis]
    random = np.random.RandomState(0)
    paper = random.uniform(20, 120, [len(digits), 1, 1, 3])
    ink = random.uniform(40, 120, [len(digits), 1, 1, 3])
    noise = random.normal(0, 10, [len(digits), 32, 32, 3])
    return np.clip(paper + ink * shapes[digits] + noise, 0, 255).astype(np.uint8)


def check_read(answer, pixels, digits):
    try:
        import scipy.io
    except ImportError:
        raise script.UserError('the files of SVHN need SciPy: pip install scipy')
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'train_32x32.mat')
        y = np.where(digits == 0, 10, digits)[:, np.newaxis]
        scipy.io.savemat(path, {'X': pixels.transpose(1, 2, 3, 0), 'y': y})
        found = answer.read_svhn(path)
    both = isinstance(found, (tuple, list)) and len(found) == 2
    checking.expect(both, 'read_svhn() should return two arrays: return images, labels')
    images, labels = map(np.asarray, found)
    print(f'read_svhn(): images {images.shape} {images.dtype}, labels {labels.shape}')
    axes = 'the last axis of X is the image. It should be the first of [n, 32, 32, 3].'
    checking.expect(images.shape == pixels.shape, axes)
    sides = 'rows and columns are exchanged: the digits lie on their sides.'
    checking.expect(not np.array_equal(images, pixels.transpose(0, 2, 1, 3)), sides)
    mixed = 'the shape is right, but not the order of the pixels. np.reshape does not move axes.'
    checking.expect(np.array_equal(images, pixels), mixed)
    checking.expect(images.dtype == np.uint8, f'the images are {images.dtype}, not uint8.')
    checking.expect(labels.shape == digits.shape, 'y is a column, but labels should be [n].')
    checking.expect(labels.max() < 10, 'a label is 10. In these files, it means the digit 0.')
    one_less = 'each label is one less than its digit. Only the 10 has to change.'
    checking.expect(not np.array_equal(labels, (digits - 1) % 10), one_less)
    checking.expect(np.array_equal(labels, digits), 'some labels are not the digits.')


def check_distort(answer):
    """What becomes of 99 copies of an image that gets brighter from left to right?"""
    random = np.random.RandomState(0)
    image = 5 * np.arange(32)[:, np.newaxis] + random.randint(60, size=[32, 32, 1])
    with tf.Graph().as_default(), tf.Session() as session:
        images = session.run(answer.distort(tf.constant(np.tile(image, [99, 1, 1, 3]), tf.uint8)))
    checking.expect(images.shape == (99, 24, 24, 3), f'distort() returns the shape {images.shape}.')
    is_mirrored = images[:, :, :12].mean(axis=(1, 2, 3)) > images[:, :, 12:].mean(axis=(1, 2, 3))
    print(f'distort(): {is_mirrored.sum()} of 99 images are mirrored')
    checking.expect(not is_mirrored.any(), 'some digits are mirrored. In a mirror, a 2 is a 5.')
    # All are gray, so that standardize() cancels other differences than those of the crops.
    checking.expect(np.ptp(images, axis=0).max() > 0.1, 'all have the same crop. See hint 3.')
    is_standardized = abs(images.mean()) < 0.01 and abs(images.std() - 1) < 0.05
    checking.expect(is_standardized, 'the images are not standardized. See standardize().')


def inference(images):
    """A network for the check, smaller than the tutorial's: [n, 24, 24, 3] -> [n, 10] logits."""
    pool1 = cifar10.max_pool('pool1', cifar10.conv('conv1', images, 16, stddev=0.1, bias=0.1))
    flat = tf.reshape(pool1, [-1, 12 * 12 * 16])
    local2 = cifar10.fully_connected('local2', flat, 64, stddev=0.04, bias=0.1)
    return cifar10.fully_connected(
        'softmax_linear', local2, 10, stddev=1 / 64, bias=0.0, activation=tf.identity
    )


def accuracy(distort, images, labels):
    """Trains on the first images. Returns the accuracy on the others, and on their 2s and 5s."""
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(1)
        batch = tf.random_uniform([64], maxval=NUM_TRAIN, dtype=tf.int32)
        logits = inference(distort(tf.gather(images, batch)))
        loss = cifar10.loss(logits, tf.gather(labels, batch))
        step = tf.train.MomentumOptimizer(0.02, 0.9).minimize(loss)
        centers = tf.cast(cifar10_input.central_crop(images[NUM_TRAIN:]), tf.float32)
        with tf.variable_scope('', reuse=True):
            predictions = tf.argmax(inference(cifar10_input.standardize(centers)), 1)
        session.run(tf.global_variables_initializer())
        for _ in range(STEPS):
            session.run(step)
        is_correct = session.run(predictions) == labels[NUM_TRAIN:]
    return is_correct.mean(), is_correct[np.isin(labels[NUM_TRAIN:], [2, 5])].mean()


def check(answer):
    digits = np.random.RandomState(1).randint(0, 10, NUM_TRAIN + 500)
    images = draw(digits)
    check_read(answer, images, digits)
    check_distort(answer)
    for whose, distort in ("CIFAR-10's", cifar10_input.distort), ('your', answer.distort):
        overall, of_2_and_5 = accuracy(distort, images, digits)
        print(f'with {whose} distort(): accuracy {overall:.3f}, of 2 and 5 alone {of_2_and_5:.3f}')
    return (
        'a mirrored horse is a horse, but a mirrored 2 is a 5 on a calculator, and then no network '
        'can tell them apart.'
    )


if __name__ == '__main__':
    checking.run(check)
