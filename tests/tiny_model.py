"""A network of 40 parameters, for tests that are about the run and not about the network."""

import cifar10
from support.compat import tf


class TinyModel:
    """A model for cifar10_train.train(model) and cifar10_multi_gpu_train.train(model).

    Args:
      each_step: function of the number of steps that this model has done. It is called during each
        step. If it returns a number, the loss is multiplied by it.
    """

    optimizer = staticmethod(cifar10.optimizer)
    apply_gradients = staticmethod(cifar10.apply_gradients)
    train = staticmethod(cifar10.train)

    def __init__(self, each_step=lambda step: None):
        self._each_step, self._steps = each_step, 0

    def distorted_inputs(self):
        return tf.ones([8, 3]), tf.zeros([8], tf.int32)

    def inference(self, images):
        return cifar10.fully_connected(
            'softmax_linear', images, 10, stddev=0.1, bias=0.0, activation=tf.identity
        )

    def loss(self, logits, labels):
        factor = tf.reshape(tf.py_func(self._step, [], tf.float32), [])
        return cifar10.loss(logits, labels) * factor

    def _step(self):
        factor = self._each_step(self._steps)
        self._steps += 1
        return tf.float32.as_numpy_dtype(1 if factor is None else factor)
