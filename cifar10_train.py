"""Trains the CIFAR-10 network on one device, a GPU if there is one.

    python cifar10_train.py                       start, or go on where it stopped
    python cifar10_train.py --max_steps=100000    train up to this step
    python cifar10_eval.py                        beside it: precision @ 1
    tensorboard --logdir /tmp/cifar10_train       losses, images, distributions

A checkpoint is written every two minutes and at the end. Ctrl-C or SIGTERM end
the run after the current step and a last checkpoint; the same command resumes it.
"""

import signal

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # No traceback from Ctrl-C during the imports.

import collections
import contextlib
from datetime import datetime
import itertools
import os
import time

import cifar10
from support import checkpoints
from support import devices
from support import script

import numpy as np
import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_string('train_dir', '/tmp/cifar10_train',
                       'Folder for checkpoints and TensorBoard events; resumed if it has any.')
tf.flags.DEFINE_integer('max_steps', 1000000, 'Train up to this global step.', lower_bound=1)
tf.flags.DEFINE_bool('log_device_placement', False, 'Log on which device each op runs.')
tf.flags.DEFINE_integer('log_frequency', 10, 'Steps between two lines of the log.', lower_bound=1)
tf.flags.DEFINE_integer('save_checkpoint_secs', 120, 'Seconds between two checkpoints.',
                        lower_bound=1)
tf.flags.DEFINE_integer('max_to_keep', 5, 'Checkpoints to keep, the newest; 0 keeps all.',
                        lower_bound=0)
script.refuse_unreadable_folders('train_dir')

SUMMARY_STEPS = 100

# What to train: the op that does a step, its loss, and how many images it takes.
Step = collections.namedtuple('Step', ['train_op', 'loss', 'num_images'])


def build_step(global_step):
    """Builds the training graph for one device. Returns a Step."""
    images, labels = cifar10.distorted_inputs()
    loss = cifar10.loss(cifar10.inference(images), labels)
    return Step(cifar10.train(loss, global_step), loss, FLAGS.batch_size)


def diverged(what):
    return script.UserError(
        'training diverged: %s. Nothing that is not finite was saved; the last checkpoint in %s '
        'is good. Try a lower learning rate.' % (what, FLAGS.train_dir))


class CheckpointHook(tf.train.SessionRunHook):
    """Saves a checkpoint every --save_checkpoint_secs and at the end.

    Raises, where a checkpoint is due:
      script.UserError: a variable isn't finite, or the file can't be written.
    """

    def __init__(self, saver, global_step, saved_step):
        """With `saved_step` None the initial values are saved as well."""
        self._saver = saver
        self._global_step = global_step
        self._saved_step = saved_step
        good = (each.step for each in checkpoints.checkpoints(FLAGS.train_dir)
                if checkpoints.checkpoint_damage(each.path) is None)
        self._good = list(itertools.islice(good, FLAGS.max_to_keep))

    def begin(self):
        self._finite = {variable.op.name: tf.reduce_all(tf.is_finite(variable))
                        for variable in tf.global_variables() if variable.dtype.is_floating}

    def after_create_session(self, session, coord):
        self._saved_at = time.monotonic()
        if self._saved_step is None:
            self._save(session)

    def after_run(self, run_context, run_values):
        if time.monotonic() - self._saved_at >= FLAGS.save_checkpoint_secs:
            self._save(run_context.session)

    def end(self, session):
        self._save(session)

    def _save(self, session):
        step, finite = session.run([self._global_step, self._finite])
        bad = sorted(name for name in finite if not finite[name])
        if bad:
            raise diverged('after step %d %s is not finite' % (step, ', '.join(bad)))
        if step != self._saved_step:
            path = os.path.join(FLAGS.train_dir, 'model.ckpt')
            try:
                self._saver.save(session, path, step)
                checkpoints.flush_to_disk(checkpoints.files_by_step(FLAGS.train_dir)[step] + [FLAGS.train_dir])
            except (tf.errors.OpError, OSError, ValueError) as error:
                with contextlib.suppress(OSError):
                    checkpoints.remove_leftovers(FLAGS.train_dir)  # A full disk needs the room.
                raise script.UserError(
                    'cannot save %s-%d: %s. The checkpoints before it are good; put that right '
                    'and run the same command again.' % (path, step, script.brief(error)))
            self._good = [step] + self._good
            self._rotate()
        self._saved_step, self._saved_at = step, time.monotonic()

    def _rotate(self):
        """Keeps --max_to_keep good checkpoints.

        The Saver would know of those only that it has written itself. With the older
        ones go the files of checkpoints that a killed trainer did not finish, or did
        not finish removing.
        """
        if 0 < FLAGS.max_to_keep <= len(self._good):
            oldest = self._good[FLAGS.max_to_keep - 1]
            for step, paths in checkpoints.files_by_step(FLAGS.train_dir).items():
                for path in paths if step < oldest else []:
                    try:
                        os.remove(path)
                    except OSError as error:  # No reason to end a run.
                        script.say('Cannot remove an old checkpoint: %s' % error)


def restorer(saver, checkpoint):
    """A Scaffold's init_fn that starts from a Checkpoint, or None.

    Raises:
      script.UserError: the checkpoint is not one of this model.
    """
    if checkpoint is None:
        return None
    misfit = checkpoints.checkpoint_misfit(
        checkpoint.path, {variable.op.name: variable for variable in tf.global_variables()})
    if misfit is not None:
        raise script.UserError('%s does not fit this model: %s. Choose another --train_dir, or '
                                'the code that wrote it.' % (checkpoint.path, misfit))
    return lambda scaffold, session: saver.restore(session, checkpoint.path)


def run_steps(step, global_step, checkpoint, signals):
    """Runs a Step until --max_steps or a signal.

    Args:
      step: the Step.
      global_step: the variable that counts the steps.
      checkpoint: the Checkpoint to start from, or None.
      signals: list of the numbers of the signals that have come; may grow meanwhile.

    Returns:
      The global step at the end.

    Raises:
      script.UserError: the loss or a variable isn't finite, or the disk is full.
    """
    with tf.control_dependencies([step.train_op]):
        steps_done = tf.identity(global_step)
    saver = tf.train.Saver(max_to_keep=0, save_relative_paths=True)  # CheckpointHook rotates.
    scaffold = tf.train.Scaffold(saver=saver, init_fn=restorer(saver, checkpoint))
    hook = CheckpointHook(saver, global_step, checkpoint and checkpoint.step)
    summary_op = tf.summary.merge_all()
    events = cifar10.EventWriter(FLAGS.train_dir)
    events.add_graph(tf.get_default_graph())
    config = devices.session_config(log_device_placement=FLAGS.log_device_placement)

    done = checkpoint.step if checkpoint else 0
    logged, logged_at = done, time.monotonic()
    with tf.train.MonitoredTrainingSession(hooks=[hook], scaffold=scaffold, config=config,
                                           save_checkpoint_secs=None) as session:
        while done < FLAGS.max_steps and not signals:
            before = done
            fetches = [step.train_op, step.loss, steps_done]
            if before % SUMMARY_STEPS == 0:
                fetches.append(summary_op)
            _, loss, done, *summary = session.run(fetches)
            if not np.isfinite(loss):
                raise diverged('the loss of step %d is %s' % (before, loss))
            if done == before:
                continue  # A loss scaler has skipped the step.
            if summary:
                events.add_summary(summary[0], before)
            if before % FLAGS.log_frequency == 0:
                now = time.monotonic()
                seconds = (now - logged_at) / (done - logged)
                logged, logged_at = done, now
                try:
                    script.say(
                        '%s: step %d, loss = %.2f (%.1f examples/sec; %.3f sec/batch)'
                        % (datetime.now(), before, loss, step.num_images / seconds, seconds))
                except BrokenPipeError:  # As in `python cifar10_train.py | head`.
                    signals.append(signal.SIGPIPE)
    return done


def train(build):
    """Trains in --train_dir, from the newest checkpoint there if there is one.

    Args:
      build: function of the global step that builds the graph and returns a Step.

    Returns:
      The exit status: 0, or 128 + the number of the signal that ended the run.
    """
    script.make_folder('train_dir')
    cifar10.maybe_download_and_extract()
    signals = []
    script.on_signal(signals.append)
    with checkpoints.locked(FLAGS.train_dir), tf.Graph().as_default():
        checkpoints.remove_leftovers(FLAGS.train_dir)
        checkpoint = checkpoints.newest_checkpoint(FLAGS.train_dir)
        if checkpoint and checkpoint.step >= FLAGS.max_steps:
            script.say('Nothing to do: %s has reached --max_steps=%d already.'
                        % (checkpoint.path, FLAGS.max_steps))
            if checkpoints.finished_step(FLAGS.train_dir) is None:
                checkpoints.mark_finished(FLAGS.train_dir, checkpoint.step)
            return 0

        script.say(devices.describe_devices())
        if checkpoint:
            script.say('Resuming from %s.' % checkpoint.path)
        checkpoints.mark_finished(FLAGS.train_dir, None)
        with tf.device('/cpu:0'):
            global_step = tf.train.get_or_create_global_step()
        try:
            done = run_steps(build(global_step), global_step, checkpoint, signals)
        except script.USER_OP_ERRORS as error:
            saved = checkpoints.checkpoints(FLAGS.train_dir)
            raise script.UserError('%s. %s' % (script.brief(error), (
                'Saved %s; put that right, and the same command goes on from there.'
                % saved[0].path if saved else 'Nothing was saved yet.')))

        saved = os.path.join(FLAGS.train_dir, 'model.ckpt-%d' % done)
        if done < FLAGS.max_steps:
            script.say('Stopped by %s at step %d. Saved %s; the same command goes on from there.'
                        % (signal.Signals(signals[0]).name, done, saved))
            return 128 + signals[0]
        checkpoints.mark_finished(FLAGS.train_dir, done)
        script.say('Finished at step %d. Saved %s.' % (done, saved))
        return 0


def main():
    return train(build_step)


if __name__ == '__main__':
    script.run(main)
