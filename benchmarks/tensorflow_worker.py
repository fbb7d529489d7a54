"""Measures one thing in TensorFlow, block by block; see rounds.py.

    --measure=input       images/s of the training input alone
    --measure=step        ms of a training step with its input: session.run as the trainer
                          calls it, without its hooks
    --measure=evaluation  images/s of the evaluator's pass over --num_examples of the test set:
                          input, network, counting; variables are as initialized
    --measure=arithmetic  ms that the multiplications of a training step would take at the rate
                          of a product of two 2048 x 2048 matrices

The project's own flags apply: --batch_size, --use_fp16, --num_gpus, --data_dir, --views.
"""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10
import cifar10_eval
import cifar10_input
import cifar10_multi_gpu_train
import cifar10_train

import classic
from support import devices
import rounds

from support.compat import tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_enum('measure', None, ['input', 'step', 'evaluation', 'arithmetic'], 'What.')
tf.flags.DEFINE_bool('classic_input', False, 'One image at a time.')
tf.flags.DEFINE_bool('builtin_lrn', False, "TensorFlow's own op for LRN.")
tf.flags.DEFINE_integer('images', 2560, 'Training images in a block of --measure=step.')
tf.flags.DEFINE_float('seconds', 1.5, 'Length of a block of --measure=input.')

PRODUCTS = 15  # In a block of --measure=arithmetic.


def running_session():
    """A session whose variables are set and whose queues are being filled."""
    session = tf.Session(config=devices.session_config(FLAGS.use_fp16))
    session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
    tf.train.start_queue_runners(session)
    return session


def seconds_for(run, times):
    start = time.time()
    for _ in range(times):
        run()
    return time.time() - start


def lacks_bfloat16():
    """Is --use_fp16 set, but without effect? Reports that."""
    lacks = FLAGS.use_fp16 and devices.half_precision(FLAGS.use_fp16) != 'bfloat16'
    if lacks:
        rounds.serve(None, unavailable='no bfloat16 with this TensorFlow on this machine')
    return lacks


# --- Input -------------------------------------------------------------------


def measure_input():
    batch = tf.group(cifar10_input.distorted_inputs(cifar10.data_folder(), FLAGS.batch_size))
    session = tf.Session(config=devices.session_config(FLAGS.use_fp16))
    tf.train.start_queue_runners(session)

    def images_per_second(seconds):
        start, batches = time.time(), 0
        while time.time() - start < seconds:
            session.run(batch)
            batches += 1
        return batches * FLAGS.batch_size / (time.time() - start)

    def block():
        images_per_second(FLAGS.seconds / 3)  # What was in stock.
        return {'images_per_second': images_per_second(FLAGS.seconds)}

    rounds.serve(block, version=tf.__version__)


# --- Training ----------------------------------------------------------------


def measure_step():
    if lacks_bfloat16():
        return
    trainer = cifar10_multi_gpu_train if FLAGS.num_gpus > 1 else cifar10_train
    train_op, loss, images_per_step = trainer.build(cifar10)
    session = running_session()

    def run():
        session.run([train_op, loss])

    def block():
        steps = max(1, FLAGS.images // images_per_step)
        seconds_for(run, steps // 3 + 1)  # Batches in stock, caches that went cold.
        return {'ms': 1e3 * seconds_for(run, steps) / steps}

    seconds_for(run, 15)
    rounds.serve(block, version=tf.__version__)


def arithmetic_gflop():
    """Multiplications and additions of a training step: three times those of the forward pass.

    The gradient for conv1's input is not needed, and not counted.
    """
    conv1 = 24 * 24 * (5 * 5 * 3) * 64
    others = 12 * 12 * (5 * 5 * 64) * 64 + 2304 * 384 + 384 * 192 + 192 * 10
    return 2 * FLAGS.batch_size * (2 * conv1 + 3 * others) / 1e9


def measure_arithmetic():
    if lacks_bfloat16():
        return
    size, dtype = 2048, tf.bfloat16 if FLAGS.use_fp16 else tf.float32
    left, right = (
        tf.get_variable(name, initializer=tf.cast(tf.random_normal([size, size]), dtype))
        for name in ('left', 'right')
    )
    product = tf.matmul(left, right).op
    session = running_session()

    def block():
        session.run(product)
        seconds = seconds_for(lambda: session.run(product), PRODUCTS) / PRODUCTS
        gflops = 2 * size**3 / 1e9 / seconds
        return {'gflops': gflops, 'ms': 1e3 * arithmetic_gflop() / gflops}

    block()
    rounds.serve(block, version=tf.__version__, gflop=arithmetic_gflop())


# --- Evaluation --------------------------------------------------------------


def measure_evaluation():
    correct = cifar10_eval.correct_predictions(cifar10)
    summary_op = tf.summary.merge_all()
    initialize = [tf.global_variables_initializer(), tf.local_variables_initializer()]
    available = cifar10_input.num_examples(True, cifar10.data_folder())
    num_examples = min(FLAGS.num_examples, available)

    def block():
        with tf.Session(config=devices.session_config(FLAGS.use_fp16)) as session:
            session.run(initialize)
            start = time.time()
            cifar10_eval.count_correct(session, correct, num_examples, summary_op)
            return {'images_per_second': num_examples / (time.time() - start)}

    block()
    rounds.serve(block, version=tf.__version__)


def main():
    FLAGS(sys.argv)
    if FLAGS.classic_input:
        cifar10_input.distorted_inputs = classic.distorted_inputs
    if FLAGS.builtin_lrn:
        cifar10.local_response_normalization = classic.local_response_normalization
    {
        'input': measure_input,
        'step': measure_step,
        'evaluation': measure_evaluation,
        'arithmetic': measure_arithmetic,
    }[FLAGS.measure]()


if __name__ == '__main__':
    main()
