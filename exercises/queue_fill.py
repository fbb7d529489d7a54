"""Exercise: fewer images in the queue before training starts.

    "When experimenting, it is sometimes annoying that the first training step can take so long. Try
    decreasing the number of images that initially fill up the queue. Search for
    `min_fraction_of_examples_in_queue` in `cifar10_input.py`."

Why is the fraction so high? A batch can only mix images that are in the queue at the same time.
With CIFAR-10 you notice nothing, because its files are shuffled. But many data sets are sorted,
because somebody wrote one folder of pictures after the other. The check makes up such a data set:
five files, two classes in each. Fill the queue with at most 500 images, and shuffle the records of
all files. Then run `python -m exercises.queue_fill`.

Hints:
1. distorted_inputs() in cifar10_input.py takes the fraction as an argument; num_examples() counts.
2. Afterwards, each file should hold records of every class.
3. A record is one row: the label and the pixels of its image.
"""

import contextlib
import tempfile
import time

import numpy as np

import cifar10_input
from exercises import checking
from support.compat import tf


def distorted_inputs(data_dir, batch_size):
    """As cifar10_input.distorted_inputs(), but the first batch waits for 500 images at most."""
    raise checking.NotStartedError  # YOUR CODE HERE


def shuffle(files):
    """Shuffles the records of a data set, once, before training.

    Args:
      files: list of five arrays [n, 3073] uint8, one for each file; a row is a record.

    Returns:
      Another such list, with the same records.
    """
    raise checking.NotStartedError  # YOUR CODE HERE


# --- The check -----------------------------------------------------------------

RECORDS_PER_FILE = 10000  # As in CIFAR-10.


def sorted_files():
    """A made-up data set. The first pixels are the number of the record."""
    records = np.zeros([5 * RECORDS_PER_FILE, cifar10_input.RECORD_BYTES], np.uint8)
    numbers = np.arange(len(records))
    records[:, 0] = 10 * numbers // len(records)
    records[:, 1:5] = numbers.astype('>u4').view(np.uint8).reshape(-1, 4)
    return np.split(records, 5)


def measure(inputs, files):
    """Reads 50 batches of 128 from these files.

    Returns:
      The number of images that the first batch waits for, the seconds until then, and the mean
      fraction of the most common class in a batch.
    """
    with tempfile.TemporaryDirectory() as folder, tf.Graph().as_default() as graph:
        for path, records in zip(cifar10_input.data_files(False, folder), files):
            records.tofile(path)
        with contextlib.redirect_stdout(None):
            images, labels = inputs(folder, 128)
        queues = [op for op in graph.get_operations() if op.type == 'RandomShuffleQueueV2']
        waits_for = sum(op.get_attr('min_after_dequeue') for op in queues)
        begin = time.monotonic()
        with tf.train.SingularMonitoredSession() as session:
            batches = [session.run([images, labels])[1]]
            seconds = time.monotonic() - begin
            batches += [session.run([images, labels])[1] for _ in range(49)]
    return waits_for, seconds, np.mean([np.bincount(batch).max() / 128 for batch in batches])


def check_records(files):
    """Are these the records of sorted_files(), in any order?"""
    shapes = [records.shape[1:] for records in files]
    checking.expect(shapes == 5 * [(3073,)], 'shuffle() should return five arrays [n, 3073].')
    records = np.concatenate(files)
    numbers = np.ascontiguousarray(records[:, 1:5]).view('>u4').ravel()
    checking.expect(
        np.array_equal(np.sort(numbers), np.arange(5 * RECORDS_PER_FILE)),
        'after shuffle(), records are missing or doubled, or their pixels are exchanged.',
    )
    checking.expect(
        np.array_equal(records[:, 0], 10 * numbers // len(numbers)),
        'shuffle() separates the labels from their images. Move whole rows.',
    )


def check(answer):
    files = sorted_files()
    yours = measure(answer.distorted_inputs, files)
    line = '{}: first batch after {} images, {:.2f} s; most common class: {:.0%} of a batch'
    tutorial = measure(cifar10_input.distorted_inputs, files)
    print(line.format("sorted files, the tutorial's input", *tutorial))
    print(line.format('sorted files, your input', *yours))
    checking.expect(
        yours[0] <= 500, 'the queue holds too many images. 0.4 is the default of an argument.'
    )
    shuffled = answer.shuffle([file.copy() for file in files])
    check_records(shuffled)
    *_, fraction = yours = measure(answer.distorted_inputs, shuffled)
    print(line.format('your files, your input', *yours))
    checking.expect(
        fraction < 0.2 or max(len(np.unique(file[:, 0])) for file in shuffled) > 2,
        'the files are still sorted: each holds two classes, and so do most batches. The first one '
        'comes early, but the network learns two classes at a time.',
    )
    checking.expect(fraction < 0.2, 'each file holds many classes, but one after the other.')
    return (
        'a batch of 128 whose most common class makes 14 or 15 % is well mixed. A large queue is '
        'insurance against sorted files. Files that are shuffled once need no large queue.'
    )


if __name__ == '__main__':
    checking.run(check)
