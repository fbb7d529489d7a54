"""Trains the CIFAR-10 network on several GPUs of one machine, synchronously.

    python cifar10_multi_gpu_train.py --num_gpus=2

Each GPU holds a tower, a replica of the model. In a step every tower computes the
gradients for a batch of its own; the CPU, which holds the variables, averages
them and updates the variables once:

    input -> batches -+-> tower_0 (GPU 0) -> gradients -+
                      +-> tower_1 (GPU 1) -> gradients -+-> average -> update (CPU)
                               ^                                          |
                               +------------- variables (CPU) <-----------+

With fewer GPUs than asked for, the towers share what there is. Everything else,
the flags, the log, the checkpoints and how to stop and resume, is as in
cifar10_train.py; either script goes on with what the other one began.
"""

import cifar10
import cifar10_train
from support import script

import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_integer('num_gpus', 1, 'How many GPUs to use, one tower on each.', lower_bound=1)
tf.flags.adopt_module_key_flags(cifar10_train)


def shared_batches():
    """A queue of batches (images, labels), filled from the one input pipeline.

    A tensor has one value in a step: towers on the same `images` would see the same batch.
    So each tower takes a batch of its own from this queue.
    """
    images, labels = cifar10.distorted_inputs()
    capacity = 2 * FLAGS.num_gpus
    with tf.device('/cpu:0'):
        batches = tf.FIFOQueue(
            capacity, [images.dtype, labels.dtype], [images.shape, labels.shape], name='batches'
        )
        tf.train.add_queue_runner(
            tf.train.QueueRunner(batches, [batches.enqueue([images, labels])])
        )
        tf.summary.scalar(
            f'input/batches/fraction_of_{capacity}_full',
            tf.cast(batches.size(), tf.float32) / capacity,
        )
    return batches


def tower_loss(batches):
    """The loss of one tower on the next batch from the queue. A scalar."""
    with tf.device('/cpu:0'):
        images, labels = batches.dequeue()
    logits = cifar10.inference(images, len(cifar10.class_names()))
    return cifar10.loss(logits, labels)


def average_gradients(tower_gradients):
    """Averages the gradients of all towers, where the variables are.

    Args:
      tower_gradients: for each tower the list of (gradient, variable) that
        compute_gradients() returned.

    Returns:
      One such list, of the mean gradients.
    """
    averaged = []
    with tf.name_scope('average_gradients'):
        for pairs in zip(*tower_gradients):
            gradients, variables = zip(*pairs)
            with tf.device(variables[0].device):
                averaged.append((tf.add_n(gradients) / len(gradients), variables[0]))
    return averaged


def build_step(global_step):
    """Builds the training graph for --num_gpus towers. Returns a cifar10_train.Step."""
    images_per_step = FLAGS.batch_size * FLAGS.num_gpus
    batches = shared_batches()
    optimizer = cifar10.gradient_descent(global_step, images_per_step)
    losses, gradients = [], []
    # A name scope is a prefix for ops only. The variables have none: with AUTO_REUSE the second
    # tower gets the 'conv1/weights' that the first one has made.
    with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
        for i in range(FLAGS.num_gpus):
            with tf.name_scope(f'{cifar10.TOWER_NAME}_{i}'), tf.device(f'/gpu:{i}'):
                losses.append(tower_loss(batches))
                gradients.append(optimizer.compute_gradients(losses[-1]))
    with tf.device('/cpu:0'):
        loss = tf.add_n(losses) / len(losses)
    train_op = cifar10.apply_gradients(optimizer, average_gradients(gradients), loss, global_step)
    return cifar10_train.Step(train_op, loss, images_per_step, target='')


def main():
    return cifar10_train.train(build_step)


if __name__ == '__main__':
    script.run(main)
