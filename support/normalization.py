"""Local response normalization, and its gradient in closed form."""

import tensorflow.compat.v1 as tf

RADIUS = 4
BIAS = 1.0
ALPHA = 0.001 / 9.0
BETA = 0.75


def neighbourhood_sum(values):
    """Sums each value of [n, height, width, channels] and those up to 4 channels away."""
    channels = values.shape.as_list()[-1]
    band = tf.matrix_band_part(tf.ones([channels, channels]), RADIUS, RADIUS)
    return tf.reshape(tf.matmul(tf.reshape(values, [-1, channels]), band), tf.shape(values))


def local_response_normalization(images, name=None):
    """Divides each value by s ** 0.75, where s = 1 + 0.001 / 9 * sum(neighbours ** 2).

    The neighbours of a value are those of the same pixel in its own channel and in up to 4
    channels on either side (section 3.3 of Krizhevsky et al., "ImageNet Classification with
    Deep Convolutional Neural Networks", 2012).

    TensorFlow's own op, and more so its gradient, is slow on CPUs. In closed form, with
    y = x * s ** -0.75, the gradient is

        dx = dy * s ** -0.75 - 2 * 0.75 * 0.001 / 9 * x * neighbourhood_sum(dy * y / s)

    and a sum over neighbours is a product with a band matrix of ones.

    Args:
      images: [n, height, width, channels] float32.

    Returns:
      The same shape and type.
    """

    @tf.custom_gradient
    def normalize(x):
        # s ** -0.5. Scaled first, since the square of an x above 256 is infinite in float16.
        root = tf.rsqrt(BIAS + neighbourhood_sum(tf.square(ALPHA**0.5 * x)))
        scale = root * tf.sqrt(root)  # s ** -0.75, several times as fast as a power.
        y = x * scale

        def gradient(dy):
            tail = neighbourhood_sum(dy * y * tf.square(root))
            return dy * scale - 2 * ALPHA * BETA * x * tail

        return y, gradient

    with tf.name_scope(name, 'norm'):
        return normalize(images)
