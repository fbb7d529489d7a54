"""What could make a training step on a CPU faster: variants of it, in turns with the project's own.

    python benchmarks/variants.py
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/variants.py      as a CPU without AVX-512 does it

Each variant is a process of its own, which trains on constant images; see rounds.py. A ratio is its
time over that of the step as it is, in the same round.
"""

import argparse
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import rounds

VARIANTS = {}  # Name -> function that replaces a part of the model or of the session's options.
STEPS_PER_BLOCK = 5


def variant(function):
    VARIANTS[function.__name__] = function
    return function


@variant
def as_it_is(cifar10, tf, config):
    pass


@variant
def builtin_lrn(cifar10, tf, config):
    import classic

    cifar10.local_response_normalization = classic.local_response_normalization


@variant
def lrn_without_closed_form(cifar10, tf, config):
    """The same formula, its gradient left to TensorFlow."""
    from support import normalization

    def local_response_normalization(images, name):
        with tf.name_scope(name):
            squares = tf.square(normalization.ALPHA**0.5 * images)
            root = tf.rsqrt(1 + normalization.neighbourhood_sum(squares))
            return images * (root * tf.sqrt(root))

    cifar10.local_response_normalization = local_response_normalization


@variant
def relu_after_pool1(cifar10, tf, config):
    """The same result: the maximum of a window is not changed by what was below 0."""
    conv, max_pool, relu = cifar10.conv, cifar10.max_pool, tf.nn.relu

    def conv_without_relu(layer, *args, **kwargs):
        tf.nn.relu = tf.identity if layer == 'conv1' else relu
        convolved = conv(layer, *args, **kwargs)
        tf.nn.relu = relu
        return convolved

    def pool_with_relu(name, images):
        pooled = max_pool(name, images)
        return relu(pooled) if name == 'pool1' else pooled

    cifar10.conv, cifar10.max_pool = conv_without_relu, pool_with_relu


@variant
def pools_of_maxima(cifar10, tf, config):
    """Maxima of shifted images: first of three rows, then of three columns."""

    def max_pool(name, images):
        with tf.name_scope(name):
            x = tf.pad(images, [[0, 0], [0, 1], [0, 1], [0, 0]])  # None is below 0.
            x = tf.maximum(tf.maximum(x[:, :-1:2], x[:, 1::2]), x[:, 2::2])
            return tf.maximum(tf.maximum(x[:, :, :-1:2], x[:, :, 1::2]), x[:, :, 2::2])

    cifar10.max_pool = max_pool


def replace_conv1(cifar10, tf, convolve):
    """conv1 by convolve(images, kernel)."""
    conv2d = tf.nn.conv2d

    def conv2d_or_other(images, kernel, **kwargs):
        if kernel.shape.as_list()[2] == 3:
            return convolve(images, kernel)
        return conv2d(images, kernel, **kwargs)

    tf.nn.conv2d = conv2d_or_other
    return lambda images, kernel: conv2d(images, kernel, strides=1, padding='SAME')


@variant
def conv1_filter_gradient_as_product(cifar10, tf, config):
    """Of the 5x5 patches and the gradient: 75 x n by n x 64."""

    @tf.custom_gradient
    def convolve(images, kernel):
        def gradient(dy):
            patches = tf.image.extract_image_patches(
                images, [1, 5, 5, 1], [1, 1, 1, 1], [1, 1, 1, 1], 'SAME'
            )
            flat = tf.reshape(patches, [-1, 75]), tf.reshape(dy, [-1, 64])
            return tf.zeros_like(images), tf.reshape(
                tf.matmul(*flat, transpose_a=True), kernel.shape
            )

        return original(images, kernel), gradient

    original = replace_conv1(cifar10, tf, convolve)


@variant
def conv1_of_four_channels(cifar10, tf, config):
    """The fourth one empty: some kernels like multiples of four."""

    def convolve(images, kernel):
        images = tf.pad(images, [[0, 0], [0, 0], [0, 0], [0, 1]])
        return original(images, tf.pad(kernel, [[0, 0], [0, 0], [0, 1], [0, 0]]))

    original = replace_conv1(cifar10, tf, convolve)


@variant
def channels_first(cifar10, tf, config):
    """A rewrite by Grappler, of TensorFlow 2.x."""
    options = config.graph_options.rewrite_options
    options.cpu_layout_conversion = options.NHWC_TO_NCHW


@variant
def without_grappler(cifar10, tf, config):
    config.graph_options.rewrite_options.disable_meta_optimizer = True


@variant
def xla(cifar10, tf, config):
    os.environ['TF_XLA_FLAGS'] = '--tf_xla_cpu_global_jit'
    config.graph_options.optimizer_options.global_jit_level = 2


@variant
def one_inter_op_thread(cifar10, tf, config):
    config.inter_op_parallelism_threads = 1


@variant
def two_towers(cifar10, tf, config):
    """Of half a batch each: what one waits for, the other one uses."""


@variant
def two_towers_of_one_thread(cifar10, tf, config):
    config.intra_op_parallelism_threads = 1


def serve(name):
    """The worker's side: blocks of steps of a variant."""
    import cifar10
    import cifar10_input
    import cifar10_multi_gpu_train
    import cifar10_train
    from support import devices

    import tensorflow.compat.v1 as tf

    num_towers = 2 if name.startswith('two_towers') else 1
    batch_size = 128 // num_towers
    tf.flags.FLAGS([sys.argv[0], f'--num_gpus={num_towers}'])
    config = devices.session_config(use_fp16=False)
    if name == 'channels_first' and tf.__version__.startswith('1.'):
        return rounds.serve(None, unavailable='not in TensorFlow 1.15')
    VARIANTS[name](cifar10, tf, config)
    images = tf.get_local_variable(
        'images', initializer=tf.random.truncated_normal([batch_size, 24, 24, 3])
    )
    labels = tf.get_local_variable('labels', initializer=tf.range(batch_size) % 10)
    cifar10_input.num_examples = lambda *args: 50000  # No data set is needed.
    cifar10.distorted_inputs = lambda: (tf.identity(images), tf.identity(labels))
    trainer = cifar10_multi_gpu_train if num_towers > 1 else cifar10_train
    step = trainer.build_step(tf.train.get_or_create_global_step())
    session = tf.Session(config=config)
    session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
    tf.train.start_queue_runners(session)

    def block():
        session.run(step.train_op)  # Caches that went cold.
        start = time.time()
        for _ in range(STEPS_PER_BLOCK):
            session.run(step.train_op)
        return {'ms': 1e3 * (time.time() - start) / STEPS_PER_BLOCK}

    block()
    rounds.serve(block)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=20, help='default: %(default)s')
    parser.add_argument('--serve', choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    commands = {name: [sys.executable, __file__, f'--serve={name}'] for name in VARIANTS}
    samples = rounds.measure(commands, args.rounds)
    base = samples['as_it_is']['ms']
    for name, measured in samples.items():
        low, middle, high = np.percentile(np.divide(measured['ms'], base), [25, 50, 75])
        ms = np.median(measured['ms'])
        print(f'{name:33s} {ms:6.1f} ms  x {middle:.3f} ({low:.3f} to {high:.3f})', flush=True)


if __name__ == '__main__':
    main()
