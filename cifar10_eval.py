"""Evaluates the newest checkpoint of a training run, again and again.

    python cifar10_eval.py                            beside the trainer
    CUDA_VISIBLE_DEVICES=1 python cifar10_eval.py     on the second GPU
    python cifar10_eval.py --run_once                 once, then end

Precision @ 1 is how often the class with the largest logit is the label. The
variables are replaced by their moving averages. Every image counts exactly once.
It ends by itself when the training run is finished and its last checkpoint done.
"""

import signal

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # No traceback from Ctrl-C during the imports.

from datetime import datetime
import itertools
import os
import time

import cifar10
import cifar10_input
from support import checkpoints
from support import devices
from support import script

import numpy as np
import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_string('eval_dir', '/tmp/cifar10_eval', 'Folder for TensorBoard events.')
tf.flags.DEFINE_enum('eval_data', 'test', ['test', 'train_eval'],
                     'Evaluate on the test set or on the training set.')
tf.flags.DEFINE_string('checkpoint_dir', '/tmp/cifar10_train', 'Folder of the checkpoints.')
tf.flags.DEFINE_integer('eval_interval_secs', 300, 'Seconds between two evaluations.',
                        lower_bound=1)
tf.flags.DEFINE_integer('num_examples', cifar10.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL,
                        'How many images to evaluate; unless given, all of a test set.',
                        lower_bound=1)
tf.flags.DEFINE_bool('run_once', False, 'Evaluate once and end.')
tf.flags.DEFINE_bool('use_moving_averages', True,
                     'Evaluate the moving averages of the variables, not their last values.')
script.refuse_unreadable_folders('eval_dir', 'checkpoint_dir')

# Between two evaluations: how often to look whether the training run is finished.
POLL_SECS = 5.0


class Unusable(Exception):
    """Why a checkpoint can't be evaluated."""


def correct_predictions():
    """Builds the network on the images that the flags name.

    Returns:
      [n] bool for the next batch of n images: is the class with the largest logit the label?
    """
    images, labels = cifar10.inputs(eval_data=FLAGS.eval_data == 'test')
    logits = cifar10.inference(images)
    with tf.name_scope('precision'):
        # Not tf.nn.in_top_k: that takes a tie between all ten classes for a hit.
        return tf.equal(tf.argmax(logits, 1, output_type=tf.int32), labels)


def model_variables():
    """Dict of name in the checkpoint -> tf.Variable, for the ten variables of the model."""
    average = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
    return {average.average_name(variable) if FLAGS.use_moving_averages else variable.op.name:
            variable for variable in tf.trainable_variables()}


def restore(session, saver, variables, checkpoint):
    """Reads the variables from a Checkpoint, which the trainer may delete at any moment.

    Raises:
      Unusable: it is damaged, deleted, or lacks a variable.
    """
    try:
        problem = checkpoints.checkpoint_damage(checkpoint.path)
        if problem is None and not any(
                tf.train.load_checkpoint(checkpoint.path).has_tensor(name) for name in variables):
            problem = ('it holds no moving averages; --use_moving_averages=false does without'
                       if FLAGS.use_moving_averages else
                       'it holds moving averages only; leave out --use_moving_averages=false')
        problem = problem or checkpoints.checkpoint_misfit(checkpoint.path, variables)
        if problem is None:
            saver.restore(session, checkpoint.path)
    except checkpoints.CHECKPOINT_ERRORS as error:
        problem = script.brief(error)
    if problem is not None:
        raise Unusable(problem)


def count_correct(session, correct, summary_op, num_examples):
    """Runs the network over `num_examples` images.

    Args:
      session: a tf.Session whose variables are set.
      correct: [n] bool tensor, is the prediction of an image right?
      summary_op: run with the first batch.
      num_examples: how many images to count.

    Returns:
      The number of right predictions, and the serialized summary.

    Raises:
      script.UserError: the input ended early.
    """
    coordinator = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coordinator)
    seen = right = 0
    summary = None
    try:
        while seen < num_examples:
            if summary is None:
                is_correct, summary = session.run([correct, summary_op])
            else:
                is_correct = session.run(correct)
            is_correct = is_correct[:num_examples - seen]
            seen += is_correct.size
            right += np.count_nonzero(is_correct)
    except tf.errors.OutOfRangeError:
        pass  # Also when the input failed; join() then raises the reason.
    finally:
        coordinator.request_stop()
        coordinator.join(threads, stop_grace_period_secs=10)
    if seen != num_examples:
        raise script.UserError('only %d of %d images could be read' % (seen, num_examples))
    return right, summary


def num_examples_to_evaluate():
    """--num_examples; where it was not given, the whole test set, however large it is.

    Raises:
      tf.flags.IllegalFlagValueError: there are fewer than asked for.
    """
    available = cifar10_input.num_examples(FLAGS.eval_data == 'test', cifar10.data_folder())
    for name in 'num_examples', 'batch_size':
        if FLAGS[name].present and FLAGS[name].value > available:
            raise tf.flags.IllegalFlagValueError(
                'flag --%s=%d: --eval_data=%s has only %d images'
                % (name, FLAGS[name].value, FLAGS.eval_data, available))
    if FLAGS.eval_data == 'test' and not FLAGS['num_examples'].present:
        return available
    return min(FLAGS.num_examples, available)


def evaluate():
    """Evaluates checkpoints as they appear, each one once, the newest first.

    Raises:
      script.UserError: see watch() and count_correct().
    """
    num_examples = num_examples_to_evaluate()
    with tf.Graph().as_default() as graph:
        correct = correct_predictions()
        # Those of cifar10; the input queues add summaries of their own.
        summary_op = tf.summary.merge(tf.get_collection(tf.GraphKeys.SUMMARIES, 'summaries/'))
        variables = model_variables()
        saver = tf.train.Saver(variables)
        start_input = tf.local_variables_initializer()
        events = cifar10.EventWriter(FLAGS.eval_dir)
        events.add_graph(graph)

        def evaluate_one(checkpoint):
            with tf.Session(config=devices.session_config()) as session:
                restore(session, saver, variables, checkpoint)
                script.say('Evaluating %s on %d images.' % (checkpoint.path, num_examples))
                session.run(start_input)
                right, serialized = count_correct(session, correct, summary_op, num_examples)
            precision = right / num_examples
            script.say('%s: precision @ 1 = %.3f' % (datetime.now(), precision))
            summary = tf.Summary.FromString(serialized)
            summary.value.add(tag='Precision @ 1', simple_value=precision)
            events.add_summary(summary.SerializeToString(), checkpoint.step)

        watch(evaluate_one)


def watch(evaluate_one):
    """Calls `evaluate_one` with the newest Checkpoint, and again when there is a newer one.

    It may raise Unusable; then the next older one takes its place. Returns when the
    training run is finished and nothing is left to evaluate, or after --run_once.

    Raises:
      script.UserError: with --run_once nothing, or of a finished run not the last
        checkpoint could be evaluated.
    """
    evaluated, unusable = set(), set()
    started = float('-inf')
    waiting = False
    while True:
        # Read before the folder is listed, so that the last checkpoint is in the list.
        finished = checkpoints.finished_step(FLAGS.checkpoint_dir)
        newer = itertools.takewhile(lambda checkpoint: checkpoint not in evaluated,
                                    checkpoints.checkpoints(FLAGS.checkpoint_dir))
        checkpoint = next((each for each in newer if each not in unusable), None)

        is_time = time.monotonic() - started >= FLAGS.eval_interval_secs
        if checkpoint and (is_time or finished is not None):
            started = time.monotonic()
            waiting = False
            try:
                evaluate_one(checkpoint)
            except Unusable as error:
                script.say('Skipping %s: %s' % (checkpoint.path, error))
                unusable.add(checkpoint)
                started = float('-inf')
                continue
            evaluated.add(checkpoint)
            if FLAGS.run_once:
                return
        elif finished is not None and not checkpoint:
            if finished not in (each.step for each in evaluated):
                raise script.UserError('training finished at step %d, but its last checkpoint '
                                        'cannot be evaluated' % finished)
            script.say('Training finished at step %d and its last checkpoint is done.' % finished)
            return
        elif FLAGS.run_once:
            raise script.UserError('no usable checkpoint in %s; train first, or name another '
                                    'folder with --checkpoint_dir' % FLAGS.checkpoint_dir)
        else:
            if not waiting:
                script.say('Waiting for %s checkpoint in %s.'
                            % ('a newer' if evaluated else 'the first', FLAGS.checkpoint_dir))
                waiting = True
            time.sleep(min(POLL_SECS, FLAGS.eval_interval_secs))


def main():
    script.make_folder('eval_dir')
    if os.path.isfile(FLAGS.checkpoint_dir) or os.path.isfile(FLAGS.checkpoint_dir + '.index'):
        raise tf.flags.IllegalFlagValueError(
            'flag --checkpoint_dir=%s: name the folder, not a checkpoint' % FLAGS.checkpoint_dir)
    cifar10.maybe_download_and_extract()
    script.on_signal(lambda number: os._exit(128 + number))
    script.say(devices.describe_devices())
    evaluate()


if __name__ == '__main__':
    script.run(main)
