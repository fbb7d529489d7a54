"""Trains the CIFAR-10 network on several GPUs of one machine, synchronously.

    python cifar10_multi_gpu_train.py --num_gpus=2

Each GPU holds a tower, a copy of the network. In a step every tower computes the gradients for its
own batch. The variables are on the CPU, which averages the gradients and does one update:

    input -> batches -+-> tower_0 (GPU 0) -> gradients -+
                      +-> tower_1 (GPU 1) -> gradients -+-> average -> update (CPU)
                               ^                                          |
                               +------------- variables (CPU) <-----------+

Flags, log, checkpoints, and how to stop and resume are the same as in cifar10_train.py, and each
of the two scripts resumes the other's runs.
"""

import cifar10
import cifar10_train
from support import devices, flags, script
from support.compat import tf

FLAGS = flags.FLAGS
flags.DEFINE_integer('num_gpus', 1, 'How many GPUs to use, one tower on each.', lower_bound=1)
flags.adopt_module_key_flags(cifar10_train)


def shared_batches(model):
    """A queue of batches (images, labels), filled from one input pipeline.

    A tensor has one value in a step, so towers that read the same `images` would get the same
    batch. Instead, each tower takes its own batch from this queue.
    """
    images, labels = model.distorted_inputs()
    types, shapes = [images.dtype, labels.dtype], [images.shape, labels.shape]
    with tf.device('/cpu:0'):
        batches = tf.FIFOQueue(2 * FLAGS.num_gpus, types, shapes, name='batches')
        enqueue = batches.enqueue([images, labels])
        tf.train.add_queue_runner(tf.train.QueueRunner(batches, [enqueue]))  # One op, one thread.
    return batches


def tower_loss(model, batches):
    """The loss of one tower on the next batch from the queue. A scalar."""
    with tf.device('/cpu:0'):
        images, labels = batches.dequeue()
    logits = model.inference(images)
    return model.loss(logits, labels)


def average_gradients(tower_grads):
    """Averages the gradients of all towers, on the CPU.

    Args:
      tower_grads: for each tower the list of (gradient, variable) that compute_gradients() gave.

    Returns:
      One such list, of the mean gradients.
    """
    averaged = []
    with tf.name_scope('average_gradients'), tf.device('/cpu:0'):
        for pairs in zip(*tower_grads):
            gradients, variables = zip(*pairs)
            averaged.append((tf.add_n(gradients) / len(gradients), variables[0]))
    return averaged


def build_towers(model, batches_and_devices):
    """Builds a tower for each pair (queue of batches, device). See cifar10_train.build()."""
    images_per_step = FLAGS.batch_size * len(batches_and_devices)
    with tf.device('/cpu:0'):
        global_step = tf.train.get_or_create_global_step()
    optimizer = model.optimizer(global_step, images_per_step)
    losses, tower_grads = [], []
    summaries = tf.get_collection_ref(tf.GraphKeys.SUMMARIES)
    # A name scope is a prefix for the names of ops. Variables do not get it: with AUTO_REUSE, the
    # second tower gets the 'conv1/weights' that the first one has created.
    with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
        for i, (batches, device) in enumerate(batches_and_devices):
            with tf.name_scope(f'{cifar10.TOWER_NAME}_{i}'), tf.device(device):
                losses.append(tower_loss(model, batches))
                tower_grads.append(optimizer.compute_gradients(losses[-1]))
            if i == 0:
                num_summaries = len(summaries)
    del summaries[num_summaries:]  # Keep those of tower 0. The others would show the same layers.
    with tf.device('/cpu:0'):
        loss = tf.add_n(losses) / len(losses)
    gradients = average_gradients(tower_grads)
    train_op = model.apply_gradients(optimizer, gradients, loss, global_step)
    return train_op, loss, images_per_step


def build(model):
    """Builds the graph for --num_gpus towers on this machine."""
    batches = shared_batches(model)
    return build_towers(model, [(batches, f'/gpu:{i}') for i in range(FLAGS.num_gpus)])


def train(model=cifar10):
    """As cifar10_train.train(), on --num_gpus GPUs.

    Calls model.optimizer() and model.apply_gradients() instead of model.train().
    """
    return cifar10_train.train(model, build)


def main(argv=None):
    script.output_folder('train_dir')  # Fail before the download, which takes minutes.
    cifar10.maybe_download_and_extract()
    print(devices.describe(FLAGS.use_fp16, FLAGS.num_gpus))
    return train()


if __name__ == '__main__':
    script.run(main)
