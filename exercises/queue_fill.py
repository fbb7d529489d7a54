"""Exercise: fewer images in the queue before training begins.

    python exercises/queue_fill.py     or: make exercise NAME=queue_fill

The first step waits until the queue holds min_fraction_of_examples_in_queue of an epoch. With
less, it comes sooner. The price: a batch mixes only what is in the queue at the same time. That
cannot be seen with CIFAR-10's files, which are shuffled already. So here is also a copy of them
sorted by class, as one gets it by writing a data set folder by folder: two classes a file.
(Needs matplotlib.)

Mixed well, the commonest class of a batch of 128 makes 14 % of it; queue_fill.png shows what
became of the classes. 10 seconds on two cores of an AMD EPYC (Zen 4), with TensorFlow 2.21:

    0.4: first batch after 0.43 s; of files sorted by class, the commonest makes 24%
    0.05: first batch after 0.15 s; of files sorted by class, the commonest makes 71%
    0.005: first batch after 0.11 s; of files sorted by class, the commonest makes 89%

Reading 256 records at a time, this tutorial has filled its queue before one has noticed: the
fraction of 0.4 may stay.
"""

import contextlib
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10
import cifar10_input
from support import script

from matplotlib.figure import Figure
import numpy as np
import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
FRACTIONS = [0.4, 0.05, 0.005]
NUM_BATCHES = 100
tf.flags.DEFINE_string('picture', '/tmp/queue_fill.png', 'Where to draw the batches.')


def write_sorted(source, folder):
    """Copies the training files, with all records in the order of their labels."""
    files = cifar10_input.data_files(False, source)
    records = np.concatenate([np.fromfile(path, np.uint8) for path in files])
    records = records.reshape(-1, cifar10_input.RECORD_BYTES)
    records = records[np.argsort(records[:, 0], kind='stable')]
    for path, part in zip(files, np.array_split(records, len(files))):
        part.tofile(os.path.join(folder, os.path.basename(path)))


def first_batches(folder, fraction):
    """The seconds up to the first batch, and for each batch the share of each class."""
    with tf.Graph().as_default():
        with contextlib.redirect_stdout(None):
            _, labels = cifar10_input.distorted_inputs(folder, FLAGS.batch_size, fraction)
        begin = time.monotonic()
        with tf.train.SingularMonitoredSession() as session:
            batches = [session.run(labels)]
            seconds = time.monotonic() - begin
            batches += [session.run(labels) for _ in range(NUM_BATCHES - 1)]
    num_classes = len(cifar10_input.class_names(folder))
    shares = [np.bincount(batch, minlength=num_classes) / batch.size for batch in batches]
    return seconds, np.array(shares)


def draw(shares, path):
    """A panel for each fraction: from left to right the batches, the height of a colour a class."""
    figure = Figure(figsize=(9, 6))
    panels = figure.subplots(len(shares), sharex=True)
    for panel, (fraction, share) in zip(panels, shares.items()):
        panel.stackplot(range(len(share)), share.T)
        panel.set(ylabel=fraction, ylim=(0, 1), xlim=(0, len(share) - 1), yticks=[])
    panels[0].set_title('Classes in the first batches, by min_fraction_of_examples_in_queue')
    panels[-1].set_xlabel('batch')
    figure.savefig(path, dpi=100, bbox_inches='tight')


def main():
    cifar10.maybe_download_and_extract()
    with tempfile.TemporaryDirectory() as folder:
        write_sorted(cifar10.data_folder(), folder)
        first_batches(folder, FRACTIONS[-1])  # A process's first session takes longer.
        shares = {}
        for fraction in FRACTIONS:
            seconds, _ = first_batches(cifar10.data_folder(), fraction)
            _, shares[fraction] = first_batches(folder, fraction)
            commonest = shares[fraction].max(axis=1).mean()
            print(
                f'{fraction}: first batch after {seconds:.2f} s; of files sorted by class, '
                f'the commonest makes {commonest:.0%}',
                flush=True,
            )
    draw(shares, FLAGS.picture)
    print(f'Saved {FLAGS.picture}.')


if __name__ == '__main__':
    script.run(main)
