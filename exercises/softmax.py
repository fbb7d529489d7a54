"""Exercise: inference() returns probabilities, by tf.nn.softmax.

    python exercises/softmax.py     or: make exercise NAME=softmax

Three functions change. inference() gets a softmax at its end. The precision stays the same, to the
image: a softmax changes no order. loss() applies a softmax of its own, so it has to be given
logits again, and the logarithms of the probabilities are such. Forget that, and you see a loss
that hardly falls: a softmax of numbers from 0 to 1 gives no class more than e / (e + 9) = 0.23.
So the softmax of probabilities(), for the evaluator, prediction and export, has to go, too.

It is the same loss only on paper. Once a logit is ahead by some hundred, the others' probability
is 0 in float32 and its logarithm minus infinity. tf.nn.softmax_cross_entropy_with_logits never
forms the probability; that is why the tutorial returns logits.

15 seconds on two cores of an AMD EPYC (Zen 4), with TensorFlow 2.21:

    inference() returns logits: precision 0.8661
      first loss 4.671840
      a wrong logit ahead by 20: loss 20.0, gradient -1.0
      a wrong logit ahead by 200: loss 200.0, gradient -1.0
    inference() returns probabilities: precision 0.8661
      first loss 4.671840
      a wrong logit ahead by 20: loss 20.0, gradient -1.0
      a wrong logit ahead by 200: loss inf, gradient nan
    The gradients differ by 1.6e-06 of the largest at most.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10
from results import record
from support import checkpoints, script

import numpy as np
import tensorflow.compat.v1 as tf

original = {name: getattr(cifar10, name) for name in ('inference', 'loss', 'probabilities')}


def inference(images, num_classes=cifar10.NUM_CLASSES):
    """As cifar10.inference(), but normalized: [n, num_classes], rows that add up to 1."""
    return tf.nn.softmax(original['inference'](images, num_classes))


def loss(probabilities, labels):
    """As cifar10.loss(), of what inference() returns here."""
    return original['loss'](tf.log(probabilities), labels)


def probabilities(images, num_classes, num_views):
    """As cifar10.probabilities(), of what inference() returns here."""
    outputs = inference(tf.reshape(images, [-1, *images.shape.as_list()[-3:]]), num_classes)
    return tf.reduce_mean(tf.reshape(outputs, [-1, num_views, num_classes]), axis=1)


def loss_and_gradients(functions, images, labels):
    """Of the network with its initial weights, the same for all `functions`."""
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(1)
        total = functions['loss'](functions['inference'](tf.constant(images)), labels)
        gradients = tf.gradients(total, tf.trainable_variables())
        session.run(tf.global_variables_initializer())
        return session.run([total, gradients])


def logit_ahead(functions, lead):
    """The loss, and its gradient, where a wrong class is so far ahead of the right one."""
    with tf.Graph().as_default(), tf.Session() as session:
        logits = tf.constant([[lead, 0.0]])
        output = tf.nn.softmax(logits) if functions is not original else logits
        total = functions['loss'](output, [1])
        return session.run([total, tf.gradients(total, logits)[0][0, 1]])


def main():
    replaced = {'inference': inference, 'loss': loss, 'probabilities': probabilities}
    cifar10.maybe_download_and_extract()
    path = checkpoints.newest(record.FLAGS.checkpoint_dir, required=True)
    images = np.random.RandomState(0).normal(size=[128, 24, 24, 3]).astype(np.float32)
    labels = np.arange(128) % 10
    found = []
    for name, functions in ('logits', original), ('probabilities', replaced):
        vars(cifar10).update(functions)
        total, gradients = loss_and_gradients(functions, images, labels)
        found.append(gradients)
        print(f'inference() returns {name}: precision {record.precision(path, True):.4f}')
        print(f'  first loss {total:.6f}')
        for lead in 20.0, 200.0:
            print(
                '  a wrong logit ahead by %.0f: loss %s, gradient %s'
                % (lead, *logit_ahead(functions, lead))
            )
    gap = max(abs(a - b).max() / abs(a).max() for a, b in zip(*found))
    print(f'The gradients differ by {gap:.1e} of the largest at most.')


if __name__ == '__main__':
    record.FLAGS.set_default('checkpoint_dir', os.path.dirname(record.__file__))
    script.run(main)
