"""What a training run needs besides its loop: lock, resume, checkpoints, summaries, signals."""

import contextlib
import os
import signal
import time

import numpy as np

from support import checkpoints, dataset, events, script
from support.compat import tf

SUMMARY_STEPS = 100


@contextlib.contextmanager
def open_run(folder, max_steps, data_folder):
    """Locks the folder of a run and finds the checkpoint to resume from.

    Args:
      folder: --train_dir; has to exist and to be writable.
      max_steps: the step at which training ends.
      data_folder: the folder of the .bin files, and of their class names.

    Yields:
      A Run.

    Raises:
      script.UserError: another trainer uses the folder, or what it holds cannot be resumed.
    """
    with script.locked(folder, f'another trainer is running in {folder}') as lock:
        run = Run(folder, max_steps, dataset.class_names(data_folder), lock)
        if run.is_finished:
            print(
                f'Nothing to do: {run.checkpoint} has reached --max_steps={max_steps}. A higher '
                '--max_steps resumes training.'
            )
        elif run.checkpoint:
            dataset.expect_same_classes(folder, 'train_dir', data_folder)
            print(f'Resuming from {run.checkpoint}, up to step {max_steps}.')
        else:
            print(f'Training in {folder}, up to step {max_steps}.')
        yield run


class Run:
    """A training run in a locked folder.

    Attributes:
      checkpoint: path of the checkpoint to resume from, or None.
      step: the number of steps done before this run.
      is_finished: has the checkpoint reached the last step?
      status: the exit status, 0 or 128 + the number of the signal that stopped the run.
    """

    def __init__(self, folder, max_steps, class_names, lock):
        self._folder, self._max_steps = folder, max_steps
        self._class_names, self._lock = class_names, lock
        self.checkpoint = checkpoints.newest(folder)
        self.step = checkpoints.step_of(self.checkpoint)
        self.is_finished = self.step >= max_steps
        self.status = 0

    @contextlib.contextmanager
    def session(self, loss, save_secs, max_to_keep, config=None, master=''):
        """Opens a session on the default graph that looks after the run.

        It initializes or restores the variables and starts the queue runners. Its hooks, called
        before and after every session.run(), save checkpoints, write summaries and end the loop:
        session.should_stop() is true after the last step or a signal. Then it saves once more.

        Args:
          loss: scalar; the run ends with an error if it is not finite.
          save_secs, max_to_keep: how often to save checkpoints, and how many to keep.
          config: a tf.ConfigProto.
          master: address of a tf.train.Server; '' for this process.

        Yields:
          A tf.train.SingularMonitoredSession.

        Raises:
          script.UserError: the checkpoint does not fit the graph, training diverged, the disk is
            full, or the folder was deleted.
        """
        variables = checkpoints.saved_variables()
        if self.checkpoint:
            checkpoints.check(self.checkpoint, variables)
        with checkpoints.writing(self._folder):
            checkpoints.clear_finished(self._folder)
            # With the names, a checkpoint can be used without the data set.
            dataset.write_class_names(self._folder, self._class_names)

        def restore(scaffold, session):
            if self.checkpoint:
                checkpoints.restore(session, self.checkpoint, variables)

        saver = checkpoints.Saver(max_to_keep, self.checkpoint)
        scaffold = tf.train.Scaffold(init_fn=restore, saver=saver)
        writer = events.Writer(self._folder, tf.get_default_graph())
        with script.StopSignals() as signals:
            hooks = [
                tf.train.StopAtStepHook(last_step=self._max_steps),
                _Watch(self._folder, loss, saver, save_secs, self._lock, signals),
                tf.train.SummarySaverHook(SUMMARY_STEPS, summary_writer=writer, scaffold=scaffold),
            ]
            with tf.train.SingularMonitoredSession(hooks, scaffold, master, config) as session:
                yield session
        self._report_end(saver.newest, signals.number)

    def _report_end(self, saved, number):
        step = checkpoints.step_of(saved)
        if step >= self._max_steps:
            with checkpoints.writing(self._folder):
                checkpoints.mark_finished(self._folder, step)
            print(f'Finished at step {step}. Saved {saved}.')
        elif number:
            print(
                f'Stopped by {signal.Signals(number).name} at step {step}. Saved {saved}; the same '
                'command resumes from there.'
            )
            self.status = 128 + number
        else:  # The session takes the end of the input for a normal end.
            raise RuntimeError(f'the input ended at step {step}')


class _Watch(tf.train.SessionRunHook):
    """Saves checkpoints. After each step, ends the run for whatever reason there is to end it.

    Unlike tf.train.CheckpointSaverHook, it writes no events.
    """

    def __init__(self, folder, loss, saver, save_secs, lock, signals):
        self._folder, self._loss, self._saver = folder, loss, saver
        self._save_secs, self._lock, self._signals = save_secs, lock, signals

    def after_create_session(self, session, coord):
        self._save(session)
        with checkpoints.writing(self._folder):
            graph_def = session.graph.as_graph_def(add_shapes=True)
            tf.train.write_graph(graph_def, self._folder, 'graph.pbtxt')

    def before_run(self, run_context):
        return tf.train.SessionRunArgs(self._loss)

    def after_run(self, run_context, run_values):
        if not np.isfinite(run_values.results):
            raise checkpoints.diverged(f'the loss is {run_values.results}')
        self._lock.check()
        if self._signals.number:
            run_context.request_stop()
        if time.monotonic() > self._saved_at + self._save_secs:
            self._save(run_context.session)

    def end(self, session):
        self._save(session)

    def _save(self, session):
        path = os.path.join(self._folder, 'model.ckpt')
        self._saver.save(session, path, session.run(tf.train.get_global_step()))
        self._saved_at = time.monotonic()
