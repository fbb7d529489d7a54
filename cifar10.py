"""The CIFAR-10 model: functions that add the parts of the network to a graph.

    images, labels = distorted_inputs()     or inputs(eval_data)
    logits = inference(images)
    total_loss = loss(logits, labels)
    train_op = train(total_loss, global_step)

The network follows Alex Krizhevsky's cuda-convnet (https://code.google.com/p/cuda-convnet/), but
its top layers are fully connected instead of locally connected. It has 1,068,298 parameters.
Images are [batch, 24, 24, 3] float32, labels [batch] integers, logits [batch, 10] float32.
"""

import os

import cifar10_input
from support import dataset, devices, flags, summaries, views
from support.compat import tf

FLAGS = flags.FLAGS
flags.DEFINE_integer('batch_size', 128, 'Images per batch (and per tower).', lower_bound=1)
flags.DEFINE_string('data_dir', '/tmp/cifar10_data', 'Folder of the data set.')
flags.DEFINE_bool('use_fp16', False, 'Compute in 16 bits where that is faster.')
flags.adopt_module_key_flags(dataset)

# Programs read these, and may assign DATA_URL, NUM_CLASSES and NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN.
DATA_URL = dataset.DATA_URL
IMAGE_SIZE = cifar10_input.IMAGE_SIZE
NUM_CLASSES = cifar10_input.NUM_CLASSES
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL

MOVING_AVERAGE_DECAY = 0.9999  # Of the variables.
NUM_EPOCHS_PER_DECAY = 350.0  # Epochs after which the learning rate drops ...
LEARNING_RATE_DECAY_FACTOR = 0.1  # ... by this factor.
INITIAL_LEARNING_RATE = 0.1

TOWER_NAME = summaries.TOWER_NAME
_add_loss_summaries = summaries.losses


# --- Inputs --------------------------------------------------------------------


def data_folder():
    return os.path.join(FLAGS.data_dir, dataset.FOLDER)


def class_names():
    return dataset.class_names(data_folder())


def num_classes():
    """NUM_CLASSES if a program has changed it, otherwise the number of classes in the data set."""
    if NUM_CLASSES != len(dataset.CLASS_NAMES):
        return NUM_CLASSES
    return len(class_names())


def maybe_download_and_extract():
    """Makes sure that --data_dir holds the data set, or raises a UserError that says what to do."""
    dataset.maybe_download_and_extract(cifar10_input.RECORD_BYTES, DATA_URL)


def distorted_inputs():
    """cifar10_input.distorted_inputs() with the flags' values, shown in TensorBoard."""
    images, labels = cifar10_input.distorted_inputs(data_folder(), FLAGS.batch_size)
    tf.summary.image('images', images)
    return images, labels


def inputs(eval_data, num_epochs=None, num_views=1):
    """cifar10_input.inputs() with the flags' values, shown in TensorBoard."""
    batch_size = max(1, FLAGS.batch_size // num_views)  # The network gets --batch_size views.
    crop = views.cropper(num_views, cifar10_input.IMAGE_SIZE)
    images, labels = cifar10_input.inputs(eval_data, data_folder(), batch_size, num_epochs, crop)
    tf.summary.image('images', tf.reshape(images, [-1, *images.shape.as_list()[-3:]]))
    return images, labels


# --- Layers --------------------------------------------------------------------


def _activation_summary(x):
    """Shows the distribution of a layer's outputs, and how many of them are 0, in TensorBoard."""
    layer = summaries.layer_name(x)
    summaries.histogram(layer + '/activations', x)
    summaries.scalar(layer + '/sparsity', tf.nn.zero_fraction(x))


def _variable_on_cpu(name, shape, initializer):
    """Creates a float32 variable, or returns the one of this name if the scope allows reuse.

    It is on the CPU, where all towers can share it. A GPU copies its value in each step.
    """
    with tf.device('/cpu:0'):
        return tf.get_variable(name, shape, tf.float32, initializer)


def _variable_with_weight_decay(name, shape, stddev, wd):
    """Creates a variable with initial values from a truncated normal distribution.

    Args:
      stddev: its standard deviation; values farther than 2 * stddev from 0 are drawn again.
      wd: None, or the factor of the weight decay: wd * sum(variable ** 2) / 2 is added to the
        collection 'losses', a named list stored in the graph that loss() reads.
    """
    variable = _variable_on_cpu(name, shape, tf.truncated_normal_initializer(stddev=stddev))
    if wd is not None:
        decay = tf.multiply(wd, tf.nn.l2_loss(variable), name='weight_loss')
        tf.add_to_collection('losses', decay)
    return variable


def conv(name, images, channels, *, stddev, bias):
    """[n, h, w, c] -> [n, h, w, channels]: 5x5 convolution, ReLU."""
    with tf.variable_scope(name):
        shape = [5, 5, images.shape.as_list()[-1], channels]
        kernel = _variable_with_weight_decay('weights', shape, stddev, wd=None)
        biases = _variable_on_cpu('biases', [channels], tf.constant_initializer(bias))
        convolved = tf.nn.conv2d(images, kernel, strides=[1, 1, 1, 1], padding='SAME')
        activations = tf.nn.relu(tf.nn.bias_add(convolved, biases), name=name)
    _activation_summary(activations)
    return activations


def max_pool(name, images):
    """[n, h, w, c] -> [n, h/2, w/2, c]: the maximum of 3x3 windows, two pixels apart.

    The windows overlap by a pixel. Krizhevsky found that networks then overfit slightly less.
    """
    return tf.nn.max_pool(images, [1, 3, 3, 1], [1, 2, 2, 1], padding='SAME', name=name)


def local_response_normalization(name, images, *, radius=4, bias=1.0, alpha=0.001 / 9.0):
    """Divides each value by (bias + alpha * sum of squares) ** 0.75.

    The sum is over the same pixel in the value's own channel and in up to `radius` channels on
    either side. Where one channel responds strongly, its neighbors are damped: the channels
    compete, as neurons in the visual cortex do (section 3.3 of Krizhevsky et al., "ImageNet
    Classification with Deep Convolutional Neural Networks", 2012).

    Equals tf.nn.local_response_normalization(images, radius, bias, alpha, 0.75), which is slower
    on CPUs. Here the sum over neighbors is a product with a band matrix of ones. Images are
    [n, height, width, channels] float32, and so is the result.
    """
    channels = images.shape.as_list()[-1]
    with tf.name_scope(name + '_scale'):
        # Scale first: in float16, the square of a value above 255 is infinite.
        squares = tf.square(alpha**0.5 * tf.reshape(images, [-1, channels]))
        band = tf.matrix_band_part(tf.ones([channels, channels]), radius, radius)
        sums = tf.nn.bias_add(tf.matmul(squares, band), tf.fill([channels], bias))
        root = tf.rsqrt(sums)
        # sums ** -0.75. Two roots are several times as fast as a power.
        scale = tf.reshape(root * tf.sqrt(root), tf.shape(images))
    return tf.multiply(images, scale, name=name)


def fully_connected(name, x, units, *, stddev, bias, wd=None, activation=tf.nn.relu):
    """[n, m] -> [n, units]: activation(x * weights + biases)."""
    with tf.variable_scope(name):
        shape = [x.shape.as_list()[-1], units]
        weights = _variable_with_weight_decay('weights', shape, stddev, wd)
        biases = _variable_on_cpu('biases', [units], tf.constant_initializer(bias))
        activations = activation(tf.nn.bias_add(tf.matmul(x, weights), biases), name=name)
    _activation_summary(activations)
    return activations


def inference(images, classes=None):
    """Builds the network up to its logits.

    Args:
      images: [n, 24, 24, 3], a tensor or anything that tf.convert_to_tensor() accepts. n may be
        unknown when the graph is built.
      classes: the number of classes, by default num_classes().

    Returns:
      logits: [n, classes] float32, not normalized.
    """
    images = tf.cast(images, tf.float32)
    # As in cuda-convnet, the first layer pools before it normalizes, the second one after.
    conv1 = conv('conv1', images, 64, stddev=0.05, bias=0.0)  # [n, 24, 24, 64]
    pool1 = max_pool('pool1', conv1)  # [n, 12, 12, 64]
    norm1 = local_response_normalization('norm1', pool1)
    # A bias of 0.1 lets nearly all units of a ReLU layer be active, and learn, from the start.
    conv2 = conv('conv2', norm1, 64, stddev=0.05, bias=0.1)  # [n, 12, 12, 64]
    norm2 = local_response_normalization('norm2', conv2)
    pool2 = max_pool('pool2', norm2)  # [n, 6, 6, 64]
    flat = tf.reshape(pool2, [-1, pool2.shape[1:].num_elements()])  # [n, 2304]
    # These two layers hold nine tenths of the parameters; only they have weight decay.
    local3 = fully_connected('local3', flat, 384, stddev=0.04, bias=0.1, wd=0.004)
    local4 = fully_connected('local4', local3, 192, stddev=0.04, bias=0.1, wd=0.004)
    # No softmax here: the loss applies it itself, in a numerically stable way.
    units = classes or num_classes()
    return fully_connected(
        'softmax_linear', local4, units, stddev=1 / 192.0, bias=0.0, activation=tf.identity
    )


# --- Loss ----------------------------------------------------------------------


def loss(logits, labels):
    """The mean cross entropy of the batch plus the weight decay.

    Args:
      logits: [n, num_classes()] float32 from inference().
      labels: [n] integers of any type.

    Returns:
      Scalar: the sum of the terms in the collection 'losses'. In the name scope of a tower, such
        as 'tower_0', only the terms of that tower count.
    """
    labels = tf.cast(labels, tf.int64)
    cross_entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    tf.add_to_collection('losses', tf.reduce_mean(cross_entropies, name='cross_entropy'))
    terms = tf.get_collection('losses', scope=summaries.tower_scope())
    return tf.add_n(terms, name='total_loss')


# --- Training ------------------------------------------------------------------


def optimizer(global_step, images_per_step):
    """A tf.train.Optimizer: gradient descent at a rate of 0.1 that drops tenfold every 350 epochs.

    Args:
      global_step: the variable that counts the steps.
      images_per_step: the number of images in a step, on all towers together.
    """
    examples_per_epoch = cifar10_input.num_examples_per_epoch(
        data_folder(), NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN
    )
    decay_steps = int(examples_per_epoch * NUM_EPOCHS_PER_DECAY / images_per_step)
    learning_rate = tf.train.exponential_decay(
        INITIAL_LEARNING_RATE, global_step, decay_steps, LEARNING_RATE_DECAY_FACTOR, staircase=True
    )
    tf.summary.scalar('learning_rate', learning_rate)
    return devices.scale_loss(tf.train.GradientDescentOptimizer(learning_rate), FLAGS.use_fp16)


def apply_gradients(optimizer, gradients, total_loss, global_step):
    """Updates the variables, and after them their moving averages.

    Args:
      optimizer: a tf.train.Optimizer.
      gradients: pairs (gradient, variable) from its compute_gradients().
      total_loss: scalar, for TensorBoard.
      global_step: the variable that counts the steps.

    Returns:
      The training op. Running it once is one training step.
    """
    update_variables = optimizer.apply_gradients(gradients, global_step)
    # Because of global_step the decay is min(0.9999, (1 + step) / (10 + step)), where step is the
    # number of updates so far, this one included. It is low at the start, so that the averages
    # soon forget the initial values.
    average = tf.train.ExponentialMovingAverage(MOVING_AVERAGE_DECAY, global_step)
    with tf.control_dependencies([update_variables]), tf.device('/cpu:0'):
        update_averages = average.apply(tf.trainable_variables())
    for gradient, variable in gradients:
        summaries.histogram(variable.op.name + '/values', variable)
        if gradient is not None:
            summaries.histogram(variable.op.name + '/gradients', gradient)
    return tf.group(update_averages, _add_loss_summaries(total_loss), name='train')


def train(total_loss, global_step):
    """Returns the training op for one device.

    Args:
      total_loss: from loss().
      global_step: the variable that counts the steps, of any integer or float type.
    """
    descent = optimizer(global_step, FLAGS.batch_size)
    gradients = descent.compute_gradients(total_loss)
    return apply_gradients(descent, gradients, total_loss, global_step)
