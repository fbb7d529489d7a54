"""Readers of published data sets: CIFAR-10 and CIFAR-100 in several formats, and SVHN.

A reader returns the class names and two lists, for training and test, of pairs (label, picture). A
picture is a path, or a [height, width, 3] uint8 array.
"""

import csv
import glob
import gzip
import io
import os
import pickle
import random
import tarfile

import numpy as np

from support import pictures, script

# A file in each data set that read() recognizes.
DATA_SET_FILES = 'train.bin', 'meta', 'batches.meta', 'train_32x32.mat', 'trainLabels.csv'
# Unpacked, SVHN's training set has 225 MB and a CIFAR archive 190 MB. A small file can hold more.
MAX_BYTES = 256 << 20


def read(source, coarse=False):
    """Recognizes a data set by the names of its files, and reads it.

    Args:
      source: a folder or .tar.gz archive.
      coarse: use the superclasses of CIFAR-100.

    Returns:
      As described above, or None for a folder of something else.

    Raises:
      Exception: it cannot be read. Damaged files raise errors of many types.
    """
    names, contents = open_source(source)
    level = 'coarse' if coarse else 'fine'
    if 'train.bin' in names:
        return cifar100_binary(contents, level)
    if {'meta', 'train', 'test'} <= names:
        return cifar_python(contents, 'meta', ['train', 'test'], level + '_')
    if coarse:
        raise script.UserError(f'--coarse is for CIFAR-100, which {source} is not')
    if 'batches.meta' in names:
        files = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
        return cifar_python(contents, 'batches.meta', files)
    if 'data_batch_1.bin' in names:
        raise script.UserError(f'{source} needs no conversion. See "Sources" in docs/data.md.')
    if 'train_32x32.mat' in names:
        return svhn(contents)
    if 'trainLabels.csv' in names:
        return kaggle(contents, source)
    if not os.path.isdir(source):
        raise script.UserError(f'{source} holds neither CIFAR-10 nor CIFAR-100')
    for path in sorted(glob.glob(os.path.join(glob.escape(source), '*', '*'))):
        folder, name = os.path.split(path)
        if name in DATA_SET_FILES and os.path.isfile(path):
            raise script.UserError(f'{source} is not a data set, but {folder} is. Name that.')
    return None


def open_source(source):
    """The names of the files in a folder or archive, and a function that reads one of them."""
    if os.path.isdir(source):

        def read_file(name):
            with pictures.open_regular(os.path.join(source, name), MAX_BYTES) as file:
                return file.read()

        return {
            name for name in os.listdir(source) if os.path.isfile(f'{source}/{name}')
        }, read_file
    with pictures.open_regular(source, MAX_BYTES) as file:
        if file.read(2) != b'\x1f\x8b':
            raise ValueError('neither a folder nor a .tar.gz archive; unpack other archives')
        file.seek(0)
        contents = gzip.GzipFile(fileobj=file).read(MAX_BYTES + 1)
    if len(contents) > MAX_BYTES:
        raise ValueError(f'unpacked, it has more than {MAX_BYTES} bytes')
    archive = tarfile.open(fileobj=io.BytesIO(contents))
    members = {os.path.basename(member.name): member for member in archive if member.isfile()}
    return set(members), lambda name: archive.extractfile(members[name]).read(MAX_BYTES)


def pairs(labels, images):
    """[n] labels and [n, height, width, 3] uint8 images -> list of pairs."""
    if len(labels) != len(images):
        raise ValueError(f'{len(labels)} labels for {len(images)} images')
    if images.dtype != np.uint8 or images.shape[3:] != (3,):
        raise ValueError(f'images of type {images.dtype} and shape {list(images.shape)}')
    return list(zip(map(int, labels), images))


def from_planes(planes):
    """[n, 3 * 32 * 32] -> [n, 32, 32, 3]."""
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def cifar100_binary(contents, level):
    """Reads records of 3,074 bytes: coarse and fine label, then the planes as in CIFAR-10."""

    def part(name):
        records = np.frombuffer(contents(name), np.uint8).reshape(-1, 2 + 3 * 32 * 32)
        labels = records[:, 0 if level == 'coarse' else 1]
        return pairs(labels, from_planes(records[:, 2:]))

    names = contents(level + '_label_names.txt').decode().split()
    return names, part('train.bin'), part('test.bin')


class _Array:
    """Replaces everything that the pickle of a uint8 array refers to."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        if isinstance(state[-1], bytes):  # An array. The state of its type ends with an integer.
            _, shape, _, is_fortran_order, values = state
            order = 'F' if is_fortran_order else 'C'
            self.values = np.frombuffer(values, np.uint8).reshape(shape, order=order)


class _Unpickler(pickle.Unpickler):
    """Loads built-in types and uint8 arrays only, since a pickle can call any function."""

    def find_class(self, module, name):
        if module.split('.')[0] == 'numpy' and name in ('_reconstruct', 'ndarray', 'dtype'):
            return _Array
        raise ValueError(f'it refers to {module}.{name}, which is not loaded')


def cifar_python(contents, names_file, files, level=''):
    """Reads dicts with labels and planes, pickled by Python 2. The last file is the test set."""

    def load(name, *keys):
        loaded = _Unpickler(io.BytesIO(contents(name)), encoding='bytes').load()
        return [loaded[key.encode()] for key in keys]

    (names,) = load(names_file, level + 'label_names')
    parts = []
    for file in files:
        labels, array = load(file, level + 'labels', 'data')
        parts.append(pairs(labels, from_planes(array.values)))
    return [name.decode() for name in names], sum(parts[:-1], []), parts[-1]


def svhn(contents):
    """Reads arrays X, [32, 32, 3, n], and y, [n, 1], in which 10 is the label of a zero."""
    try:
        import scipy.io
    except ImportError:
        raise script.UserError('the files of SVHN need SciPy: pip install scipy')

    def part(name):
        data = contents(name)
        if data.startswith(b'MATLAB 7.3'):
            raise ValueError(f'{name} is in MATLAB 7.3 format. Save it in MATLAB with -v7.')
        try:
            arrays = scipy.io.loadmat(io.BytesIO(data))
        except Exception as error:
            raise ValueError(f'{name}: {script.reason(error)}')
        labels = arrays['y'].ravel()
        if not np.isin(labels, range(1, 11)).all():
            raise ValueError(f'{name} has other labels than 1 to 10')
        return pairs(labels % 10, arrays['X'].transpose(3, 0, 1, 2))

    return [str(digit) for digit in range(10)], part('train_32x32.mat'), part('test_32x32.mat')


def kaggle(contents, source):
    """Reads a table of id and label; picture 1 is train/1.png."""
    print(script.printable(f'Using {source}/train only: Kaggle has no labels for the test set.'))
    classes = {}
    for row in csv.DictReader(io.StringIO(contents('trainLabels.csv').decode('utf-8-sig'))):
        path = os.path.join(source, 'train', row['id'] + '.png')
        classes.setdefault(row['label'], []).append(path)
    names = sorted(classes)
    training, test = split([classes[name] for name in names])
    return names, training, test


def split(paths_of_classes):
    """Puts a sixth of each class, always the same, into the test set.

    Args:
      paths_of_classes: a list of paths for each class.

    Returns:
      Two lists of pairs (label, path), for training and test.
    """
    training, test = [], []
    for label, paths in enumerate(paths_of_classes):
        examples = [(label, path) for path in paths]
        random.Random(1).shuffle(examples)
        sixth = len(examples) // 6
        test += examples[:sixth]
        training += examples[sixth:]
    return training, test
