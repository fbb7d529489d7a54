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

import collections
import contextlib
import os
import re
import select
import signal
import socket
import sys
import tempfile
import threading
import time

import cifar10_download
import cifar10_input

import numpy as np
import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_integer('batch_size', 128, 'Images per batch (and per tower).', lower_bound=1)
tf.flags.DEFINE_string('data_dir', cifar10_download.DEFAULT_DATA_DIR,
                       'Folder of the data set; it is downloaded to there if need be.')
tf.flags.DEFINE_string('data_url', cifar10_download.DATA_URL,
                       'Where to get the data set; file: URLs work too.')
tf.flags.DEFINE_bool('use_fp16', False,
                     'Compute in 16 bits what may be computed in 16 bits: float16 on a GPU of '
                     'compute capability 7.0 or more, bfloat16 on a CPU that has it.')

DATA_URL = cifar10_download.DATA_URL
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
      cifar10_download.DataError: it is not, and this says what to do.
    """
    cifar10_download.maybe_download_and_extract(FLAGS.data_dir, FLAGS.data_url)


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
      UserError: the file can't be written.
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
            raise UserError('cannot write events for TensorBoard: %s' % brief(error))


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


def local_response_normalization(name, images):
    """Divides each value by s ** 0.75, s = 1 + 0.001 / 9 * sum(neighbours ** 2).

    The neighbours are the values of the same pixel in the up to 4 channels on
    either side and in its own (section 3.3 of Krizhevsky et al., "ImageNet
    Classification with Deep Convolutional Neural Networks", 2012).

    TensorFlow's own gradient of this op is slow on CPUs. In closed form, with
    y = x * s ** -0.75, it is

        dx = dy * s ** -0.75 - 2 * 0.75 * 0.001 / 9 * x * neighbourhood_sum(dy * y / s)

    and a sum over neighbours is a product with a band matrix of ones.

    Args:
      images: [n, height, width, channels] float32.

    Returns:
      The same shape and type.
    """
    radius, bias, alpha, beta = 4, 1.0, 0.001 / 9.0, 0.75
    channels = images.shape.as_list()[-1]

    def neighbourhood_sum(values):
        band = tf.matrix_band_part(tf.ones([channels, channels]), radius, radius)
        sums = tf.matmul(tf.reshape(values, [-1, channels]), band)
        return tf.reshape(sums, tf.shape(values))

    @tf.custom_gradient
    def normalize(x):
        y = tf.nn.local_response_normalization(x, radius, bias, alpha, beta)

        def gradient(dy):
            root = tf.rsqrt(bias + alpha * neighbourhood_sum(tf.square(x)))  # s ** -0.5
            scale = root * tf.sqrt(root)  # s ** -0.75, several times as fast as a power.
            return (dy * scale -
                    2 * alpha * beta * x * neighbourhood_sum(dy * y * tf.square(root)))
        return y, gradient

    with tf.name_scope(name):
        return normalize(images)


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
    norm1 = local_response_normalization('norm1', pool1)
    conv2 = _conv('conv2', norm1, 64, bias=0.1)                     # [n, 12, 12, 64]
    norm2 = local_response_normalization('norm2', conv2)
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
    if half_precision() == 'float16':
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


# --- Running -----------------------------------------------------------------

def half_precision():
    """What --use_fp16 means on this machine: 'float16', 'bfloat16' or None."""
    if not FLAGS.use_fp16:
        return None
    if tf.test.is_gpu_available(cuda_only=True, min_cuda_compute_capability=(7, 0)):
        return 'float16'
    options = tf.ConfigProto().graph_options.rewrite_options
    if hasattr(options, 'auto_mixed_precision_onednn_bfloat16') and _cpu_has_bfloat16():
        return 'bfloat16'
    return None


def _cpu_has_bfloat16():
    try:
        with open('/proc/cpuinfo') as cpuinfo:
            return re.search(r'\b(avx512_bf16|amx_bf16)\b', cpuinfo.read()) is not None
    except OSError:
        return False


def session_config(**kwargs):
    """The tf.ConfigProto of all sessions here: ops move to where they can run.

    Memory on a GPU is taken as needed, see cifar10_input.
    """
    config = tf.ConfigProto(allow_soft_placement=True, **kwargs)
    if half_precision() == 'bfloat16':
        options = config.graph_options.rewrite_options
        options.auto_mixed_precision_onednn_bfloat16 = options.ON
    return config


def describe_devices():
    """One line on where a session computes and in what precision."""
    gpus = [device.name.split(':', 1)[1]
            for device in tf.config.experimental.list_physical_devices('GPU')]
    if gpus:
        where = ', '.join(gpus)
    else:
        if not tf.test.is_built_with_cuda():
            reason = 'this TensorFlow was built without CUDA'
        elif not os.path.exists('/proc/driver/nvidia'):
            reason = 'no NVIDIA driver here'
        elif 'CUDA_VISIBLE_DEVICES' in os.environ:
            reason = 'CUDA_VISIBLE_DEVICES=%s leaves none' % os.environ['CUDA_VISIBLE_DEVICES']
        else:
            reason = 'TensorFlow found no GPU that it can use; are its CUDA libraries installed?'
        where = 'the CPU (no GPU: %s)' % reason
    precision = half_precision() or 'float32'
    if FLAGS.use_fp16 and precision == 'float32':
        precision += ' (--use_fp16: neither float16 nor bfloat16 is to be had here)'
    return 'Running on %s with TensorFlow %s in %s.' % (where, tf.__version__, precision)


class UserError(Exception):
    """What a user can mend; the text says what is wrong and the way out."""


# Of TensorFlow's errors those of files, and of memory. Others are for whoever changes the code.
USER_OP_ERRORS = (tf.errors.NotFoundError, tf.errors.PermissionDeniedError,
                  tf.errors.DataLossError, tf.errors.ResourceExhaustedError)

# `timeout` sends its signal twice, to the script and to the script's process group.
SAME_SIGNAL_SECS = 0.2


def brief(error):
    """One line of an error's text, which may hold a whole stack trace."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # TensorFlow's errors with files read 'PATH; REASON', in 2.x somewhere in the middle.
    return next((line for line in lines if re.match(r'\S.*; ', line)), lines[0])


def refuse_unreadable_folders(*flags):
    """Has the flags refuse paths under which TensorFlow does not find again what it has written."""
    for flag in flags:
        tf.flags.register_validator(
            flag, lambda folder: not re.search(r'[\[\\]|://', folder),
            message='TensorFlow cannot read checkpoints in a folder with "[", "\\" or "://" in its '
                    'path; choose another')


def make_folder(flag):
    """Makes the folder that a flag names, if need be.

    Raises:
      tf.flags.IllegalFlagValueError: that, or writing to it, is not possible.
    """
    folder = FLAGS[flag].value
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise tf.flags.IllegalFlagValueError(
            'flag --%s=%s: cannot write there: %s' % (flag, folder, error.strerror))


def on_signal(first):
    """Has SIGINT, SIGTERM and SIGHUP heard even while the main thread waits inside TensorFlow.

    Args:
      first: called with the first signal's number, in a thread of its own. The
        second signal ends the process at once with status 128 + number; what comes
        within SAME_SIGNAL_SECS is taken for the first.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # Asked for by set_wakeup_fd.

    def watch():
        first(os.read(read_end, 1)[0])
        time.sleep(SAME_SIGNAL_SECS)
        if select.select([read_end], [], [], 0)[0]:
            os.read(read_end, 1000)
        os._exit(128 + os.read(read_end, 1)[0])

    threading.Thread(target=watch, daemon=True).start()
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    _handle_signals(lambda number, frame: None)


def _handle_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # As by nohup.
            signal.signal(number, handler)


def run(main):
    """Parses the flags, calls main() and exits with what it returns.

    Unlike tf.app.run, it takes an unknown flag for an error. The exit status is 2
    for flags, 1 for other errors that a user can mend, both told in one line, and
    128 + number after a signal.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # Closed: a file of ours would take its place, and get the output.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout:
        sys.stdout.reconfigure(errors='backslashreplace')  # As stderr: a path may not fit a locale.
    _handle_signals(lambda number, frame: sys.exit(128 + number))
    script = os.path.basename(sys.argv[0])
    tf.flags.DEFINE_bool('help', False, 'Show this text.', short_name='h')
    try:
        extra = FLAGS(sys.argv)[1:]
        if extra:
            raise tf.flags.Error('unexpected argument: %s' % ' '.join(extra))
        for name, value in FLAGS.flag_values_dict().items():
            if isinstance(value, str) and not _is_utf8(value):
                raise tf.flags.IllegalFlagValueError('flag --%s=%r: not in UTF-8' % (name, value))
        if FLAGS.help:
            say(sys.modules['__main__'].__doc__)
            for module in FLAGS.flags_by_module_dict():
                if not module.startswith(('absl', 'tensorflow')):
                    say(FLAGS.module_help(module).replace(sys.argv[0], script))
            sys.exit()
        sys.exit(main())
    except tf.flags.Error as error:
        _complain('%s: %s (see --help)' % (script, error), 2)
    except BrokenPipeError:
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except (cifar10_download.DataError, UserError, OSError) as error:
        _complain('%s: %s' % (script, error), 1)
    except USER_OP_ERRORS as error:
        _complain('%s: %s' % (script, brief(error)), 1)


def say(line):
    """Prints a line. A log that cannot be written is no reason to end a run.

    Raises:
      BrokenPipeError: the reader has left.
    """
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:  # The disk is full, or the terminal closed.
        _drop_output()
        _print_error('Cannot write the log: %s. Going on without it.' % error.strerror)


def _drop_output():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_utf8(text):
    """TensorFlow takes no other text, of which Python makes lone surrogates."""
    return text == text.encode('utf-8', 'replace').decode('utf-8')


def _complain(text, status):
    _print_error(text.replace('\n', ' '))  # In names, too, there may be line ends.
    sys.exit(status)


def _print_error(line):
    if sys.stderr:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


# --- Checkpoints -------------------------------------------------------------
#
# What is in the folder counts, not the state file 'checkpoint': that may be
# damaged or older than the files, or name a place from which they were moved.

# `written` tells it from one of the same step that has replaced it.
Checkpoint = collections.namedtuple('Checkpoint', ['step', 'path', 'written'])

# What reading a checkpoint may raise: IndexError where 2.x finds a file too short.
CHECKPOINT_ERRORS = (tf.errors.OpError, ValueError, IndexError)


def checkpoints(folder):
    """The Checkpoints in a folder, newest first; each path is what a tf.train.Saver takes."""
    found = []
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        match = re.match(r'(model\.ckpt-([0-9]+))\.index$', name)
        if match:
            with contextlib.suppress(FileNotFoundError):  # A trainer has just removed it.
                found.append(Checkpoint(int(match.group(2)), os.path.join(folder, match.group(1)),
                                        os.lstat(os.path.join(folder, name)).st_mtime_ns))
    return sorted(found, reverse=True)


def checkpoint_damage(path):
    """What makes a checkpoint unusable for any model, in words, or None.

    Reads all of it, since it has checksums, and wants finite numbers.
    """
    try:
        reader = tf.train.load_checkpoint(path)
        for name in sorted(reader.get_variable_to_shape_map()):
            value = reader.get_tensor(name)
            if value.dtype.kind == 'f' and not np.isfinite(value).all():
                return '%s is not finite' % name
    except CHECKPOINT_ERRORS as error:
        return brief(error)
    return None


def checkpoint_misfit(path, variables):
    """How a readable checkpoint differs from the model, in words, or None.

    Args:
      path: as in Checkpoint.
      variables: dict of name in the checkpoint -> tf.Variable.
    """
    reader = tf.train.load_checkpoint(path)
    shapes = reader.get_variable_to_shape_map()
    types = reader.get_variable_to_dtype_map()
    for name, variable in sorted(variables.items()):
        if name not in shapes:
            return 'it has no variable %s' % name
        there = (types[name].name, shapes[name])
        here = (variable.dtype.base_dtype.name, variable.shape.as_list())
        if there != here:
            return 'its variable %s is %s %s, not %s %s' % ((name,) + there + here)
    return None


def _finished_file(folder):
    return os.path.join(folder, 'finished')


def mark_finished(folder, step):
    """Notes for the evaluator that training ended at this step; with None, that it goes on."""
    if step is not None:
        with open(_finished_file(folder), 'w') as file:
            file.write('%d\n' % step)
    elif os.path.exists(_finished_file(folder)):
        os.remove(_finished_file(folder))


def finished_step(folder):
    """The step at which training ended because it was done, or None."""
    try:
        with open(_finished_file(folder)) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
