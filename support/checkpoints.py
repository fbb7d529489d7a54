"""Finds, checks and keeps checkpoints."""

import collections
import contextlib
import errno
import fcntl
import os
import re

from support import script

import numpy as np
import tensorflow.compat.v1 as tf

# What is in the folder counts, not the state file 'checkpoint': that may be
# damaged or older than the files, or name a place from which they were moved.

# `written` tells it from one of the same step that has replaced it.
Checkpoint = collections.namedtuple('Checkpoint', ['step', 'path', 'written'])

# What reading a checkpoint may raise: IndexError where 2.x finds a file too short.
CHECKPOINT_ERRORS = (tf.errors.OpError, ValueError, IndexError)


def checkpoints(folder):
    """The Checkpoints in a folder, newest first; each path is what a tf.train.Saver takes."""
    found = []
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        match = re.match(r'(model\.ckpt-([0-9]+))\.index$', name)
        if match:
            with contextlib.suppress(FileNotFoundError):  # A trainer has just removed it.
                found.append(Checkpoint(int(match.group(2)), os.path.join(folder, match.group(1)),
                                        os.lstat(os.path.join(folder, name)).st_mtime_ns))
    return sorted(found, reverse=True)


def checkpoint_damage(path):
    """What makes a checkpoint unusable for any model, in words, or None.

    Reads all of it, since it has checksums, and wants finite numbers.
    """
    try:
        reader = tf.train.load_checkpoint(path)
        for name in sorted(reader.get_variable_to_shape_map()):
            value = reader.get_tensor(name)
            if value.dtype.kind == 'f' and not np.isfinite(value).all():
                return '%s is not finite' % name
    except CHECKPOINT_ERRORS as error:
        return script.brief(error)
    return None


def checkpoint_misfit(path, variables):
    """How a readable checkpoint differs from the model, in words, or None.

    Args:
      path: as in Checkpoint.
      variables: dict of name in the checkpoint -> tf.Variable.
    """
    reader = tf.train.load_checkpoint(path)
    shapes = reader.get_variable_to_shape_map()
    types = reader.get_variable_to_dtype_map()
    for name, variable in sorted(variables.items()):
        if name not in shapes:
            return 'it has no variable %s' % name
        there = (types[name].name, shapes[name])
        here = (variable.dtype.base_dtype.name, variable.shape.as_list())
        if there != here:
            return 'its variable %s is %s %s, not %s %s' % ((name,) + there + here)
    return None


def _finished_file(folder):
    return os.path.join(folder, 'finished')


def mark_finished(folder, step):
    """Notes for the evaluator that training ended at this step; with None, that it goes on."""
    if step is not None:
        with open(_finished_file(folder), 'w') as file:
            file.write('%d\n' % step)
    elif os.path.exists(_finished_file(folder)):
        os.remove(_finished_file(folder))


def finished_step(folder):
    """The step at which training ended because it was done, or None."""
    try:
        with open(_finished_file(folder)) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def locked(folder):
    """Holds the folder's lock, which goes with the process, however that ends.

    Raises:
      script.UserError: another trainer holds it, or the file system has no locks.
    """
    with open(os.path.join(folder, '.lock'), 'a') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise script.UserError('another trainer is at work in %s; wait for it, stop it, or '
                                    'choose another --train_dir' % folder)
        except OSError as error:
            raise script.UserError('cannot lock %s, so that no other trainer works in it: %s'
                                    % (folder, error.strerror))
        yield


def remove_leftovers(folder):
    """Removes what a trainer left that was killed while it wrote a checkpoint."""
    for name in os.listdir(folder):
        if re.fullmatch(r'checkpoint\.tmp[0-9a-f]{32}|'
                        r'model\.ckpt-[0-9]+\.(meta\.tmp[0-9a-f]{32}|'
                        r'(index|data-[0-9]{5}-of-[0-9]{5})\.tempstate[0-9]+)', name):
            os.remove(os.path.join(folder, name))


def files_by_step(folder):
    """Dict of step -> paths of its checkpoint's files, the index first; some may be missing."""
    files = collections.defaultdict(list)
    for name in sorted(os.listdir(folder), key=lambda name: not name.endswith('.index')):
        match = re.fullmatch(r'model\.ckpt-([0-9]+)\.(index|meta|data-[0-9]{5}-of-[0-9]{5})', name)
        if match:
            files[int(match.group(1))].append(os.path.join(folder, name))
    return files


def flush_to_disk(paths):
    """Returns once a power cut could not take the files away any more."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Not every file system can.
                raise
        finally:
            os.close(descriptor)


def newest_checkpoint(folder):
    """The newest usable Checkpoint, or None in a new folder. Names those it passes over.

    Raises:
      script.UserError: there are checkpoints, but none is usable.
    """
    found = checkpoints(folder)
    for checkpoint in found:
        damage = checkpoint_damage(checkpoint.path)
        if damage is None:
            return checkpoint
        script.say('Passing over %s: %s' % (checkpoint.path, damage))
    if found:
        raise script.UserError('no checkpoint in %s is usable; move them away, or choose another '
                                '--train_dir, to start afresh' % folder)
    return None
