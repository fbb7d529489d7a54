"""Exercise: the top layers of cuda-convnet.

    python exercises/locally_connected.py     or: make exercise NAME=locally_connected

A locally connected layer is a convolution whose filters are not shared: each position of the map
has weights of its own. In cuda-convnet (layers-conv-local-13pct.cfg) local3 has 64 filters of 3x3
at each position and local4 32. What its layer file fixes, and the tutorial does not say:

    local3, local4    padding 1, stride 1; initial weights 0.04; decay 0.004; biases from 0, of each
                      position's own, too
    fc10              fed by local4 as it is; initial weights 0.01; decay 0.01

That makes 2,112,970 parameters. The first loss is 7.24 and not 4.68, for there is more to decay.
(Initial weights are from the tutorial's truncated normal distribution, not from a normal one.)

With --use_fp16, in bfloat16, and TensorFlow 2.21 on an AMD EPYC (Zen 4), it printed

    precision @ 1 of /tmp/cifar10_locally_connected/model.ckpt-20000: 0.8133

One run, stopped and resumed once; the tutorial's network had 0.840 after as many steps. A step
takes 1.17 times as long as the tutorial's: 63 ms in bfloat16 on two cores, 89 ms in float32.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10
import cifar10_train
from results import record
from support import checkpoints, script
from support.normalization import local_response_normalization

import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS


def locally_connected(layer, maps, channels):
    """[n, h, w, c] -> [n, h, w, channels]: 3x3 filters of each position's own, ReLU."""
    _, height, width, depth = maps.shape.as_list()
    # Positions first, for there is a product of matrices at each: [h, w, n, c].
    padded = tf.pad(tf.transpose(maps, [1, 2, 0, 3]), [[1, 1], [1, 1], [0, 0], [0, 0]])
    # patches[y, x] are the nine pixels around (y, x), all channels of them. (tf.slice: the
    # gradient of padded[y : y + height, ...] is slow, with it a step takes 1.4 times as long.)
    shifted = [
        tf.slice(padded, [y, x, 0, 0], [height, width, -1, -1]) for y in range(3) for x in range(3)
    ]
    patches = tf.concat(shifted, axis=3)
    with tf.variable_scope(layer):
        shape = [height, width, 9 * depth, channels]
        weights = cifar10.weight_variable(shape, stddev=0.04, decay=0.004)
        biases = cifar10.bias_variable([height, width, channels], 0.0)
        products = tf.transpose(tf.matmul(patches, weights), [2, 0, 1, 3])
        activations = tf.nn.relu(products + biases)
    tf.add_to_collection('activations', activations)
    return activations


def inference(images, num_classes=cifar10.NUM_CLASSES):
    """As cifar10.inference(), but for the layers above pool2."""
    conv1 = cifar10.conv('conv1', images, 64, bias=0.0)
    norm1 = local_response_normalization(cifar10.max_pool('pool1', conv1), 'norm1')
    conv2 = cifar10.conv('conv2', norm1, 64, bias=0.1)
    pool2 = cifar10.max_pool('pool2', local_response_normalization(conv2, 'norm2'))
    local3 = locally_connected('local3', pool2, 64)
    local4 = locally_connected('local4', local3, 32)
    flat = tf.reshape(local4, [-1, local4.shape[1:].num_elements()])
    return cifar10.fully_connected('softmax_linear', flat, num_classes, 0.01, 0.0, decay=0.01)


def main():
    cifar10.inference = inference
    status = cifar10_train.main()
    if status == 0:
        path = checkpoints.newest(FLAGS.train_dir)
        print(f'precision @ 1 of {path}: {record.precision(path, averages=True):.4f}')
    return status


if __name__ == '__main__':
    FLAGS.set_default('train_dir', '/tmp/cifar10_locally_connected')
    FLAGS.set_default('max_steps', 20000)
    script.run(main)
