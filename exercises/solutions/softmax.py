"""Solution: probabilities instead of logits."""

import cifar10
from support.compat import tf


def inference(images):
    return tf.nn.softmax(cifar10.inference(images))


def loss(probabilities, labels):
    # softmax(log(p)) = p, so logarithms of probabilities are logits. A probability of 0 has none:
    # then the smallest one is used, the loss stays finite, and the gradient becomes 0.
    return cifar10.loss(tf.log(tf.maximum(probabilities, 1e-30)), labels)
