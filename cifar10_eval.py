"""Evaluates the newest checkpoint of a training run, again and again.

    python cifar10_eval.py                            beside the trainer
    CUDA_VISIBLE_DEVICES=1 python cifar10_eval.py     on the second GPU
    python cifar10_eval.py --run_once                 once, then end

Precision @ 1 is how often the most probable class is the label. The variables are
replaced by their moving averages. Every image counts exactly once. With --views=10 the
probabilities are those of ten views of an image, averaged; that is another figure.
It ends by itself when the training run is finished and its last checkpoint done.
"""

from datetime import datetime

import cifar10
import cifar10_input
from support import checkpoints, devices, script

import numpy as np
import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_string('eval_dir', '/tmp/cifar10_eval', 'Folder of TensorBoard events.')
tf.flags.DEFINE_enum('eval_data', 'test', ['test', 'train_eval'], 'Test set or training set.')
tf.flags.DEFINE_string('checkpoint_dir', '/tmp/cifar10_train', 'Folder of the checkpoints.')
tf.flags.DEFINE_integer('eval_interval_secs', 300, 'Seconds between evaluations.', lower_bound=1)
tf.flags.DEFINE_integer('num_examples', 10000, 'Images to evaluate, at most.', lower_bound=1)
tf.flags.DEFINE_bool('run_once', False, 'Evaluate once and end.')
tf.flags.DEFINE_enum(
    'views', '1', ['1', '10'], 'The centre of an image, or corners and mirror images too.'
)
tf.flags.DEFINE_bool('use_moving_averages', True, 'Take the averages for the variables.')
tf.flags.adopt_module_key_flags(cifar10)


def correct_predictions():
    """Builds the network on the images that the flags name.

    Returns:
      [n] bool for the next batch of n images: is the most probable class the label?
    """
    num_views = int(FLAGS.views)
    images, labels = cifar10.inputs(FLAGS.eval_data == 'test', num_views)
    probabilities = cifar10.probabilities(images, len(cifar10.class_names()), num_views)
    with tf.name_scope('precision'):
        # Not tf.nn.in_top_k: that takes a tie between all classes for a hit.
        return tf.equal(tf.argmax(probabilities, 1, output_type=tf.int32), labels)


def model_variables():
    """Dict of name in the checkpoint -> tf.Variable, for the ten variables of the model."""
    if FLAGS.use_moving_averages:
        # Made for the sake of its names: nothing is averaged here.
        average = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
        return average.variables_to_restore()
    return {variable.op.name: variable for variable in tf.trainable_variables()}


def count_correct(session, correct, num_examples, summary_op):
    """Runs the network over `num_examples` images.

    Args:
      session: a tf.Session whose variables are set.
      correct: from correct_predictions().
      summary_op: run with the first batch.

    Returns:
      The number of right predictions, and the serialized summary.

    Raises:
      script.UserError: the input ended early.
    """
    start_over = tf.train.Scaffold.get_or_default(  # Made once for the graph.
        'local_init_op', tf.GraphKeys.LOCAL_INIT_OP, tf.local_variables_initializer
    )
    session.run(start_over)
    coordinator = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coordinator)
    is_correct, summary = np.empty(0, bool), None
    try:
        while is_correct.size < num_examples:
            if summary is None:
                batch, summary = session.run([correct, summary_op])
            else:
                batch = session.run(correct)
            is_correct = np.append(is_correct, batch)
    except tf.errors.OutOfRangeError:
        pass  # Also when the input failed; join() then raises the reason.
    finally:
        coordinator.request_stop()
        coordinator.join(threads, stop_grace_period_secs=10)
    if is_correct.size < num_examples:
        raise script.UserError(f'only {is_correct.size} of {num_examples} images could be read')
    return np.count_nonzero(is_correct[:num_examples]), summary


def checkpoints_to_evaluate():
    """The newest checkpoint; without --run_once, again whenever there is a newer one."""
    if FLAGS.run_once:
        return [checkpoints.newest(FLAGS.checkpoint_dir, required=True)]
    return checkpoints.as_they_come(FLAGS.checkpoint_dir, FLAGS.eval_interval_secs)


def evaluate():
    """Prints the precision @ 1 of checkpoints, and writes it for TensorBoard."""
    available = cifar10_input.num_examples(FLAGS.eval_data == 'test', cifar10.data_folder())
    total = min(FLAGS.num_examples, available)
    of = '' if total == available else f' of {available}'
    views = '' if FLAGS.views == '1' else f' ({FLAGS.views} views)'
    with tf.Graph().as_default() as graph:
        correct = correct_predictions()
        cifar10.summarize_activations()
        shown = tf.get_collection(tf.GraphKeys.SUMMARIES, '(?!input/)')  # Not the queues.
        summary_op = tf.summary.merge(shown)
        variables = model_variables()
        saver = tf.train.Saver(variables)
        writer = tf.summary.FileWriter(FLAGS.eval_dir, graph)

        for path in checkpoints_to_evaluate():
            problem = checkpoints.damage(path) or checkpoints.misfit(path, variables)
            if problem:
                if FLAGS.run_once:
                    raise script.UserError(f'cannot evaluate {path}: {problem}')
                print(f'Skipping {path}: {problem}', flush=True)
                continue
            # A session of its own: new queues, so that the input starts from the beginning.
            with tf.Session(config=devices.session_config(FLAGS.use_fp16)) as session:
                saver.restore(session, path)
                print(f'Evaluating {path} on {total}{of} images{views}.', flush=True)
                right, serialized = count_correct(session, correct, total, summary_op)
            print(f'{datetime.now()}: precision @ 1 = {right / total:.3f}{views}', flush=True)
            summary = tf.Summary.FromString(serialized)
            summary.value.add(tag='Precision @ 1' + views, simple_value=right / total)
            writer.add_summary(summary, checkpoints.step_of(path))
            writer.flush()


def main():
    cifar10.maybe_download_and_extract()
    print(devices.describe(FLAGS.use_fp16), flush=True)
    evaluate()


if __name__ == '__main__':
    script.run(main)
