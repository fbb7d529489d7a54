"""Finds, checks, restores and saves checkpoints: the files model.ckpt-STEP.* in a folder."""

import contextlib
import glob
import os
import re
import sys
import time

import numpy as np

from support import dataset, script
from support.compat import tf

FIRST_REPORT_SECS = 10  # The first line about a missing checkpoint; then after 20, 40, 80, ...
POLL_SECS = 5  # How often to look whether training has finished while no checkpoint appears.


# --- Finding -------------------------------------------------------------------


def step_of(path):
    """The global step in a checkpoint's name; 0 for None."""
    return int(path.rsplit('-', 1)[1]) if path else 0


def paths(folder):
    """The checkpoints in a folder, newest first, each as a tf.train.Saver takes it.

    These are the files that exist. The state file `checkpoint` may be older, or name the folder
    from which somebody has moved the files.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    # Before TensorFlow 0.12, a checkpoint was a single file without '.index': the V1 format.
    matches = [re.match(r'(model\.ckpt-[0-9]+)(\.index)?$', name) for name in names]
    found = {match.group(1) for match in matches if match}
    return [os.path.join(folder, name) for name in sorted(found, key=step_of, reverse=True)]


def is_single(place):
    """Does it name a checkpoint, such as RUN/model.ckpt-1000, and not a folder?"""
    return re.search(r'model\.ckpt-[0-9]+$', place) is not None and not os.path.isdir(place)


def folder_of(place):
    """The folder of a checkpoint, or the folder itself."""
    return os.path.dirname(place) if is_single(place) else place


def evaluation_folder_of(place):
    """The default folder for evaluations of a folder of checkpoints or of one of them: RUN_eval."""
    folder = folder_of(place).rstrip('/')
    if os.path.basename(folder) in ('', '.', '..'):
        folder = os.path.abspath(folder_of(place))
    return folder + '_eval'


def output_folder_beside(flag, checkpoint_flag):
    """As script.output_folder(flag), with a default that depends on another flag.

    The usual default is used with the default of `checkpoint_flag`. With any other folder RUN, the
    default is RUN_eval, because TensorBoard would join two models in one folder into one curve.
    """
    flags = script.FLAGS
    place = script.local_path(checkpoint_flag)
    _expect_folder(place)
    if flags[flag].using_default_value and place != flags[checkpoint_flag].default:
        flags[flag].value = evaluation_folder_of(place)
    return script.output_folder(flag)


def _expect_folder(place):
    """Rejects a file, such as RUN/model.ckpt-1000.index, which a shell may have completed."""
    if os.path.isfile(place) and not is_single(place):
        raise script.UserError(
            f'{place} is a file. Name the folder, or a checkpoint without the ending: '
            'RUN/model.ckpt-1000'
        )


def newest(place):
    """The newest usable checkpoint in a folder, or None if the folder holds none.

    Prints the ones that it skips. `place` may also be a single checkpoint, such as
    RUN/model.ckpt-1000.

    Raises:
      script.UserError: there are checkpoints, but none is usable.
    """
    if is_single(place):
        check(place)
        return place
    found = paths(place)
    for path in found:
        try:
            check(path)
            return path
        except script.UserError as error:
            print(f'Skipping {script.printable(str(error))}', file=sys.stderr)
    if found:
        raise script.UserError(
            f'no checkpoint in {place} is usable. Move them away, or choose another folder.'
        )
    return None


def newest_required(flag):
    """As newest(), of the folder or checkpoint that a flag names, which has to exist."""
    place = script.local_path(flag)
    _expect_folder(place)
    path = newest(place)
    if path is None:
        raise script.UserError(f'--{flag}={place}: there is no checkpoint')
    return path


def as_they_come(flag, interval_secs):
    """Yields the newest checkpoint in the folder that a flag names, and later ones as they appear.

    At most one in `interval_secs`, each time the newest, until training has finished. With None,
    only the newest one; then the flag may also name that checkpoint.

    Raises:
      script.UserError: there is no checkpoint and nothing to wait for, or the state file names none
        of those that there are.
    """
    if interval_secs is None:
        yield newest_required(flag)
        return
    folder = script.local_path(flag)
    expect_regular(os.path.join(folder, 'checkpoint'), _finished_file(folder))
    state = tf.train.get_checkpoint_state(folder)
    if paths(folder) and not (state and tf.train.checkpoint_exists(state.model_checkpoint_path)):
        raise script.UserError(
            f'{folder}/checkpoint does not name a checkpoint that exists, as in a folder that was '
            'moved. Evaluate the newest one with --run_once.'
        )
    print(f'Waiting for new checkpoints in {folder}.')
    step, started, next_report = None, time.monotonic(), FIRST_REPORT_SECS

    def is_done():
        nonlocal next_report
        waited = time.monotonic() - started
        if step is None and waited > next_report:
            print(f'No checkpoint after {waited:.0f} s. Is {folder} the --train_dir of a trainer?')
            next_report *= 2
        return step is not None and step == finished_step(folder)

    for path in tf.train.checkpoints_iterator(
        folder, interval_secs, timeout=POLL_SECS, timeout_fn=is_done
    ):
        step = step_of(path)
        yield path
        if is_done():
            break
    print(f'Training finished at step {step}; there will be no newer checkpoint.')


# --- Checking and restoring ----------------------------------------------------


def _reason(error):
    """The line of an error's message that says what is wrong."""
    # saver.restore() puts a guess at the cause before the original error.
    text = (getattr(error, 'message', None) or str(error)).split('Original error:')[-1]
    # TensorFlow 2 first says which op failed and where it was created.
    return re.sub(r'(?s).*\nNode: [^\n]*\n', '', text).strip().split('\n')[0]


@contextlib.contextmanager
def reading(path):
    """Turns TensorFlow's errors about a damaged or deleted checkpoint into a UserError."""
    try:
        yield
    except (tf.errors.OpError, ValueError, IndexError) as error:  # IndexError: truncated, in 2.x.
        raise script.UserError(f'{path}: {_reason(error)}')


def expect_regular(*files):
    """Rejects pipes and devices: TensorFlow would wait for a writer, or read without end."""
    for file in files:
        if os.path.exists(file) and not os.path.isfile(file):
            raise script.UserError(f'{file} is not a regular file')


def check(path, variables=None):
    """Reads a whole checkpoint, which verifies its checksums.

    Args:
      variables: dict of name in the checkpoint -> tf.Variable, the ones to be restored.

    Raises:
      script.UserError: it is damaged, holds a number that is not finite, or does not fit the
        variables.
    """
    expect_regular(path, *glob.glob(glob.escape(path) + '.*'))
    with reading(path):
        reader = tf.train.load_checkpoint(path)
        shapes, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        for name in sorted(shapes):
            value = reader.get_tensor(name)
            if value.dtype.kind == 'f' and not np.isfinite(value).all():
                raise script.UserError(f'{path}: {name} is not finite')
    for name, variable in sorted((variables or {}).items()):
        if name not in shapes:
            raise script.UserError(f'{path}: has no variable {name}, so it is of another model')
        there, here = shapes[name], variable.shape.as_list()
        # The classic multi-GPU trainer has a global_step of type float32.
        is_same_type = types[name] == variable.dtype.base_dtype or name == 'global_step'
        if there != here or not is_same_type:
            raise script.UserError(
                f'{path}: variable {name} is {types[name].name} {there}, but this model has '
                f'{variable.dtype.base_dtype.name} {here}'
            )


def restore(session, path, variables):
    """Assigns the values in a checkpoint to variables, converted to the variables' types.

    Args:
      path: of a checkpoint that has passed check().
      variables: dict of name in the checkpoint -> tf.Variable.
    """
    with reading(path):
        reader = tf.train.load_checkpoint(path)
        values = {name: reader.get_tensor(name) for name in variables}
    for name, variable in variables.items():
        variable.load(values[name], session)


def restore_usable(session, saver, path, variables, data_folder, or_raise):
    """Restores a checkpoint for evaluation.

    Args:
      saver: a tf.train.Saver of the variables.
      variables: dict of name in the checkpoint -> tf.Variable.
      data_folder: the folder of the data set, whose classes have to be those of the model.
      or_raise: raise a script.UserError if the checkpoint is unusable.

    Returns:
      True, or False for an unusable checkpoint, after printing what is wrong with it.
    """
    try:
        dataset.expect_same_classes(os.path.dirname(path), 'checkpoint_dir', data_folder)
        check(path, variables)
        with reading(path):
            saver.restore(session, path)
    except script.UserError as error:
        if or_raise:
            raise
        print(f'Skipping {script.printable(str(error))}')
        return False
    return True


# --- Saving --------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder):
    """Turns TensorFlow's and Python's errors about a full disk and the like into a UserError."""
    try:
        yield
    except (tf.errors.OpError, OSError, ValueError) as error:
        raise script.UserError(
            f'cannot write to {folder}: {_reason(error)}. Nothing that was saved is lost: fix this '
            'and run the same command again.'
        )


def not_saved(next_creator, **kwargs):
    """For tf.variable_creator_scope: a variable that checkpoints leave out.

    A checkpoint is the same with one device or several, in 16 bits or 32.
    """
    kwargs['collections'] = [tf.GraphKeys.GLOBAL_VARIABLES, 'not_saved']
    return next_creator(**kwargs)


def saved_variables():
    """Dict of name -> tf.Variable: what a checkpoint of the default graph holds."""
    left_out = {variable.op.name for variable in tf.get_collection('not_saved')}
    names = {variable.op.name: variable for variable in tf.global_variables()}
    return {name: variable for name, variable in names.items() if name not in left_out}


def diverged(what):
    """The UserError for a run that has become useless."""
    return script.UserError(
        f'training diverged: {what}. This was not saved; the last checkpoint is good. Try a lower '
        'learning rate.'
    )


class Saver(tf.train.Saver):
    """A tf.train.Saver that saves only finite numbers and explains why it cannot save.

    Attributes:
      newest: path of the newest checkpoint, or None.
    """

    def __init__(self, max_to_keep, resumed=None):
        """
        Args:
          max_to_keep: number of newest checkpoints to keep; 0: all.
          resumed: path of the checkpoint from which training resumes, or None. It and the older
            ones, up to max_to_keep, count as checkpoints of this run.
        """
        variables = saved_variables()
        super().__init__(variables, max_to_keep=max_to_keep, save_relative_paths=True)
        self.newest = resumed
        if resumed:
            found = paths(os.path.dirname(resumed))
            kept = found[found.index(resumed) :][: max_to_keep or None]
            self.recover_last_checkpoints(kept[::-1])
        with tf.name_scope('finite'):
            self._finite = {
                name: tf.reduce_all(tf.is_finite(variable))
                for name, variable in variables.items()
                if variable.dtype.is_floating
            }

    def save(self, session, path, global_step=None, **kwargs):
        """As in tf.train.Saver, but the newest checkpoint is not saved again.

        Raises:
          script.UserError: a variable is not finite, or the file cannot be written.
        """
        if f'{path}-{global_step}' == self.newest:
            return self.newest
        bad = [name for name, finite in session.run(self._finite).items() if not finite]
        if bad:
            raise diverged('not finite: ' + ', '.join(sorted(bad)))
        with writing(os.path.dirname(path)):
            self.newest = super().save(session, path, global_step, **kwargs)
        return self.newest


# --- The end of training, for the evaluator ------------------------------------


def _finished_file(folder):
    return os.path.join(folder, 'finished')


def mark_finished(folder, step):
    """Records that training has reached its last step."""
    with open(_finished_file(folder), 'w') as file:
        file.write(f'{step}\n')


def clear_finished(folder):
    """Records that training continues."""
    if os.path.exists(_finished_file(folder)):
        os.remove(_finished_file(folder))


def finished_step(folder):
    """The last step of a finished training run, or None."""
    try:
        with open(_finished_file(folder)) as file:
            return int(file.read())
    except (FileNotFoundError, ValueError):
        return None
