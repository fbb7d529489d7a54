"""Makes the record of a training run from its event files and checkpoints.

    python cifar10_train.py --train_dir=/data/run --max_to_keep=0
    python results/record.py --train_dir=/data/run --record_dir=/data/record

For a run of experiments/cuda_convnet.py, add --model=cuda_convnet and its --net.

It writes to --record_dir:

    losses.csv         every 100 steps: time, losses raw and averaged, learning rate; the first step
                       is step 1, as in TensorBoard
    checkpoints.csv    for checkpoints 2,500 steps apart: the same without the raw losses, and
                       precision @ 1 on the test set with and without moving averages, or only
                       `precision` if the run has none
    model.ckpt-STEP    what the evaluator reads of the newest checkpoint, in half the size: only the
                       moving averages, or else the variables; with `checkpoint` and
                       batches.meta.txt

`hours` is the time during which a trainer was running. When run again, the script evaluates only
the checkpoints that are not in the table yet.
"""

import csv
from datetime import datetime, timezone
import glob
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10
import cifar10_eval
import cifar10_input
import cifar10_train
from experiments import cuda_convnet
from support import checkpoints, dataset, devices, flags, script
from support.compat import tf

MODELS = {'cifar10': cifar10, 'cuda_convnet': cuda_convnet}

FLAGS = flags.FLAGS
flags.DEFINE_enum('model', 'cifar10', sorted(MODELS), 'The module that defines the network.')
flags.DEFINE_string('record_dir', '/tmp/cifar10_record', 'Folder for the tables and the model.')
flags.DEFINE_integer(
    'record_steps',
    None,
    'Steps between two checkpoints to evaluate; 0: all. By default 2,500, or less in a short run.',
    lower_bound=0,
)
flags.adopt_module_key_flags(cifar10_train)
flags.declare_key_flag('net')

# Column of the tables -> tag in TensorBoard.
TAGS = {
    'learning_rate': 'learning_rate',
    'total_loss': 'losses/total_loss',
    'cross_entropy': 'losses/cross_entropy',
    'local3/weight_loss': 'losses/local3/weight_loss',
    'local4/weight_loss': 'losses/local4/weight_loss',
    'total_loss (raw)': 'losses/total_loss_raw',
    'cross_entropy (raw)': 'losses/cross_entropy_raw',
}
LOSSES_COLUMNS = ['step', 'time', 'hours', *TAGS]
CHECKPOINTS_COLUMNS = LOSSES_COLUMNS[:-2] + ['precision', 'precision without averages']


def read_table(path):
    """Dict of step -> row, a dict; empty if there is no table."""
    if not os.path.exists(path):
        return {}
    with open(path, newline='') as file:
        return {int(row['step']): row for row in csv.DictReader(file)}


def write_table(path, columns, rows):
    """Writes the rows in the order of their steps. Replaces an old table at the end."""
    with open(path + '.tmp', 'w', newline='') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore', lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
    os.replace(path + '.tmp', path)


def read_events(path):
    """Yields the events in a file, up to its end or the first damaged one."""
    try:
        yield from tf.train.summary_iterator(path)
    except tf.errors.DataLossError:  # The trainer was killed while it wrote this event.
        return


def read_losses(train_dir):
    """Dict of step -> row, from the scalars in all event files."""
    rows = {}
    worked = 0.0  # Seconds, in the previous files.
    paths = glob.glob(os.path.join(glob.escape(train_dir), 'events.out.tfevents.*'))
    for path in sorted(filter(os.path.isfile, paths)):  # A pipe would block.
        start = now = None
        for event in read_events(path):
            now = event.wall_time
            start = start or now
            shown = {value.tag: value.simple_value for value in event.summary.value}
            if TAGS['total_loss'] in shown:
                # Delete the rows of an earlier trainer that was killed after its last checkpoint.
                for step in [step for step in rows if step >= event.step]:
                    del rows[step]
                rows[event.step] = {
                    'step': event.step,
                    'time': datetime.fromtimestamp(now, timezone.utc).isoformat('T', 'seconds'),
                    'hours': f'{(worked + now - start) / 3600:.4f}',
                    **{c: f'{shown[tag]:.6g}' for c, tag in TAGS.items() if tag in shown},
                }
        if start is not None:
            worked += now - start
    return rows


def every(paths, steps):
    """Returns the checkpoints that are at least `steps` steps apart, and the last; oldest first."""
    if steps is None:
        steps = min(2500, checkpoints.step_of(paths[-1]) // 20)
    chosen = []
    for path in paths:
        if not chosen or checkpoints.step_of(path) >= checkpoints.step_of(chosen[-1]) + steps:
            chosen.append(path)
    if chosen[-1] != paths[-1]:
        chosen.append(paths[-1])
    return chosen


def has_averages(path):
    """Does a checkpoint hold moving averages?"""
    names = tf.train.load_checkpoint(path).get_variable_to_shape_map()
    return any(name.endswith('/ExponentialMovingAverage') for name in names)


def precision(path, averages):
    """Precision @ 1 of a checkpoint on the test set, with or without moving averages."""
    FLAGS.eval_data, FLAGS.views, FLAGS.use_moving_averages = 'test', '1', averages
    total = cifar10_input.num_examples(True, cifar10.data_folder())
    with tf.Graph().as_default():
        is_correct = cifar10_eval.correct_predictions(MODELS[FLAGS.model])
        variables = cifar10_eval.model_variables()
        checkpoints.check(path, variables)
        with tf.Session(config=devices.session_config(FLAGS.use_fp16)) as session:
            session.run(tf.local_variables_initializer())
            checkpoints.restore(session, path, variables)
            correct, _, _ = cifar10_eval.count_correct(session, is_correct, total, tf.no_op())
    return correct / total


def evaluate(paths, losses, table):
    """Adds the accuracy of the checkpoints to the table."""
    rows = read_table(table)
    for path in paths:
        step = checkpoints.step_of(path)
        # The last summary before this step, or else the first.
        before = max((each for each in losses if each <= step), default=min(losses))
        row = dict(losses[before], step=step)
        if step in rows:
            if rows[step]['time'] != row['time']:
                raise script.UserError(
                    f'{table} is about another run. Choose another --record_dir.'
                )
            continue
        try:
            checkpoints.check(path)
        except script.UserError as error:
            print(f'Skipping {script.printable(str(error))}')
            continue
        averages = has_averages(path)
        row['precision'] = f'{precision(path, averages):.4f}'
        text = f'step {step}: precision @ 1 = {row["precision"]}'
        if averages:
            row['precision without averages'] = f'{precision(path, averages=False):.4f}'
            text += f', without averages {row["precision without averages"]}'
        rows[step] = row
        write_table(table, CHECKPOINTS_COLUMNS, rows)
        print(text)


def save_model(path, folder):
    """Writes a checkpoint of only what the evaluator reads. Returns its path.

    Raises:
      script.UserError: the checkpoint is damaged or of another model.
    """
    checkpoints.check(path)
    FLAGS.use_moving_averages = has_averages(path)
    with tf.Graph().as_default(), tf.Session() as session:
        cifar10_eval.correct_predictions(MODELS[FLAGS.model])
        variables = cifar10_eval.model_variables()
        checkpoints.check(path, variables)
        checkpoints.restore(session, path, variables)
        saver = tf.train.Saver(variables, save_relative_paths=True)
        saved = os.path.join(folder, os.path.basename(path))
        return saver.save(session, saved, write_meta_graph=False)


def main(argv=None):
    script.output_folder('record_dir')
    if os.path.realpath(FLAGS.record_dir) == os.path.realpath(FLAGS.train_dir):
        raise script.UserError('--record_dir is --train_dir, whose checkpoints it would overwrite')
    train_dir = script.local_path('train_dir')
    cifar10.maybe_download_and_extract()
    print(f'Reading the events in {train_dir}.')
    losses = read_losses(train_dir)
    saved = checkpoints.paths(train_dir)[::-1]
    if not losses or not saved:
        raise script.UserError(
            f'--train_dir={train_dir}: there are no events or no checkpoints of a run'
        )
    dataset.expect_same_classes(train_dir, 'train_dir', cifar10.data_folder())
    write_table(os.path.join(FLAGS.record_dir, 'losses.csv'), LOSSES_COLUMNS, losses)
    table = os.path.join(FLAGS.record_dir, 'checkpoints.csv')
    chosen = every(saved, FLAGS.record_steps)
    print(f'Evaluating {len(chosen)} of {len(saved)} checkpoints.')
    evaluate(chosen, losses, table)
    print(f'Saved {save_model(saved[-1], FLAGS.record_dir)}.')
    dataset.write_class_names(FLAGS.record_dir, cifar10.class_names())


if __name__ == '__main__':
    script.run(main)
