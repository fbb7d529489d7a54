"""Turns pictures of your own into a data set: six files of records, and the names of the classes.

    python cifar10_convert.py SOURCE --data_dir=/data/mine
    python cifar10_train.py --data_dir=/data/mine --train_dir=/data/run

SOURCE is one of

    a folder of folders of pictures, one a class: SOURCE/train/CLASS/* and SOURCE/test/CLASS/*,
        or SOURCE/CLASS/*, of which a sixth of each class, always the same, is for the test
    CIFAR-100, binary version: cifar-100-binary.tar.gz, or the folder that is in it
    SVHN, cropped digits: a folder with train_32x32.mat and test_32x32.mat (needs SciPy)

Of each picture the largest central square is made as small as the images of the data set. The
examples are shuffled, always in the same way. What cannot be read is named and left out.
"""

import contextlib
import gzip
import io
import itertools
import os
import pathlib
import random
import shutil
import sys
import tarfile
import zlib

import cifar10
import cifar10_input
from support import pictures, script

from absl import app
import numpy as np
import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_bool('coarse', False, 'Of CIFAR-100, take the 20 superclasses.')
tf.flags.DEFINE_bool('keep_going', False, 'Leave out pictures that cannot be read, however many.')
tf.flags.declare_key_flag('data_dir')

SEED = 1
PICTURES_AT_A_TIME = 256


# --- Sources -----------------------------------------------------------------
#
# Each function returns the names of the classes and two lists, for training and for the test, of
# pairs (label, picture). A picture is a path, or a [height, width, 3] uint8 array.


def read_source(source):
    """Finds out what kind of source it is, and reads it."""
    if not os.path.isdir(source):
        kind, read = 'a folder or cifar-100-binary.tar.gz', cifar100
    elif os.path.exists(os.path.join(source, 'train.bin')):
        kind, read = 'CIFAR-100', cifar100
    elif os.path.exists(os.path.join(source, 'train_32x32.mat')):
        kind, read = 'SVHN', svhn
    else:
        return folders_of_pictures(source)
    try:
        return read(source)
    except (EOFError, KeyError, OSError, ValueError, tarfile.TarError, zlib.error) as error:
        reason = str(error).split('\n')[0]
        raise script.UserError(f'cannot read {source} as {kind}: {reason}')


def folders_of_pictures(source):
    train_folder = test_folder = source
    if {'train', 'test'} <= set(os.listdir(source)):
        train_folder, test_folder = os.path.join(source, 'train'), os.path.join(source, 'test')
    names = classes_in(train_folder)
    unknown = set(classes_in(test_folder)) - set(names)
    if unknown:
        raise script.UserError(f'{test_folder} has classes without any training: {unknown}')
    train, test = [], []
    for label, name in enumerate(names):
        found = pictures_in(os.path.join(train_folder, name))
        if test_folder != train_folder:
            for_test = pictures_in(os.path.join(test_folder, name))
        else:
            random.Random(SEED).shuffle(found)
            sixth = len(found) // 6
            for_test, found = found[:sixth], found[sixth:]
        if not found:
            raise script.UserError(f'no picture in {os.path.join(train_folder, name)}')
        train += [(label, path) for path in found]
        test += [(label, path) for path in for_test]
    return names, train, test


def classes_in(folder):
    return [path.name for path in visible(folder) if path.is_dir()]


def pictures_in(folder):
    return [str(path) for path in visible(folder)] if os.path.isdir(folder) else []


def visible(folder):
    return sorted(path for path in pathlib.Path(folder).iterdir() if path.name[0] != '.')


def cifar100(source):
    """Records of 3,074 bytes: coarse and fine label, then as in CIFAR-10.

    https://www.cs.toronto.edu/~kriz/cifar.html
    """

    if not os.path.isdir(source):
        # To its end, where the checksum is.
        contents = gzip.decompress(pathlib.Path(source).read_bytes())
        archive = tarfile.open(fileobj=io.BytesIO(contents))

    def read(name):
        if os.path.isdir(source):
            return pathlib.Path(source, name).read_bytes()
        return archive.extractfile('cifar-100-binary/' + name).read()

    def examples(name):
        records = np.frombuffer(read(name), np.uint8).reshape(-1, 2 + 3 * 32 * 32)
        labels = records[:, 0 if FLAGS.coarse else 1].tolist()
        return list(zip(labels, records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)))

    names = read('coarse_label_names.txt' if FLAGS.coarse else 'fine_label_names.txt')
    return names.decode().split(), examples('train.bin'), examples('test.bin')


def svhn(source):
    """Arrays X, [32, 32, 3, n], and y, [n, 1], in which 10 is the label of a zero.

    http://ufldl.stanford.edu/housenumbers
    """
    try:
        import scipy.io
    except ImportError:
        raise script.UserError('the files of SVHN need SciPy: pip install scipy')

    def examples(name):
        contents = scipy.io.loadmat(os.path.join(source, name))
        labels = (contents['y'][:, 0] % 10).tolist()
        return list(zip(labels, contents['X'].transpose(3, 0, 1, 2)))

    digits = [str(digit) for digit in range(10)]
    return digits, examples('train_32x32.mat'), examples('test_32x32.mat')


# --- Records -----------------------------------------------------------------


def records(examples):
    """Yields the record of each example, or None where the picture cannot be read."""
    labels = (label for label, _ in examples)
    in_lists = pictures.read(
        (picture for _, picture in examples), cifar10_input.RECORD_SIZE, PICTURES_AT_A_TIME
    )
    for label, (picture, image, problem) in zip(labels, itertools.chain.from_iterable(in_lists)):
        if problem:
            print(f'\n{picture}: {problem}', file=sys.stderr)
            yield None
        else:
            yield bytes([label]) + image.transpose(2, 0, 1).tobytes()


def write_data_set(source, folder):
    """Makes a data set of the source in a folder that exists. Returns a line that tells of it.

    Raises:
      script.UserError: there are too few examples, too few or too many classes, or too many
        pictures that cannot be read.
    """
    names, train, test = read_source(source)
    if not 2 <= len(names) <= 256:
        raise script.UserError(f'{source} has {len(names)} classes; 2 to 256 are possible')
    for name in names:
        if name != name.strip() or not name.isprintable():
            raise script.UserError(f'{name!r} cannot be the name of a class: rename its folder')
    total = len(train) + len(test)
    progress = tf.keras.utils.Progbar(total, interval=0.5 if sys.stdout.isatty() else 30)
    counts = {}
    unreadable = 0
    for eval_data, examples in (False, train), (True, test):
        random.Random(SEED).shuffle(examples)  # Files sorted by class make batches of one class.
        paths = cifar10_input.data_files(eval_data, folder)
        written = 0
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, 'wb')) for path in paths]
            for record in records(examples):
                progress.add(1)
                if record is None:
                    unreadable += 1
                    if unreadable > total / 100 and not FLAGS.keep_going:
                        raise script.UserError(
                            f'{unreadable} of {total} pictures cannot be read, more than one in a '
                            'hundred. With --keep_going they are left out.'
                        )
                else:
                    files[written % len(files)].write(record)
                    written += 1
        part = 'test' if eval_data else 'training'
        if written < len(paths):
            raise script.UserError(f'{written} pictures for {part} do not fill {len(paths)} files')
        counts[part] = written
    cifar10_input.write_class_names(folder, names)
    return (
        f'{counts["training"]} pictures for training, {counts["test"]} for the test, {len(names)} '
        f'classes; {unreadable} could not be read'
    )


def main(arguments):
    if len(arguments) != 1:
        raise app.UsageError('name one source')
    if FLAGS['data_dir'].using_default_value:
        raise app.UsageError('say with --data_dir where the data set shall go')
    folder = cifar10.data_folder()
    if os.path.exists(folder) and os.listdir(folder):
        raise script.UserError(f'{folder} holds something already; nothing was changed')
    os.makedirs(FLAGS.data_dir, exist_ok=True)
    with script.locked(FLAGS.data_dir, f'another process is at work in {FLAGS.data_dir}'):
        unfinished = os.path.join(FLAGS.data_dir, '.convert')
        shutil.rmtree(unfinished, ignore_errors=True)  # Of a process that was killed.
        os.mkdir(unfinished)
        try:
            summary = write_data_set(arguments[0], unfinished)
            os.rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    print(f'Saved {folder}: {summary}.')


if __name__ == '__main__':
    script.run(main, takes_arguments=True)
