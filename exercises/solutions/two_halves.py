"""Solution: two towers with half of a batch each."""

import cifar10_multi_gpu_train
from support.compat import tf


def gradients(model, optimizer, images, labels):
    towers = []
    halves = zip(tf.split(images, 2), tf.split(labels, 2))
    # The second tower gets the variables of the first one.
    with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
        for i, (images, labels) in enumerate(halves):
            # In the scope of a tower, loss() sums only the terms of this tower.
            with tf.name_scope(f'tower_{i}'), tf.device(f'/gpu:{i}'):
                loss = model.loss(model.inference(images), labels)
                towers.append(optimizer.compute_gradients(loss))
    # The mean over 128 images is the mean of two means over 64.
    return cifar10_multi_gpu_train.average_gradients(towers)
