"""Makes the record of a training run from its event files and checkpoints.

    python cifar10_train.py --train_dir=/data/run --max_to_keep=0
    python results/record.py --train_dir=/data/run --record_dir=/data/record

Into --record_dir go

    losses.csv         every 100 steps: time, losses raw and averaged, learning rate
    checkpoints.csv    every 2,500 steps or so: the same, and precision @ 1 on the test
                       set, with moving averages and without
    model.ckpt-STEP    of the newest checkpoint the moving averages only: half the size,
                       and all that the evaluator needs

`hours` is how long trainers have been at work, from the first event of each to its
last, without the time in between. Run again on the same run, it adds what is new: a
checkpoint that is in the table already is not evaluated again.
"""

import csv
from datetime import datetime, timezone
import glob
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10
import cifar10_eval
import cifar10_train
from support import checkpoints
from support import devices
from support import script

import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_string('record_dir', '/tmp/cifar10_record', 'Folder for the tables and the model.')
tf.flags.DEFINE_integer('record_steps', 2500, 'Steps between two checkpoints to evaluate; 0: all.',
                        lower_bound=0)

SCALARS = ['learning_rate', 'total_loss', 'cross_entropy', 'local3/weight_loss',
           'local4/weight_loss', 'total_loss (raw)', 'cross_entropy (raw)']
LOSSES_COLUMNS = ['step', 'time', 'hours'] + SCALARS
CHECKPOINTS_COLUMNS = LOSSES_COLUMNS[:-2] + ['precision', 'precision without averages']


def read_table(path):
    """Dict of step -> row, itself a dict; empty where there is no table yet."""
    if not os.path.exists(path):
        return {}
    with open(path, newline='') as file:
        return {int(row['step']): row for row in csv.DictReader(file)}


def write_table(path, columns, rows):
    """Writes the rows in the order of their steps; an old table stays until this one is whole."""
    with open(path + '.tmp', 'w', newline='') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore', lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
    os.replace(path + '.tmp', path)


def read_events(path):
    """Yields the events in a file, up to its end or to where it is damaged."""
    try:
        for event in tf.train.summary_iterator(path):
            yield event
    except tf.errors.DataLossError:  # The last one, of a run that was killed.
        return


def read_losses(train_dir):
    """Dict of step -> row, from the scalars in all event files."""
    rows = {}
    worked = 0.0  # Seconds, in the files so far.
    for path in sorted(glob.glob(os.path.join(glob.escape(train_dir), 'events.out.tfevents.*'))):
        start = now = None
        for event in read_events(path):
            now = event.wall_time
            start = start or now
            values = {value.tag: value.simple_value for value in event.summary.value
                      if value.tag in SCALARS}
            if values:
                # Of an earlier trainer, killed when it was further than its checkpoint.
                for step in [step for step in rows if step >= event.step]:
                    del rows[step]
                row = {'step': event.step, 'hours': '%.4f' % ((worked + now - start) / 3600),
                       'time': datetime.fromtimestamp(now, timezone.utc).isoformat('T', 'seconds')}
                row.update((tag, '%.6g' % value) for tag, value in values.items())
                rows[event.step] = row
        if start is not None:
            worked += now - start
    return rows


def every(checkpoints, steps):
    """Of Checkpoints, oldest first, those at least so many steps apart, and the last."""
    chosen = []
    for checkpoint in checkpoints:
        if not chosen or checkpoint.step >= chosen[-1].step + steps:
            chosen.append(checkpoint)
    if chosen[-1] != checkpoints[-1]:
        chosen.append(checkpoints[-1])
    return chosen


def precision(checkpoint, averages):
    """Precision @ 1 of a Checkpoint on the whole set, with or without moving averages."""
    FLAGS.use_moving_averages = averages
    num_examples = cifar10_eval.num_examples_to_evaluate()
    with tf.Graph().as_default():
        correct = cifar10_eval.correct_predictions()
        variables = cifar10_eval.model_variables()
        saver = tf.train.Saver(variables)
        with tf.Session(config=devices.session_config()) as session:
            cifar10_eval.restore(session, saver, variables, checkpoint)
            session.run(tf.local_variables_initializer())
            right, _ = cifar10_eval.count_correct(session, correct, tf.no_op(), num_examples)
    return right / num_examples


def evaluate(checkpoints, losses, path):
    """Brings the table of precisions up to date."""
    rows = read_table(path)
    for checkpoint in checkpoints:
        # The summary before it is at most 100 steps old, unless it is the first.
        before = max((step for step in losses if step <= checkpoint.step), default=min(losses))
        row = dict(losses[before], step=checkpoint.step)
        if checkpoint.step in rows:
            if rows[checkpoint.step]['time'] != row['time']:
                raise script.UserError('%s tells of another run; name another folder with '
                                        '--record_dir' % path)
            continue
        try:
            row['precision'] = '%.4f' % precision(checkpoint, averages=True)
            row['precision without averages'] = '%.4f' % precision(checkpoint, averages=False)
        except cifar10_eval.Unusable as error:
            print('Skipping %s: %s' % (checkpoint.path, error), flush=True)
            continue
        rows[checkpoint.step] = row
        write_table(path, CHECKPOINTS_COLUMNS, rows)
        print('step %d: precision @ 1 = %s, without averages %s' % (
            checkpoint.step, row['precision'], row['precision without averages']), flush=True)


def save_averages(checkpoint, folder):
    """Writes a checkpoint of the moving averages alone. Returns its path.

    Raises:
      script.UserError: it has none, or has been removed meanwhile.
    """
    problem = checkpoints.checkpoint_damage(checkpoint.path)
    if problem is not None:
        raise script.UserError('%s: %s' % (checkpoint.path, problem))
    reader = tf.train.load_checkpoint(checkpoint.path)
    names = sorted(name for name in reader.get_variable_to_shape_map()
                   if name.endswith('/ExponentialMovingAverage'))
    if not names:
        raise script.UserError('%s holds no moving averages' % checkpoint.path)
    path = os.path.join(folder, 'model.ckpt-%d' % checkpoint.step)
    with tf.Graph().as_default(), tf.Session() as session:
        session.run(tf.raw_ops.SaveV2(
            prefix=path, tensor_names=names, shape_and_slices=[''] * len(names),
            tensors=[tf.constant(reader.get_tensor(name)) for name in names]))
    return path


def main():
    script.make_folder('record_dir')
    if os.path.realpath(FLAGS.record_dir) == os.path.realpath(FLAGS.train_dir):
        raise script.UserError('--record_dir is --train_dir, whose checkpoints it would overwrite')
    FLAGS.eval_data = 'test'
    cifar10.maybe_download_and_extract()
    losses = read_losses(FLAGS.train_dir)
    saved = checkpoints.checkpoints(FLAGS.train_dir)[::-1]
    if not losses or not saved:
        raise script.UserError('no events or no checkpoint in %s; name the folder of a run with '
                                '--train_dir' % FLAGS.train_dir)
    write_table(os.path.join(FLAGS.record_dir, 'losses.csv'), LOSSES_COLUMNS, losses)
    evaluate(every(saved, FLAGS.record_steps), losses,
             os.path.join(FLAGS.record_dir, 'checkpoints.csv'))
    print('Saved %s.' % save_averages(saved[-1], FLAGS.record_dir))


if __name__ == '__main__':
    script.run(main)
