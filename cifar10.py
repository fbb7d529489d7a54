"""The CIFAR-10 model: functions that add the parts of the network to a graph.

    images, labels = distorted_inputs()     or inputs(eval_data)
    logits = inference(images)
    total_loss = loss(logits, labels)
    train_op = train(total_loss, global_step)

The network follows Alex Krizhevsky's cuda-convnet
(https://code.google.com/p/cuda-convnet/) with fully connected layers in the
place of its locally connected ones: 1,068,298 parameters. Images are
[batch, 24, 24, 3] float32, labels [batch] int32, logits [batch, 10], or as many as
the data set has classes.
"""

import os
import re

import cifar10_input
from support import checkpoints, dataset, devices
from support.normalization import local_response_normalization

import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_integer('batch_size', 128, 'Images per batch (and per tower).', lower_bound=1)
tf.flags.DEFINE_string('data_dir', '/tmp/cifar10_data', 'Folder of the data set.')
tf.flags.DEFINE_string('data_url', dataset.DATA_URL, 'Where to get the data set.')
tf.flags.DEFINE_bool('use_fp16', False, 'Compute in 16 bits where that is faster.')

DATA_URL = dataset.DATA_URL
IMAGE_SIZE = cifar10_input.IMAGE_SIZE
NUM_CLASSES = cifar10_input.NUM_CLASSES
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL

MOVING_AVERAGE_DECAY = 0.9999  # Of the variables.
NUM_EPOCHS_PER_DECAY = 350.0  # Epochs after which the learning rate drops ...
LEARNING_RATE_DECAY_FACTOR = 0.1  # ... to this part of what it was.
INITIAL_LEARNING_RATE = 0.1

# Tower i of several builds its ops in the name scope 'tower_i'.
TOWER_NAME = 'tower'


# --- Inputs ------------------------------------------------------------------


def data_folder():
    return os.path.join(FLAGS.data_dir, dataset.FOLDER)


def class_names():
    return cifar10_input.class_names(data_folder())


def maybe_download_and_extract():
    """Makes sure that the data set is in --data_dir, complete and sound.

    Raises:
      support.script.UserError: it is not, and this says what to do.
    """
    dataset.maybe_download_and_extract(
        FLAGS.data_dir, FLAGS.data_url, cifar10_input.RECORD_BYTES, len(class_names())
    )


def distorted_inputs():
    """cifar10_input.distorted_inputs() as the flags want it, shown in TensorBoard."""
    images, labels = cifar10_input.distorted_inputs(data_folder(), FLAGS.batch_size)
    tf.summary.image('images', images)
    return images, labels


def inputs(eval_data, num_views=1):
    """cifar10_input.inputs() as the flags want it, shown in TensorBoard."""
    batch_size = max(1, FLAGS.batch_size // num_views)  # For the network, views are images.
    images, labels = cifar10_input.inputs(eval_data, data_folder(), batch_size, num_views)
    tf.summary.image('images', tf.reshape(images, [-1, *images.shape.as_list()[-3:]]))
    return images, labels


# --- Inference ---------------------------------------------------------------
#
# Along the way two collections are filled, lists that the graph carries: 'losses', what
# loss() has to add up, and 'activations', what is shown in TensorBoard.


def _variable(name, shape, initializer):
    """Makes or shares a float32 variable on the CPU and returns its value.

    One read serves all uses: with the layer on a GPU each read is a copy to it.
    """
    with tf.device('/cpu:0'):
        variable = tf.get_variable(name, shape, tf.float32, initializer)
    return variable.read_value()


def weight_variable(shape, stddev, decay=None):
    """Weights from a truncated normal distribution.

    With `decay`, decay * sum(weights ** 2) / 2 joins the collection 'losses'.
    """
    weights = _variable('weights', shape, tf.truncated_normal_initializer(stddev=stddev))
    if decay is not None:
        tf.add_to_collection('losses', tf.multiply(decay, tf.nn.l2_loss(weights), name='decay'))
    return weights


def bias_variable(shape, value):
    return _variable('biases', shape, tf.constant_initializer(value))


def conv(layer, images, channels, bias):
    """[n, h, w, c] -> [n, h, w, channels]: 5x5 convolution, ReLU."""
    with tf.variable_scope(layer):
        kernel = weight_variable([5, 5, images.shape.as_list()[-1], channels], stddev=0.05)
        convolved = tf.nn.conv2d(images, kernel, strides=1, padding='SAME')
        activations = tf.nn.relu(tf.nn.bias_add(convolved, bias_variable([channels], bias)))
    tf.add_to_collection('activations', activations)
    return activations


def max_pool(name, images):
    """[n, h, w, c] -> [n, h/2, w/2, c]: the maximum of 3x3 windows, two pixels apart."""
    return tf.nn.max_pool(images, ksize=3, strides=2, padding='SAME', name=name)


def fully_connected(layer, inputs, units, stddev, bias, decay=None, activation=tf.identity):
    """[n, m] -> [n, units]: inputs * weights + biases, then the activation."""
    with tf.variable_scope(layer):
        weights = weight_variable([inputs.shape.as_list()[-1], units], stddev, decay)
        product = tf.matmul(inputs, weights)
        activations = activation(tf.nn.bias_add(product, bias_variable([units], bias)))
    tf.add_to_collection('activations', activations)
    return activations


def inference(images, num_classes=NUM_CLASSES):
    """Builds the network up to its logits.

    Args:
      images: [n, 24, 24, 3] float32 from distorted_inputs() or inputs(); n need
        not be known when the graph is built.
      num_classes: of the data set: len(class_names()).

    Returns:
      logits: [n, num_classes] float32, not normalized.
    """
    # As in cuda-convnet, the first layer pools and then normalizes, the second the reverse.
    conv1 = conv('conv1', images, 64, bias=0.0)  # [n, 24, 24, 64]
    pool1 = max_pool('pool1', conv1)  # [n, 12, 12, 64]
    norm1 = local_response_normalization(pool1, 'norm1')
    conv2 = conv('conv2', norm1, 64, bias=0.1)  # [n, 12, 12, 64]
    norm2 = local_response_normalization(conv2, 'norm2')
    pool2 = max_pool('pool2', norm2)  # [n, 6, 6, 64]
    flat = tf.reshape(pool2, [-1, pool2.shape[1:].num_elements()])  # [n, 2304]
    local3 = fully_connected('local3', flat, 384, 0.04, 0.1, decay=0.004, activation=tf.nn.relu)
    local4 = fully_connected('local4', local3, 192, 0.04, 0.1, decay=0.004, activation=tf.nn.relu)
    # No softmax here: the loss applies it itself, numerically more stable.
    return fully_connected('softmax_linear', local4, num_classes, stddev=1 / 192.0, bias=0.0)


def probabilities(images, num_classes, num_views):
    """Builds the network up to the probability of each class, averaged over an image's views.

    Args:
      images: [n, num_views, 24, 24, 3] float32 from cifar10_input.fixed_views(); a single
        view also as [n, 24, 24, 3].

    Returns:
      [n, num_classes] float32.
    """
    logits = inference(tf.reshape(images, [-1, *images.shape.as_list()[-3:]]), num_classes)
    per_view = tf.reshape(tf.nn.softmax(logits), [-1, num_views, num_classes])
    return tf.reduce_mean(per_view, axis=1)


# --- Loss --------------------------------------------------------------------


def loss(logits, labels):
    """The mean cross entropy of the batch plus the weight decay of local3 and local4.

    Args:
      logits: [n, num_classes] float32 from inference().
      labels: [n] int32.

    Returns:
      Scalar. Its terms are in the collection 'losses'; each tower adds only its own.
    """
    entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    tf.add_to_collection('losses', tf.reduce_mean(entropies, name='cross_entropy'))
    tower = tf.get_default_graph().get_name_scope()  # Such as 'tower_1'; '' without towers.
    terms = tf.get_collection('losses', scope=tower + '/' if tower else None)
    return tf.add_n(terms, name='total_loss')


# --- Training ----------------------------------------------------------------


def gradient_descent(global_step, images_per_step):
    """Plain gradient descent; the learning rate is 0.1, times 0.1 every 350 epochs.

    Args:
      global_step: the number of steps done, an integer variable.
      images_per_step: how many images, on all towers together, make a step.

    Returns:
      A tf.train.Optimizer.
    """
    num_examples = cifar10_input.num_examples(False, data_folder())
    decay_steps = int(num_examples * NUM_EPOCHS_PER_DECAY / images_per_step)
    learning_rate = tf.train.exponential_decay(
        INITIAL_LEARNING_RATE, global_step, decay_steps, LEARNING_RATE_DECAY_FACTOR, staircase=True
    )
    tf.summary.scalar('learning_rate', learning_rate)
    return devices.scale_loss(tf.train.GradientDescentOptimizer(learning_rate), FLAGS.use_fp16)


def apply_gradients(optimizer, gradients, total_loss, global_step):
    """Updates the variables, and after them their moving averages.

    Args:
      optimizer: from gradient_descent().
      gradients: pairs (gradient, variable) from optimizer.compute_gradients().
      total_loss: scalar, for TensorBoard.
      global_step: the variable that counts the steps.

    Returns:
      The op that does a whole step.
    """
    update_variables = optimizer.apply_gradients(gradients, global_step)
    # With the step, the decay is min(0.9999, (1 + step) / (10 + step)): quick at the start.
    average = tf.train.ExponentialMovingAverage(MOVING_AVERAGE_DECAY, global_step)
    with tf.name_scope('averages'), tf.control_dependencies([update_variables]):
        by_device = {}  # Parameter servers hold a part of the variables each.
        for variable in tf.trainable_variables():
            by_device.setdefault(variable.device, []).append(variable)
        update_averages = []
        for device, variables in by_device.items():
            with tf.device(device):
                update_averages.append(average.apply(variables))

    summarize_activations()
    for gradient, variable in gradients:
        _histogram(variable.op.name + '/values', variable)
        _histogram(variable.op.name + '/gradients', gradient)
    update_losses = _summarize_losses(total_loss)
    return tf.group(update_losses, *update_averages, name='train')


def train(total_loss, global_step):
    """Adds a step of training on one device. See gradient_descent() and apply_gradients()."""
    optimizer = gradient_descent(global_step, FLAGS.batch_size)
    gradients = optimizer.compute_gradients(total_loss)
    return apply_gradients(optimizer, gradients, total_loss, global_step)


# --- Summaries ---------------------------------------------------------------
#
# TensorFlow puts the name scope in front of a summary's tag, and appends _1 where the name is
# in use. So summaries are made outside of all scopes, and what they need inside 'summaries/'
# (the slash at the end opens that very scope again).


def _histogram(tag, values):
    """As tf.summary.histogram, but numbers that are not finite count as 0 and raise no error.

    In float16, gradients may overflow; the optimizer then skips the step.
    """
    with tf.name_scope('summaries/'):
        values = tf.convert_to_tensor(values)
        finite = tf.where(tf.is_finite(values), values, tf.zeros_like(values))
    tf.summary.histogram(tag, finite)


def _by_name(collection):
    """Groups a collection by name, without tower_i/: dict of name -> tensors."""
    tensors = {}
    for tensor in tf.get_collection(collection):
        name = re.sub(f'^{TOWER_NAME}_[0-9]+/', '', tensor.op.name)
        tensors.setdefault(name, []).append(tensor)
    return tensors


def summarize_activations():
    """Shows each layer's activations and the part of zeros; only the first tower's."""
    for name, towers in _by_name('activations').items():
        layer = name.split('/')[0]
        _histogram(layer + '/activations', towers[0])
        with tf.name_scope('summaries/'):
            sparsity = tf.nn.zero_fraction(towers[0])
        tf.summary.scalar(layer + '/sparsity', sparsity)


def _summarize_losses(total_loss):
    """Shows the total loss and its terms, raw and as moving averages. Means over the towers.

    Returns:
      The op that updates the averages.
    """
    losses = {'total_loss': total_loss}
    average = tf.train.ExponentialMovingAverage(0.9, zero_debias=True, name='average')
    with tf.name_scope('losses'), tf.device('/cpu:0'):
        for name, towers in _by_name('losses').items():
            losses[name] = tf.add_n(towers) / len(towers)
        with tf.variable_creator_scope(checkpoints.as_local_variable):
            update = average.apply(list(losses.values()))
    for name, value in losses.items():
        tf.summary.scalar(f'losses/{name}_raw', value)
        with tf.control_dependencies([update]):
            tf.summary.scalar('losses/' + name, average.average(value))
    return update
