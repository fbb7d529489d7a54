"""Finds, checks and saves checkpoints: the files model.ckpt-STEP.* in a folder."""

import os
import re
import sys

from support import script

import numpy as np
import tensorflow.compat.v1 as tf


POLL_SECS = 5  # How often to look whether training is finished while no checkpoint comes.


def step_of(path):
    """The global step in a checkpoint's name; 0 for None."""
    return int(path.rsplit('-', 1)[1]) if path else 0


def paths(folder):
    """The checkpoints in a folder, newest first, each as a tf.train.Saver takes it.

    What is there counts, not what the state file `checkpoint` says: that may be older, or
    name the place from which somebody has moved the files.
    """
    names = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
    found = [
        name[: -len('.index')] for name in names if re.match(r'model\.ckpt-[0-9]+\.index$', name)
    ]
    return [os.path.join(folder, name) for name in sorted(found, key=step_of, reverse=True)]


def damage(path):
    """What makes a checkpoint unusable for any model, in words, or None.

    Reads all of it, for the sake of the checksums, and wants finite numbers.
    """
    try:
        reader = tf.train.load_checkpoint(path)
        for name in sorted(reader.get_variable_to_shape_map()):
            value = reader.get_tensor(name)
            if value.dtype.kind == 'f' and not np.isfinite(value).all():
                return f'{name} is not finite'
    except (tf.errors.OpError, ValueError, IndexError) as error:  # IndexError: cut short, in 2.x.
        return str(error)
    return None


def misfit(path, variables):
    """How a readable checkpoint differs from the model, in words, or None.

    Args:
      path: as in paths().
      variables: dict of name in the checkpoint -> tf.Variable.
    """
    reader = tf.train.load_checkpoint(path)
    shapes = reader.get_variable_to_shape_map()
    types = reader.get_variable_to_dtype_map()
    for name, variable in sorted(variables.items()):
        if name not in shapes:
            return f'it has no variable {name}'
        there = f'{types[name].name} {shapes[name]}'
        here = f'{variable.dtype.base_dtype.name} {variable.shape.as_list()}'
        if there != here:
            return f'its variable {name} is {there}, not {here}'
    return None


def newest(folder, required=False):
    """The newest usable checkpoint, or None where there is no checkpoint at all.

    Names those that it passes over.

    Raises:
      script.UserError: there are checkpoints, but none is usable; or one is `required`.
    """
    found = paths(folder)
    for path in found:
        problem = damage(path)
        if problem is None:
            return path
        print(f'Passing over {path}: {problem}', file=sys.stderr, flush=True)
    if found:
        raise script.UserError(
            f'no checkpoint in {folder} is usable; move them away, or choose another folder'
        )
    if required:
        raise script.UserError(f'there is no checkpoint in {folder}')
    return None


def as_they_come(folder, interval_secs):
    """Yields the newest checkpoint, and again whenever there is a newer one.

    At most one in `interval_secs`, and up to the end of training.

    Raises:
      script.UserError: there are checkpoints, but the state file is of no use.
    """
    state = tf.train.get_checkpoint_state(folder)
    if paths(folder) and not (state and tf.train.checkpoint_exists(state.model_checkpoint_path)):
        raise script.UserError(
            f'{folder}/checkpoint names no checkpoint that is there, as in a folder that was '
            'moved. --run_once evaluates the newest one.'
        )
    print(f'Evaluating checkpoints in {folder} as they come.', flush=True)
    step = None

    def is_done():
        return step is not None and step == finished_step(folder)

    for path in tf.train.checkpoints_iterator(
        folder, interval_secs, timeout=POLL_SECS, timeout_fn=is_done
    ):
        step = step_of(path)
        yield path
        if is_done():
            break
    print(f'Training finished at step {step}; no newer checkpoint will come.')


def choose(path, max_to_keep):
    """Has the next session restore this checkpoint: makes the state file name it.

    Args:
      path: as from newest(), of a checkpoint that fits the default graph.
      max_to_keep: of the checkpoints up to this one, so many are listed in the state file as
        well; 0: all. A Saver removes no others.

    Raises:
      script.UserError: it is a checkpoint of another model.
    """
    problem = misfit(path, {variable.op.name: variable for variable in tf.global_variables()})
    if problem is not None:
        raise script.UserError(
            f'{path} does not fit this model: {problem}. Choose another --train_dir, or the code '
            'that wrote it.'
        )
    folder = os.path.dirname(path)
    found = paths(folder)
    listed = [os.path.basename(each) for each in reversed(found[found.index(path) :])]
    tf.train.update_checkpoint_state(os.path.abspath(folder), listed[-1], listed[-max_to_keep:])


def expect_classes(path, known, wanted):
    """Refuses a checkpoint whose classes are as many as those of the data set, but others.

    With another number of classes it does not fit anyway.

    Raises:
      script.UserError: they are others.
    """
    if len(known) == len(wanted) and known != wanted:
        raise script.UserError(
            f'{path} knows other classes ({known[0]} ...) than the data set ({wanted[0]} ...). '
            'Choose another --train_dir.'
        )


def as_local_variable(next_creator, **kwargs):
    """For tf.variable_creator_scope: a variable that is no part of a checkpoint.

    A checkpoint is the same with one device or several, in 16 bits or 32.
    """
    kwargs['collections'] = [tf.GraphKeys.LOCAL_VARIABLES]
    return next_creator(**kwargs)


def diverged(what):
    """The UserError for a run that has become useless."""
    return script.UserError(
        f'training diverged: {what}. Nothing that is not finite was saved; the last checkpoint '
        'is good. Try a lower learning rate.'
    )


class Saver(tf.train.Saver):
    """A tf.train.Saver that saves nothing but finite numbers, and says what it could not save."""

    def __init__(self, max_to_keep, resumed=None):
        """With the path of the checkpoint that training goes on from, which is left as it is."""
        super().__init__(max_to_keep=max_to_keep, save_relative_paths=True)
        self._resumed = resumed
        with tf.name_scope('finite'):
            self._finite = {
                variable.op.name: tf.reduce_all(tf.is_finite(variable))
                for variable in tf.global_variables()
                if variable.dtype.is_floating
            }

    def save(self, session, path, global_step=None, **kwargs):
        """As in tf.train.Saver.

        Raises:
          script.UserError: a variable isn't finite, or the file can't be written.
        """
        if f'{path}-{global_step}' == self._resumed:
            return self._resumed
        bad = [name for name, finite in session.run(self._finite).items() if not finite]
        if bad:
            raise diverged('not finite: ' + ', '.join(sorted(bad)))
        try:
            return super().save(session, path, global_step, **kwargs)
        except (tf.errors.OpError, OSError, ValueError) as error:
            reason = re.search(r'.*; .*', str(error))  # Of many lines the one with 'PATH; REASON'.
            raise script.UserError(
                f'cannot save: {reason.group() if reason else error}. The checkpoints before it '
                'are good; put that right, and the same command goes on from there.'
            )


def event_writer(folder):
    """The tf.summary.FileWriter that TensorFlow's hooks find in their cache for a folder.

    It flushes every 10 s, not 120, so that TensorBoard is up to date. With room in its queue, a
    disk that is full does not hold up the run before a checkpoint is due, and tells of it.
    """
    writer = tf.summary.FileWriter(folder, max_queue=10000, flush_secs=10)
    tf.summary.FileWriterCache._cache[folder] = writer
    return writer


def _finished_file(folder):
    return os.path.join(folder, 'finished')


def mark_finished(folder, step):
    """Tells the evaluator that training has reached its last step."""
    with tf.io.gfile.GFile(_finished_file(folder), 'w') as file:
        file.write(f'{step}\n')


def clear_finished(folder):
    """Tells the evaluator that training goes on."""
    if tf.io.gfile.exists(_finished_file(folder)):
        tf.io.gfile.remove(_finished_file(folder))


def finished_step(folder):
    """The last step of a training run that has reached it, or None."""
    try:
        with tf.io.gfile.GFile(_finished_file(folder)) as file:
            return int(file.read())
    except (tf.errors.NotFoundError, ValueError):
        return None
