"""Reads what a script has written for TensorBoard, file by file."""

import glob
import os

import tensorflow.compat.v1 as tf

# To be run before a script. Summaries come at every step, and go to the file at once.
EVERY_STEP = '''
import tensorflow.compat.v1 as tf
hook, writer = tf.train.SummarySaverHook, tf.summary.FileWriter
tf.train.SummarySaverHook = lambda steps, **kwargs: hook(1, **kwargs)
tf.summary.FileWriter = lambda *args, **kwargs: writer(*args, **dict(kwargs, flush_secs=0))
'''


def sessions(folder):
    """For each event file, oldest first, the list of its events."""
    paths = sorted(glob.glob(os.path.join(str(folder), 'events.out.tfevents.*')))
    return [list(_events(path)) for path in paths]


def _events(path):
    try:
        yield from tf.train.summary_iterator(path)
    except tf.errors.DataLossError:  # Cut short by a kill.
        return


def values(events, tag=''):
    """[(step, value)] of the summaries with this tag; by default of all."""
    return [
        (event.step, value)
        for event in events
        for value in event.summary.value
        if tag in ('', value.tag)
    ]


def curve(events, tag):
    """[(step, number)] of a scalar."""
    return [(step, value.simple_value) for step, value in values(events, tag)]


def kinds(events):
    """Dict of tag -> the set of the kinds of summaries that have it."""
    result = {}
    for _, value in values(events):
        result.setdefault(value.tag, set()).add(value.WhichOneof('value'))
    return result
