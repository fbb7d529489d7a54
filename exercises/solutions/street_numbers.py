"""Solution: street numbers instead of CIFAR-10."""

import numpy as np
import scipy.io

import cifar10_input
from support.compat import tf


def read_svhn(path):
    contents = scipy.io.loadmat(path)
    images = np.transpose(contents['X'], [3, 0, 1, 2])  # The last axis is the image.
    labels = contents['y'][:, 0] % 10  # A column of numbers from 1 to 10; 10 means the digit 0.
    return images, labels


def distort(images):
    # As cifar10_input.random_crop_and_flip(), without the flip: a mirrored 2 is no 2.
    n = tf.shape(images)[0]
    rows = tf.random_uniform([n, 1], maxval=9, dtype=tf.int32) + tf.range(24)
    columns = tf.random_uniform([n, 1], maxval=9, dtype=tf.int32) + tf.range(24)
    crops = tf.gather(images, rows, axis=1, batch_dims=1)
    crops = tf.cast(tf.gather(crops, columns, axis=2, batch_dims=1), tf.float32)
    return cifar10_input.standardize(cifar10_input.random_contrast(crops))
