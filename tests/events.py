"""Reads event files, as they are written for TensorBoard."""

import contextlib
import glob

from support.compat import tf

# Code for harness.Starter's `before`: the trainer writes summaries at every step.
AT_EVERY_STEP = 'from support import training; training.SUMMARY_STEPS = 1'


def by_file(folder):
    """For each event file, oldest first, the list of its events."""
    files = []
    for path in sorted(glob.glob(f'{folder}/events.out.tfevents.*')):
        files.append([])
        with contextlib.suppress(tf.errors.DataLossError):  # The process was killed while writing.
            for event in tf.train.summary_iterator(path):
                files[-1].append(event)
    return files


def values(events, tag=None):
    """[(step, value)] of the summaries with this tag; by default of all."""
    return [
        (event.step, value)
        for event in events
        for value in event.summary.value
        if tag in (None, value.tag)
    ]


def curve(events, tag):
    """[(step, number)] of a scalar."""
    return [(step, value.simple_value) for step, value in values(events, tag)]


def kinds(events):
    """Dict of tag -> the kind of its summaries; a tag must not have two."""
    result = {}
    for _, value in values(events):
        kind = value.WhichOneof('value')
        assert result.setdefault(value.tag, kind) == kind
    return result
