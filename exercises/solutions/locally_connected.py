"""Solution: the top layers of cuda-convnet."""

import cifar10
from support.compat import tf


def locally_connected(name, images, channels):
    _, height, width, depth = images.shape.as_list()
    # Positions first, because there is one product of matrices for each: [h, w, n, depth].
    padded = tf.pad(tf.transpose(images, [1, 2, 0, 3]), [[1, 1], [1, 1], [0, 0], [0, 0]])
    # patches[y, x] holds the nine pixels around (y, x): [h, w, n, 9 * depth]. tf.slice, because the
    # gradient of padded[y : y + height, ...] is slow.
    patches = tf.concat(
        [
            tf.slice(padded, [y, x, 0, 0], [height, width, -1, -1])
            for y in range(3)
            for x in range(3)
        ],
        axis=3,
    )
    with tf.variable_scope(name):
        shape = [height, width, 9 * depth, channels]
        weights = cifar10._variable_with_weight_decay('weights', shape, stddev=0.04, wd=0.004)
        # Nothing is shared between positions, so each has its own biases, too.
        biases = cifar10._variable_on_cpu(
            'biases', [height, width, channels], tf.zeros_initializer()
        )
        products = tf.transpose(tf.matmul(patches, weights), [2, 0, 1, 3])
        activations = tf.nn.relu(products + biases, name=name)
    cifar10._activation_summary(activations)
    return activations


def inference(images):
    images = tf.cast(images, tf.float32)
    conv1 = cifar10.conv('conv1', images, 64, stddev=0.05, bias=0.0)
    norm1 = cifar10.local_response_normalization('norm1', cifar10.max_pool('pool1', conv1))
    conv2 = cifar10.conv('conv2', norm1, 64, stddev=0.05, bias=0.1)
    pool2 = cifar10.max_pool('pool2', cifar10.local_response_normalization('norm2', conv2))
    local3 = locally_connected('local3', pool2, 64)
    local4 = locally_connected('local4', local3, 32)
    flat = tf.reshape(local4, [-1, local4.shape[1:].num_elements()])
    return cifar10.fully_connected(
        'softmax_linear',
        flat,
        cifar10.num_classes(),
        stddev=0.01,
        bias=0.0,
        wd=0.01,
        activation=tf.identity,
    )
