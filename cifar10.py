"""The CIFAR-10 model: a graph in three parts, and what all scripts share.

    images, labels = distorted_inputs()     or inputs(eval_data)
    logits = inference(images)
    total_loss = loss(logits, labels)
    train_op = train(total_loss, global_step)

The network follows Alex Krizhevsky's cuda-convnet
(https://code.google.com/p/cuda-convnet/) with fully connected layers in the
place of its locally connected ones: 1,068,298 parameters. Images are
[batch, 24, 24, 3] float32, labels [batch] int32 in 0..9, logits [batch, 10].
"""

import os
import re
import socket
import time

import cifar10_input
from support import dataset
from support import devices
from support import normalization
from support import script

import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_integer('batch_size', 128, 'Images per batch (and per tower).', lower_bound=1)
tf.flags.DEFINE_string('data_dir', dataset.DEFAULT_DATA_DIR,
                       'Folder of the data set; it is downloaded to there if need be.')
tf.flags.DEFINE_string('data_url', dataset.DATA_URL,
                       'Where to get the data set; file: URLs work too.')
tf.flags.DEFINE_bool('use_fp16', False,
                     'Compute in 16 bits what may be computed in 16 bits: float16 on a GPU of '
                     'compute capability 7.0 or more, bfloat16 on a CPU that has it.')

DATA_URL = dataset.DATA_URL
IMAGE_SIZE = cifar10_input.IMAGE_SIZE
NUM_CLASSES = cifar10_input.NUM_CLASSES
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL

MOVING_AVERAGE_DECAY = 0.9999      # Of the variables.
NUM_EPOCHS_PER_DECAY = 350.0       # Epochs after which the learning rate drops ...
LEARNING_RATE_DECAY_FACTOR = 0.1   # ... to this part of what it was.
INITIAL_LEARNING_RATE = 0.1

# Tower i of several builds its ops in the name scope 'tower_i'.
TOWER_NAME = 'tower'


# --- Inputs ------------------------------------------------------------------

def data_folder():
    """The folder that holds the .bin files."""
    return os.path.join(FLAGS.data_dir, 'cifar-10-batches-bin')


def maybe_download_and_extract():
    """Makes sure that the data set is in --data_dir, complete and sound.

    Raises:
      dataset.DataError: it is not, and this says what to do.
    """
    dataset.maybe_download_and_extract(FLAGS.data_dir, FLAGS.data_url)


def distorted_inputs():
    """Endless shuffled batches of distorted training images.

    Returns:
      images: [batch_size, 24, 24, 3] float32; labels: [batch_size] int32.

    Raises:
      ValueError: a data file is missing or not made of whole records.
      tf.flags.IllegalFlagValueError: --batch_size exceeds the training set.
    """
    available = cifar10_input.num_examples(False, data_folder())
    if FLAGS.batch_size > available:
        raise tf.flags.IllegalFlagValueError(
            'flag --batch_size=%d: the training set has only %d images'
            % (FLAGS.batch_size, available))
    images, labels = cifar10_input.distorted_inputs(data_folder(), FLAGS.batch_size)
    image_summary('images', images)
    return images, labels


def inputs(eval_data):
    """One pass over the images without distortion.

    Args:
      eval_data: True for the test set, False for the training set.

    Returns:
      images: [n, 24, 24, 3] float32; labels: [n] int32; n <= batch_size.

    Raises:
      ValueError: a data file is missing or not made of whole records.
      tf.errors.OutOfRangeError: when run after the last batch.
    """
    images, labels = cifar10_input.inputs(eval_data, data_folder(), FLAGS.batch_size)
    image_summary('images', images)
    return images, labels


# --- Summaries ---------------------------------------------------------------
#
# tf.summary derives the tag from the name of the op, which has the name scope in
# front and a number behind when it was taken. The ops beneath take any tag.

def _add_summary(tag, build):
    """Adds the op that `build(name)` makes to the summaries of the graph, on the CPU.

    Of several towers the first one shows its tags.
    """
    name = 'summaries/' + re.sub('[^A-Za-z0-9_./-]', '_', tag)
    if name in [summary.op.name for summary in tf.get_collection(tf.GraphKeys.SUMMARIES)]:
        return
    with tf.name_scope(name + '/') as scope, tf.device('/cpu:0'):
        tf.add_to_collection(tf.GraphKeys.SUMMARIES, build(scope))


def scalar_summary(tag, value):
    """Shows a scalar tensor in TensorBoard under exactly this tag."""
    _add_summary(tag, lambda name: tf.raw_ops.ScalarSummary(tags=tag, values=value, name=name))


def histogram_summary(tag, values):
    """Shows the distribution of a tensor's values under exactly this tag.

    What isn't finite counts as 0; the op would end the run. The loss tells of it
    better, and a step that a loss scaler skips is no error at all.
    """
    def build(name):
        value = tf.identity(values)  # Of a variable: read once, since it may change.
        finite = tf.where(tf.is_finite(value), value, tf.zeros_like(value))
        return tf.raw_ops.HistogramSummary(tag=tag, values=finite, name=name)
    _add_summary(tag, build)


def image_summary(tag, images, max_outputs=8):
    """Shows the first of [n, height, width, 3] images under exactly this tag.

    Each image is stretched to its full range of brightness. The format is that of
    TensorBoard's image plugin: width, height, then PNG files, as strings.
    """
    def build(name):
        shown = images[:max_outputs]
        low = tf.reduce_min(shown, axis=[1, 2, 3], keepdims=True)
        high = tf.reduce_max(shown, axis=[1, 2, 3], keepdims=True)
        pixels = tf.cast(255.0 * tf.div_no_nan(shown - low, high - low), tf.uint8)
        size = tf.as_string(tf.shape(pixels)[2:0:-1])
        metadata = tf.SummaryMetadata()
        metadata.plugin_data.plugin_name = 'images'
        return tf.raw_ops.TensorSummaryV2(
            tag=tag, tensor=tf.concat([size, tf.map_fn(tf.image.encode_png, pixels, tf.string)], 0),
            serialized_summary_metadata=metadata.SerializeToString(), name=name)
    _add_summary(tag, build)


def _activation_summary(layer, activations):
    histogram_summary(layer + '/activations', activations)
    scalar_summary(layer + '/sparsity', tf.nn.zero_fraction(activations))


class EventWriter:
    """Writes what TensorBoard reads, at once and in the thread that calls.

    tf.summary.FileWriter leaves that to a thread of its own. In TensorFlow 1.15 it
    dies on a full disk, and the run then waits for it for ever.

    Raises, from all methods:
      script.UserError: the file can't be written.
    """

    def __init__(self, folder):
        self._path = os.path.join(folder, 'events.out.tfevents.%010d.%s.%d' % (
            time.time(), socket.gethostname(), os.getpid()))
        self._writer = None
        self._write(file_version='brain.Event:2')

    def add_graph(self, graph):
        self._write(graph_def=graph.as_graph_def(add_shapes=True).SerializeToString())

    def add_summary(self, serialized, step):
        self._write(summary=tf.Summary.FromString(serialized), step=step)

    def _write(self, **fields):
        try:
            if self._writer is None:
                self._writer = tf.io.TFRecordWriter(self._path)
            self._writer.write(tf.Event(wall_time=time.time(), **fields).SerializeToString())
            self._writer.flush()
        except tf.errors.OpError as error:
            raise script.UserError('cannot write events for TensorBoard: %s' % script.brief(error))


# --- Inference ---------------------------------------------------------------

def _variable(name, shape, initializer):
    """Makes or shares a float32 variable on the CPU and returns its value.

    One read serves all uses: with the layer on a GPU each read is a copy to it.
    """
    with tf.device('/cpu:0'):
        variable = tf.get_variable(name, shape, tf.float32, initializer)
    return variable.read_value()


def _weights(shape, stddev, decay=None):
    """Weights from a truncated normal distribution.

    With `decay`, decay * sum(weights ** 2) / 2 joins the collection 'losses'.
    """
    weights = _variable('weights', shape, tf.truncated_normal_initializer(stddev=stddev))
    if decay is not None:
        tf.add_to_collection('losses', tf.multiply(decay, tf.nn.l2_loss(weights),
                                                   name='weight_loss'))
    return weights


def _biases(size, value):
    return _variable('biases', [size], tf.constant_initializer(value))


def _conv(layer, images, channels, bias):
    """[n, h, w, c] -> [n, h, w, channels]: 5x5 convolution, ReLU."""
    with tf.variable_scope(layer):
        kernel = _weights([5, 5, images.shape.as_list()[-1], channels], stddev=0.05)
        convolved = tf.nn.conv2d(images, kernel, strides=[1, 1, 1, 1], padding='SAME')
        activations = tf.nn.relu(tf.nn.bias_add(convolved, _biases(channels, bias)))
        _activation_summary(layer, activations)
    return activations


def _max_pool(name, images):
    """[n, h, w, c] -> [n, h/2, w/2, c]: the maximum of 3x3 windows, two pixels apart."""
    return tf.nn.max_pool(images, ksize=[1, 3, 3, 1], strides=[1, 2, 2, 1],
                          padding='SAME', name=name)


def _fully_connected(layer, inputs, units, stddev, bias, decay=None, activation=None):
    """[n, m] -> [n, units]: inputs * weights + biases, then the activation."""
    with tf.variable_scope(layer):
        weights = _weights([inputs.shape.as_list()[-1], units], stddev, decay)
        outputs = tf.nn.bias_add(tf.matmul(inputs, weights), _biases(units, bias))
        if activation is not None:
            outputs = activation(outputs)
        _activation_summary(layer, outputs)
    return outputs


def inference(images):
    """Builds the network up to its logits.

    Args:
      images: [n, 24, 24, 3] float32 from distorted_inputs() or inputs(); n need
        not be known when the graph is built.

    Returns:
      logits: [n, 10] float32, not normalized.
    """
    conv1 = _conv('conv1', images, 64, bias=0.0)                    # [n, 24, 24, 64]
    pool1 = _max_pool('pool1', conv1)                               # [n, 12, 12, 64]
    norm1 = normalization.local_response_normalization('norm1', pool1)
    conv2 = _conv('conv2', norm1, 64, bias=0.1)                     # [n, 12, 12, 64]
    norm2 = normalization.local_response_normalization('norm2', conv2)
    pool2 = _max_pool('pool2', norm2)                               # [n, 6, 6, 64]
    flat = tf.reshape(pool2, [-1, pool2.shape[1:].num_elements()])  # [n, 2304]
    local3 = _fully_connected('local3', flat, 384, stddev=0.04, bias=0.1, decay=0.004,
                              activation=tf.nn.relu)
    local4 = _fully_connected('local4', local3, 192, stddev=0.04, bias=0.1, decay=0.004,
                              activation=tf.nn.relu)
    # No softmax here: the loss applies it itself, numerically more stable.
    return _fully_connected('softmax_linear', local4, NUM_CLASSES, stddev=1 / 192.0, bias=0.0)


# --- Loss and training -------------------------------------------------------

def loss(logits, labels):
    """The mean cross entropy of the batch plus the weight decay of local3 and local4.

    Args:
      logits: [n, 10] float32 from inference().
      labels: [n] int32.

    Returns:
      Scalar. Its terms are in the collection 'losses'; of several towers each
      adds up its own.
    """
    cross_entropy = tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits),
        name='cross_entropy')
    tf.add_to_collection('losses', cross_entropy)
    scope = tf.get_default_graph().get_name_scope()
    return tf.add_n(tf.get_collection('losses', scope and scope + '/'), name='total_loss')


def _as_local_variable(next_creator, **kwargs):
    """Keeps a variable out of the checkpoint: for use with tf.variable_creator_scope."""
    kwargs['collections'] = [tf.GraphKeys.LOCAL_VARIABLES]
    return next_creator(**kwargs)


def _summarize_losses(total_loss):
    """Shows the total loss and its terms, raw and as moving averages.

    Returns:
      The op that updates the averages.
    """
    terms = {'total_loss': [total_loss]}
    for term in tf.get_collection('losses'):
        tag = re.sub('^%s_[0-9]+/' % TOWER_NAME, '', term.op.name)
        terms.setdefault(tag, []).append(term)
    average = tf.train.ExponentialMovingAverage(0.9, zero_debias=True, name='average')
    with tf.variable_creator_scope(_as_local_variable), tf.device('/cpu:0'):
        means = {tag: tf.reduce_mean(tf.stack(towers), name=tag + '/mean')
                 for tag, towers in terms.items()}
        update = average.apply(list(means.values()))
    for tag, value in means.items():
        scalar_summary(tag + ' (raw)', value)
        with tf.control_dependencies([update]):
            scalar_summary(tag, average.average(value))
    return update


def num_examples_per_epoch():
    """Training images per epoch: as many as there are, or else as in CIFAR-10."""
    try:
        return cifar10_input.num_examples(False, data_folder())
    except ValueError:
        return NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN


def gradient_descent(global_step, images_per_step):
    """Plain gradient descent; the learning rate is 0.1, times 0.1 every 350 epochs.

    Args:
      global_step: the number of steps done, an integer variable.
      images_per_step: how many images, on all towers together, make a step.

    Returns:
      A tf.train.Optimizer. With --use_fp16 on a GPU it scales the loss, and has
      TensorFlow rewrite the graph.
    """
    decay_steps = int(num_examples_per_epoch() * NUM_EPOCHS_PER_DECAY / images_per_step)
    learning_rate = tf.train.exponential_decay(
        INITIAL_LEARNING_RATE, global_step, decay_steps, LEARNING_RATE_DECAY_FACTOR,
        staircase=True)
    scalar_summary('learning_rate', learning_rate)
    optimizer = tf.train.GradientDescentOptimizer(learning_rate)
    if devices.half_precision() == 'float16':
        with tf.variable_creator_scope(_as_local_variable):
            optimizer = tf.train.experimental.enable_mixed_precision_graph_rewrite(optimizer)
    return optimizer


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
    for gradient, variable in gradients:
        histogram_summary(variable.op.name, variable)
        histogram_summary(variable.op.name + '/gradients', gradient)
    update_losses = _summarize_losses(total_loss)
    update_variables = optimizer.apply_gradients(gradients, global_step)

    average = tf.train.ExponentialMovingAverage(MOVING_AVERAGE_DECAY, global_step)
    with tf.control_dependencies([update_variables]):
        update_averages = average.apply(tf.trainable_variables())
    return tf.group(update_losses, update_averages, name='train')


def train(total_loss, global_step):
    """Adds one step of training on a batch of --batch_size images.

    Args:
      total_loss: scalar from loss().
      global_step: integer variable that counts the steps.

    Returns:
      The op that computes the gradients, updates the variables and then their
      moving averages, and counts the step.
    """
    optimizer = gradient_descent(global_step, FLAGS.batch_size)
    return apply_gradients(optimizer, optimizer.compute_gradients(total_loss),
                           total_loss, global_step)
