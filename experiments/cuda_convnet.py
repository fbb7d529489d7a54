"""The networks of cuda-convnet, trained by their own recipes.

13pct reached an error of 12.3 ± 0.1 % with ten views and of 15.2 ± 0.1 % with one after 54,688
updates: mean and standard deviation of three runs in bfloat16, with TensorFlow 2.21. Krizhevsky's
log has 12.6 % with ten views.

    trained on                       one view  ten views    on one core of
    all five files from the start      15.1 %     12.4 %    an Intel Xeon with AMX: 0.068 s a step
    all five files from the start      15.3 %     12.4 %    an AMD EPYC (Zen 4): 0.080 s a step
    four files first, as he did        15.2 %     12.2 %    an AMD EPYC (Zen 4): 0.080 s a step
    all five files, in float32         15.0 %     12.6 %    an AMD EPYC (Zen 4): 0.132 s a step

At these rates 13pct takes 62 or 73 minutes, and two hours in float32. The runs took longer: other
jobs shared the cores. A difference of 0.3 may be chance, because the standard error with
10,000 images is that large. So these runs show no effect of bfloat16 or of the fifth file.

11pct reached an error of 10.9 % with ten views and of 13.6 % with one after 148,438 updates: one
run in bfloat16, 2.8 hours on both cores of the AMD, 0.067 s a step. His recipe has 175,781 updates,
and the published error is 11 %.

    python -m experiments.cuda_convnet --net=13pct --use_fp16
    TF_NUM_INTRAOP_THREADS=1 python -m experiments.cuda_convnet --net=11pct --use_fp16 \
        --num_gpus=2 --batch_size=64 --max_steps=148438
    python -m experiments.cuda_convnet --net=11pct --checkpoint_dir=results/11pct

Two towers of 64 images compute the same as one of 128, in 0.057 instead of 0.064 s a step on both
cores of the AMD. During the long run other jobs slowed them down.

The tutorial's network descends from these two (Alex Krizhevsky, 2011). Each is named after its
error on the test set with ten views, and defined by two files, layers-conv-local-13pct.cfg and
layer-params-conv-local-13pct.cfg, or 11pct. They differ from the tutorial's network in the two
layers below the last, which are locally connected, and in input, initial values and optimizer.
"""

import collections
import sys

import numpy as np

import cifar10
import cifar10_input
import cifar10_multi_gpu_train
from experiments import train_and_evaluate
from support import devices, flags, script, views
from support.compat import tf

Net = collections.namedtuple('Net', 'is_normalized local3_filters fc10_decay steps four_file_steps')
NETS = {
    '13pct': Net(False, 32, 0.004, 54688, 31250),
    '11pct': Net(True, 64, 0.01, 175781, 109375),
    # Not one of Krizhevsky's: the effect of normalization alone.
    '13pct_normalized': Net(True, 32, 0.004, 54688, 31250),
}
RATE, BIAS_RATE = 0.001, 0.002
MOMENTUM = 0.9

FLAGS = flags.FLAGS
flags.DEFINE_enum('net', '13pct', sorted(NETS), 'The network.')
flags.DEFINE_bool('four_files_first', False, 'Begin with four of the training files, as he did.')
flags.adopt_module_key_flags(cifar10_multi_gpu_train)


# --- Input ---------------------------------------------------------------------


def mean_image():
    """The center of the mean of all training images, [24, 24, 3] float32, 0 to 255."""
    total = np.zeros(cifar10_input.RECORD_BYTES - cifar10_input.LABEL_BYTES)
    for path in cifar10_input.data_files(False, cifar10.data_folder()):
        records = np.fromfile(path, np.uint8).reshape(-1, cifar10_input.RECORD_BYTES)
        total += records[:, cifar10_input.LABEL_BYTES :].sum(axis=0)
    mean = total / cifar10_input.num_examples(False, cifar10.data_folder())
    image = mean.astype(np.float32).reshape(3, 32, 32).transpose(1, 2, 0)
    return image[4:-4, 4:-4]


def standardize(crops):
    """[n, 24, 24, 3] float32 crops, 0 to 255 -> the same minus the mean image."""
    return crops - mean_image()


def training_files():
    """Paths of the five training files; with --four_files_first, at first only of four.

    Krizhevsky tuned his networks on the fifth file and then continued with all five.
    """
    files = cifar10_input.data_files(False, cifar10.data_folder())
    if not FLAGS.four_files_first:
        return files
    is_first_phase = tf.train.get_or_create_global_step() < NETS[FLAGS.net].four_file_steps
    return tf.cond(is_first_phase, lambda: tf.constant(files[:4]), lambda: tf.constant(files))


def distorted_inputs():
    """Batches of random crops, half of them mirrored, minus the mean image. No other distortion."""
    with tf.device('/cpu:0'), tf.name_scope('input'):
        # The queue holds a single name, so that training_files() is run again in every epoch.
        filename_queue = tf.train.string_input_producer(training_files(), capacity=1)
        record = cifar10_input.read_cifar10(filename_queue, cifar10_input.RECORDS_PER_READ)
        crops = tf.cast(cifar10_input.random_crop_and_flip(record.uint8image), tf.float32)
        images, labels = tf.train.shuffle_batch(
            [standardize(crops), record.label[:, 0]],
            batch_size=FLAGS.batch_size,
            num_threads=cifar10_input.NUM_PREPROCESS_THREADS,
            capacity=22000,
            min_after_dequeue=20000,
            enqueue_many=True,
        )
    tf.summary.image('images', images)
    return images, labels


def inputs(eval_data, num_epochs=None, num_views=1):
    """As cifar10.inputs(), but minus the mean image instead of standardized."""
    batch_size = max(1, FLAGS.batch_size // num_views)
    return cifar10_input.inputs(
        eval_data,
        cifar10.data_folder(),
        batch_size,
        num_epochs,
        crop=views.cropper(num_views, cifar10_input.IMAGE_SIZE),
        standardize=standardize,
    )


# --- Network -------------------------------------------------------------------


def weights_and_biases(shape, bias_shape, stddev, wd=None):
    """Weights from a normal distribution, not truncated as the tutorial's, and biases of 0."""
    weights = cifar10._variable_on_cpu('weights', shape, tf.random_normal_initializer(0.0, stddev))
    if wd is not None:
        tf.add_to_collection('losses', tf.multiply(wd, tf.nn.l2_loss(weights), name='weight_loss'))
    return weights, cifar10._variable_on_cpu('biases', bias_shape, tf.zeros_initializer())


def conv(name, images, stddev):
    """[n, h, w, c] -> [n, h, w, 64]: 5x5 convolution, ReLU."""
    with tf.variable_scope(name):
        kernel, biases = weights_and_biases([5, 5, images.shape.as_list()[-1], 64], [64], stddev)
        convolved = tf.nn.conv2d(images, kernel, strides=[1, 1, 1, 1], padding='SAME')
        return tf.nn.relu(tf.nn.bias_add(convolved, biases), name=name)


def locally_connected(name, images, filters):
    """[n, h, w, c] -> [n, h, w, filters]: a 3x3 convolution with separate weights per position."""
    _, height, width, channels = images.shape.as_list()
    with tf.variable_scope(name):
        weights, biases = weights_and_biases(
            [height, width, 9 * channels, filters], [height, width, filters], 0.04, wd=0.004
        )
        # One matrix product per position, so the position comes first: [h, w, n, c].
        images = tf.pad(tf.transpose(images, [1, 2, 0, 3]), [[1, 1], [1, 1], [0, 0], [0, 0]])
        # tf.slice, because the gradient of images[y : y + height, ...] is slow.
        neighbors = [
            tf.slice(images, [y, x, 0, 0], [height, width, -1, -1])
            for y in range(3)
            for x in range(3)
        ]
        products = tf.matmul(tf.concat(neighbors, axis=3), weights)  # [h, w, n, filters]
        return tf.nn.relu(tf.transpose(products, [2, 0, 1, 3]) + biases, name=name)


def inference(images):
    """Builds the network: [n, 24, 24, 3] -> [n, 10] logits."""
    net = NETS[FLAGS.net]

    def normalize(name, x):
        return cifar10.local_response_normalization(name, x) if net.is_normalized else x

    conv1 = conv('conv1', images, stddev=0.0001)  # [n, 24, 24, 64]
    norm1 = normalize('norm1', cifar10.max_pool('pool1', conv1))  # [n, 12, 12, 64]
    conv2 = conv('conv2', norm1, stddev=0.01)
    pool2 = cifar10.max_pool('pool2', normalize('norm2', conv2))  # [n, 6, 6, 64]
    local3 = locally_connected('local3', pool2, net.local3_filters)
    local4 = locally_connected('local4', local3, 32)  # [n, 6, 6, 32]
    flat = tf.reshape(local4, [-1, 6 * 6 * 32])
    with tf.variable_scope('fc10'):
        weights, biases = weights_and_biases([6 * 6 * 32, 10], [10], 0.01, net.fc10_decay)
        logits = tf.nn.bias_add(tf.matmul(flat, weights), biases, name='fc10')
    for layer in conv1, conv2, local3, local4, logits:
        cifar10._activation_summary(layer)
    return logits


# --- Loss and optimizer --------------------------------------------------------


loss = cifar10.loss


def learning_rate(global_step):
    """0.001, then 0.0001 for ten epochs, and 0.00001 for the last ten. Biases: always 0.002."""
    ten_epochs = 10 * 50000 / 128
    drops = [int(FLAGS.max_steps - 2 * ten_epochs), int(FLAGS.max_steps - ten_epochs)]
    return tf.train.piecewise_constant(global_step, drops, [RATE, RATE / 10, RATE / 100])


def optimizer(global_step, images_per_step):
    """Momentum at a rate of 1, because apply_gradients() multiplies the gradients by their rates.

    If the momentum did it, a drop of the rate would also affect the gradients of earlier steps.
    """
    return devices.scale_loss(tf.train.MomentumOptimizer(1.0, MOMENTUM), FLAGS.use_fp16)


def apply_gradients(optimizer, gradients, total_loss, global_step):
    """Returns the op that does a step: change = 0.9 * change - rate * gradient; w += change.

    The gradients include the decay.
    """
    rate = learning_rate(global_step)
    tf.summary.scalar('learning_rate', rate)
    gradients = [
        (gradient * (BIAS_RATE if variable.op.name.endswith('biases') else rate), variable)
        for gradient, variable in gradients
    ]
    update = optimizer.apply_gradients(gradients, global_step)
    return tf.group(update, cifar10._add_loss_summaries(total_loss), name='train')


def main(argv=None):
    FLAGS.set_default('train_dir', '/tmp/cuda_convnet_' + FLAGS.net)
    this_module = sys.modules[__name__]
    return train_and_evaluate(this_module, NETS[FLAGS.net].steps, use_moving_averages=False)


if __name__ == '__main__':
    script.run(main)
