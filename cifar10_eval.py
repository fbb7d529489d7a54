"""Evaluates the newest checkpoint of a training run, again and again.

    python cifar10_eval.py                            while the trainer runs
    CUDA_VISIBLE_DEVICES=1 python cifar10_eval.py     on the second GPU
    python cifar10_eval.py --run_once                 once

Precision @ 1, the accuracy, is the fraction of images whose most probable class is the label. Every
image counts exactly once. The variables are replaced by their moving averages. With --views=10 the
probabilities are averages over ten views of an image, which gives a higher accuracy. The
trainer writes a file `finished` at its last step. The evaluator ends after evaluating that step.
"""

from datetime import datetime

import cifar10
import cifar10_input
from support import checkpoints, devices, events, flags, script, views
from support.compat import tf

FLAGS = flags.FLAGS
flags.DEFINE_string('eval_dir', '/tmp/cifar10_eval', 'Folder of TensorBoard events.')
flags.DEFINE_enum('eval_data', 'test', ['test', 'train_eval'], 'Test set or training set.')
flags.DEFINE_string(
    'checkpoint_dir', '/tmp/cifar10_train', 'Folder of checkpoints, or one checkpoint.'
)
flags.DEFINE_integer('eval_interval_secs', 300, 'Seconds between evaluations.', lower_bound=1)
flags.DEFINE_integer('num_examples', 10000, 'Images to evaluate, at most.', lower_bound=1)
flags.DEFINE_bool('run_once', False, 'Evaluate once and end.')
flags.DEFINE_enum(
    'views', '1', ['1', '10'], 'The center of an image, or also its corners and mirror images.'
)
flags.DEFINE_bool('use_moving_averages', True, 'Evaluate the moving averages of the variables.')
flags.adopt_module_key_flags(cifar10)


def correct_predictions(model):
    """Builds the network on its test input. [n] bool: is the most probable class the label?"""
    images, labels = model.inputs(
        FLAGS.eval_data == 'test', num_epochs=1, num_views=int(FLAGS.views)
    )
    # Not tf.nn.in_top_k: it counts a tie between all classes as correct.
    probabilities = views.probabilities(model.inference, images)
    predictions = tf.argmax(probabilities, 1, output_type=tf.int32)
    return tf.equal(predictions, tf.cast(labels, tf.int32))


def model_variables():
    """Dict of name in the checkpoint -> tf.Variable, for the variables of the model."""
    if FLAGS.use_moving_averages:
        # This object computes no averages here. It knows under which name a checkpoint holds the
        # average of each variable: conv1/weights/ExponentialMovingAverage for conv1/weights.
        average = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
        return average.variables_to_restore(tf.trainable_variables())
    return {variable.op.name: variable for variable in tf.trainable_variables()}


def count_correct(session, is_correct, num_examples, summary_op):
    """Runs the network over one pass of the data, but at most over `num_examples` images.

    Args:
      session: a tf.Session whose variables are set.
      is_correct: [n] bool, for the next batch of n images.
      summary_op: run with the first batch.

    Returns:
      The number of correct predictions, the number of images, and the serialized summary.
    """
    coordinator = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coordinator)
    results, summary = [], None
    try:
        with script.progress(lambda: f'{len(results)} of {num_examples} images'):
            batch, summary = session.run([is_correct, summary_op])
            results.extend(batch)
            while len(results) < num_examples:
                results.extend(session.run(is_correct))
    except tf.errors.OutOfRangeError:
        pass  # All images were read, or a thread failed: then join() raises its error.
    finally:
        coordinator.request_stop()
        coordinator.join(threads, stop_grace_period_secs=10)
    results = results[:num_examples]
    return sum(results), len(results), summary


def num_examples():
    """How many images to evaluate: all that there are, but at most --num_examples."""
    try:
        available = cifar10_input.num_examples(FLAGS.eval_data == 'test', cifar10.data_folder())
    except FileNotFoundError:  # The model does not read --data_dir.
        return FLAGS.num_examples
    return min(available, FLAGS.num_examples)


def label():
    """The settings that are not the tutorial's, such as ' (10 views)'."""
    details = [f'{FLAGS.views} views'] if FLAGS.views != '1' else []
    details += ['training set'] if FLAGS.eval_data != 'test' else []
    details += ['no averages'] if not FLAGS.use_moving_averages else []
    return f' ({", ".join(details)})' if details else ''


def evaluate(model=cifar10):
    """Prints the precision @ 1 of checkpoints of a model, and writes it for TensorBoard."""
    eval_dir = checkpoints.output_folder_beside('eval_dir', 'checkpoint_dir')
    once = FLAGS.run_once or checkpoints.is_single(FLAGS.checkpoint_dir)
    paths = checkpoints.as_they_come('checkpoint_dir', None if once else FLAGS.eval_interval_secs)
    with tf.Graph().as_default() as graph:
        is_correct = correct_predictions(model)
        variables = model_variables()
        saver = tf.train.Saver(variables)
        summary_op = tf.summary.merge(
            tf.get_collection(tf.GraphKeys.SUMMARIES, '(?!input/)')  # Not how full the queues are.
        )
        start_input = tf.local_variables_initializer()
        writer = events.Writer(eval_dir, graph)

        for path in paths:
            # A new session has new queues, so the input starts from the beginning.
            with tf.Session(config=devices.session_config(FLAGS.use_fp16)) as session:
                if not checkpoints.restore_usable(
                    session, saver, path, variables, cifar10.data_folder(), or_raise=once
                ):
                    continue
                num_images = num_examples()
                print(f'Evaluating {path} on {num_images} images.')
                session.run(start_input)
                correct, total, serialized = count_correct(
                    session, is_correct, num_images, summary_op
                )
            if num_examples() != num_images:
                raise script.UserError(f'{cifar10.data_folder()} changed during the evaluation')
            print(f'{datetime.now()}: precision @ 1 = {correct / total:.3f}{label()}')
            summary = tf.Summary.FromString(serialized)
            summary.value.add(tag='Precision @ 1' + label(), simple_value=correct / total)
            writer.add_summary(summary.SerializeToString(), checkpoints.step_of(path))


def main(argv=None):
    # Fail before the download, which takes minutes.
    checkpoints.output_folder_beside('eval_dir', 'checkpoint_dir')
    cifar10.maybe_download_and_extract()
    print(devices.describe(FLAGS.use_fp16))
    evaluate()


if __name__ == '__main__':
    script.run(main)
