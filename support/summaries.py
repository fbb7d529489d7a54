"""Summaries for TensorBoard, with the same tags for one device and for several towers.

tf.name_scope(None) keeps the scope of the caller out of the tags.
"""

import re

from support import checkpoints
from support.compat import tf

# With several towers, tower i builds its ops in the name scope 'tower_i'.
TOWER_NAME = 'tower'


def tower_scope():
    """The name scope of the tower whose ops are being built, such as 'tower_0/', or None."""
    name_scope = tf.get_default_graph().get_name_scope() or ''
    match = re.match(f'(.*/)?{TOWER_NAME}_[0-9]+/', name_scope + '/')
    return match and match.group()


def without_tower(name):
    """tower_0/conv1/Conv2D -> conv1/Conv2D."""
    return re.sub(f'(^|/){TOWER_NAME}_[0-9]+/', r'\1', name)


def layer_name(x):
    """The name of a layer's output for tags: tower_0/conv1/conv1 -> conv1."""
    return re.sub(r'([^/]+)/\1$', r'\1', without_tower(x.op.name))


def scalar(tag, value):
    """Shows a number as a curve over the steps."""
    with tf.name_scope(None):
        tf.summary.scalar(tag, value)


def histogram(tag, values):
    """Shows a distribution. Replaces values that are not finite by 0.

    tf.summary.histogram() raises for them. In float16, gradients may overflow; the optimizer then
    skips the step.
    """
    values = tf.convert_to_tensor(values)
    finite = tf.where(tf.is_finite(values), values, tf.zeros_like(values))
    with tf.name_scope(None):
        tf.summary.histogram(tag, finite)


def losses(total_loss):
    """Shows the total loss and its terms, each the mean over the towers: raw and averaged.

    Args:
      total_loss: scalar, the sum of the terms in the collection 'losses'.

    Returns:
      The op that updates the averages.
    """
    by_name = {}
    for term in tf.get_collection('losses'):
        by_name.setdefault(without_tower(term.op.name), []).append(term)
    average = tf.train.ExponentialMovingAverage(0.9, zero_debias=True, name='average')
    with tf.name_scope('losses'), tf.device('/cpu:0'):
        values = {name: tf.add_n(terms) / len(terms) for name, terms in by_name.items()}
        values['total_loss'] = tf.identity(total_loss)
        with tf.variable_creator_scope(checkpoints.not_saved):
            update = average.apply(list(values.values()))
    for name, value in values.items():
        with tf.control_dependencies([update]):
            scalar(f'losses/{name}_raw', value)
            scalar('losses/' + name, average.average(value))
    return update
