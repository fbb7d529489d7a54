"""Tests of cifar10_convert.py and support/sources.py."""

import collections
import gzip
import io
import os
import pickle
import shutil
import signal
import struct
import sys

from absl import app
import numpy as np
from PIL import Image
import pytest

import cifar10_convert
from support import script, sources
from tests import harness, reference
from tests.test_dataset import packed

DataSet = collections.namedtuple('DataSet', 'names training test')  # Lists of (label, planes).


def assert_pictures(records, names, written):
    """The records are these pictures, each once, with the label of its folder."""
    assert sorted(planes for _, planes in records) == sorted(written)
    assert all(names[label] == written[planes].split('/')[-2] for label, planes in records)


class Converter:
    """Writes `source` and converts it to a data set in `data_dir`, in this process."""

    def __init__(self, tmp_path):
        self.source, self.data_dir = tmp_path / 'source', tmp_path / 'data'

    def write(self, contents):
        """Writes an archive from bytes, or a folder from a dict.

        The dict holds the bytes of a file, or the number of random pictures in a folder. Returns a
        dict of planes, as in a record, -> path of the picture.
        """
        if isinstance(contents, bytes):
            return self.source.write_bytes(contents)
        written = {}
        for name, each in contents.items():
            path = self.source / name
            is_file = isinstance(each, bytes)
            (path.parent if is_file else path).mkdir(parents=True, exist_ok=True)
            if is_file:
                path.write_bytes(each)
            for i in range(0 if is_file else each):
                image = reference.random_images(1, seed=len(written))[0]
                Image.fromarray(image).save(str(path / f'{i}.png'))
                written[image.transpose(2, 0, 1).tobytes()] = f'{name}/{i}.png'
        return written

    def __call__(self, **values):
        """Converts. Returns the DataSet."""
        harness.set_flags(data_dir=str(self.data_dir), **values)
        cifar10_convert.main(['', str(self.source)])
        return self.read()

    def reject(self, part, **values):
        """Expects an error with this part, and nothing written."""
        with pytest.raises(script.UserError) as error:
            self(**values)
        assert part in str(error.value) and '\n' not in str(error.value)
        assert os.listdir(str(self.data_dir)) == ['.lock']

    def read(self):
        """The data set, which has to be the only thing in data_dir."""
        folder = self.data_dir / reference.DATA_FOLDER
        assert sorted(os.listdir(str(self.data_dir))) == ['.lock', reference.DATA_FOLDER]
        assert len(os.listdir(str(folder))) == 7
        names = (folder / 'batches.meta.txt').read_text(encoding='utf-8').splitlines()
        parts = [(folder / name).read_bytes() for name in reference.DATA_FILES]
        for labels in [list(part[::3073]) for part in parts]:
            assert len(set(labels)) == 1 or labels != sorted(labels), 'sorted by class'
        parts = [[(p[i], p[i + 1 : i + 3073]) for i in range(0, len(p), 3073)] for p in parts]
        return DataSet(names, sum(parts[:-1], []), parts[-1])


@pytest.fixture
def convert(tmp_path):
    return Converter(tmp_path)


def test_folders_for_training_and_test_become_records(convert, capsys):
    contents = {'Train/tree': 31, 'Train/a dog': 40, 'Train/Ähre': 22, 'Train/Dog': 28}
    contents.update({'VAL/a dog': 5, 'VAL/Ähre': 9, 'VAL/tree': 1})
    for path in 'README.txt', '__MACOSX/one/._0.png', 'Train/tree/.DS_Store', 'VAL/tree/Thumbs.db':
        contents[path] = b'not used'
    written = convert.write(contents)
    found = convert()
    assert found.names == ['Dog', 'a dog', 'tree', 'Ähre']
    for records, half in (found.training, 'Train'), (found.test, 'VAL'):
        expected = {planes: path for planes, path in written.items() if path.startswith(half)}
        assert_pictures(records, found.names, expected)
    output = capsys.readouterr()
    assert '121 pictures' in output.out and '15 for' in output.out and output.err == ''


def test_sixth_of_each_class_is_always_the_same_test_set(convert):
    written = convert.write({'cat': 13, 'ant': 17, 'bee': 5, 'owl': 6})
    found = convert()
    assert found.names == ['ant', 'bee', 'cat', 'owl']
    assert_pictures(found.training + found.test, found.names, written)
    expected = ['ant/13.png', 'ant/3.png', 'cat/5.png', 'cat/9.png', 'owl/2.png']
    assert sorted(written[planes] for _, planes in found.test) == expected


def test_unreadable_pictures_are_named_and_skipped(convert, capsys, monkeypatch):
    monkeypatch.setattr(script, 'PROGRESS_SECS', 0.01)
    written = convert.write({'train/a': 40, 'train/b': 40, 'test/a': 10, 'test/b': 10})

    def expect_all_but(missing, **values):
        found = convert(**values)
        expected = {planes: path for planes, path in written.items() if path not in missing}
        assert_pictures(found.training + found.test, ['a', 'b'], expected)
        shutil.rmtree(str(convert.data_dir))

    first, second = [convert.source / path for path in ('train/b/7.png', 'test/a/3.png')]
    harness.cut_in_half(first)
    expect_all_but(['train/b/7.png'])
    output = capsys.readouterr()
    assert output.err.startswith(f'{first}: ') and output.err.count('\n') == 1
    assert '1 unreadable' in output.out and ' of 100 pictures after ' in output.out
    second.write_text('no picture')
    convert.reject('2 of 100 pictures')
    named = [line.split(': ')[0] for line in capsys.readouterr().err.splitlines()]
    assert named == [str(first), str(second)]
    expect_all_but(['train/b/7.png', 'test/a/3.png'], keep_going=True)
    for path in (convert.source / 'train/b').iterdir():
        path.write_text('no picture')
    convert.reject('class b', keep_going=True)


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 writes its strings."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack('<i', len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def python2_pickle(**value):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump({key.encode(): each for key, each in value.items()})
    return file.getvalue()


NAMES = {'fine': [f'f_{100 - i}' for i in range(100)], 'coarse': [f'c_{i}' for i in range(20)]}
LABELS = {'fine': np.arange(130) * 7 % 100, 'coarse': np.arange(130) * 7 % 100 // 5}
PLANES = reference.random_images(130, seed=6).transpose(0, 3, 1, 2).reshape(130, -1)


def published(kind):
    """Dict of file name -> contents with 130 images, 100 of them for training."""
    if kind == 'binary':
        records = np.column_stack([LABELS['coarse'], LABELS['fine'], PLANES]).astype(np.uint8)
        files = {f'{each}_label_names.txt': '\n'.join(NAMES[each]).encode() for each in NAMES}
        return dict(files, **{'train.bin': bytes(records[:100]), 'test.bin': bytes(records[100:])})
    levels = [('coarse', '')] if kind == 'CIFAR-10' else [('fine', 'fine_'), ('coarse', 'coarse_')]
    names = {f'{prefix}label_names': [n.encode() for n in NAMES[level]] for level, prefix in levels}

    def part(first, last):
        labels = {f'{prefix}labels': LABELS[level][first:last].tolist() for level, prefix in levels}
        return python2_pickle(data=PLANES[first:last], **labels)

    if kind == 'python':
        return {'meta': python2_pickle(**names), 'train': part(0, 100), 'test': part(100, 130)}
    files = {f'data_batch_{i + 1}': part(20 * i, 20 * i + 20) for i in range(5)}
    return dict(files, **{'test_batch': part(100, 130), 'batches.meta': python2_pickle(**names)})


def svhn(**changes):
    """SVHN's files; the changes are in the arrays of both."""
    scipy_io, files = pytest.importorskip('scipy.io'), {}
    for name, part in ('train_32x32.mat', slice(25)), ('test_32x32.mat', slice(25, 38)):
        images = PLANES[part].reshape(-1, 3, 32, 32).transpose(2, 3, 1, 0)
        labels = (LABELS['fine'][part, np.newaxis] - 1) % 10 + 1
        file = io.BytesIO()
        scipy_io.savemat(file, dict({'X': images, 'y': labels}, **changes), do_compression=True)
        files[name] = file.getvalue()
    return files


@pytest.mark.parametrize(
    'kind, level, is_archive',
    [('binary', 'fine', True), ('binary', 'coarse', False), ('python', 'fine', False)]
    + [('python', 'coarse', True), ('CIFAR-10', 'coarse', False)],
)
def test_cifar_keeps_images_labels_and_names(convert, kind, level, is_archive):
    files = published(kind)
    convert.write(packed({f'cifar/{name}': files[name] for name in files}) if is_archive else files)
    found = convert(coarse=level == 'coarse' and kind != 'CIFAR-10')
    expected = list(zip(LABELS[level], map(bytes, PLANES)))
    assert sorted(found.training) == sorted(expected[:100])
    assert sorted(found.test) == sorted(expected[100:])
    assert found.names == NAMES[level]


def test_svhn_keeps_images_and_label_10_is_a_zero(convert):
    convert.write(svhn())
    found = convert()
    assert found.names == list('0123456789')
    expected = list(zip(LABELS['fine'] % 10, map(bytes, PLANES)))
    assert sorted(found.training) == sorted(expected[:25])
    assert sorted(found.test) == sorted(expected[25:38])


def test_kaggle_uses_the_labelled_pictures(convert):
    csv = 'id,label\n' + ''.join(f'{i},{"dog" if i % 2 else "cat"}\n' for i in range(24))
    written = convert.write({'train': 24, 'test': 3, 'trainLabels.csv': csv.encode()})
    found = convert()
    assert (found.names, len(found.training), len(found.test)) == (['cat', 'dog'], 20, 4)
    paths = {written[planes]: label for label, planes in found.training + found.test}
    assert paths == {f'train/{i}.png': i % 2 for i in range(24)}


CIFAR_10, CIFAR_100 = published('CIFAR-10'), published('binary')


@pytest.mark.parametrize(
    'contents, part',
    [
        ({'': 5}, '0 classes'),
        ({f'{half}/{i}': 1 for half in ('train', 'test') for i in range(257)}, '257 classes'),
        ({'train/a': 6, 'train/b': 6}, '/train/a is a folder in'),
        ({'train/a': 6, 'val/a': 6, 'test/a': 6}, 'test, train, val'),
        ({'train/a': 6, 'train/b': 6, 'test/c': 6}, 'picture of class c'),
        ({'train/a': 6, 'train/b': 6, 'test': 0}, '0 readable test'),
        ({'a': 6, 'b': 6, '': 1}, '/0.png is not in the folder of a class'),
        ({'a': 6, 'b\x1b[31m': 6}, "'b\\x1b[31m'"),
        ({'a': 6, 'b ': 6}, "'b '"),
        ({'a': 6, 'gr\udcfc\udcdf': 6}, 'gr\ufffd'),
        (dict(CIFAR_100, **{'fine_label_names.txt': b'a b'}), 'label 99, but only 2'),
        (dict(CIFAR_100, **{'test.bin': bytes(3075)}), 'cannot read'),
        (dict(CIFAR_10, test_batch=python2_pickle(labels=[1], data=PLANES[:3])), '1 labels for 3'),
        (dict(CIFAR_10, test_batch=python2_pickle(labels=[], data=sys.exit)), 'exit, which is not'),
        ({'data_batch_1.bin': b''}, 'needs no conversion'),
        ({'cifar-10-batches-py/meta': b''}, 'cifar-10-batches-py is. Name that'),
        (packed({'something': b'else'}), 'neither CIFAR-10 nor'),
        (b'text', '.tar.gz'),
        (packed(CIFAR_100)[:-4], 'cannot read'),
        (gzip.compress(bytes(2**24)), 'more than 4194304'),
        (bytes(2**22 + 1), 'limit of 4194304'),
        (lambda: svhn(y=np.zeros([25, 1], np.uint8)), '1 to 10'),
        (lambda: svhn(X=np.zeros([32, 32, 3, 25])), 'float64'),
        (lambda: svhn(X=np.zeros([32, 32, 1, 25], np.uint8)), '[25, 32, 32, 1]'),
        (lambda: dict(svhn(), **{'test_32x32.mat': b'MATLAB 7.3 MAT'.ljust(512)}), '-v7'),
        (lambda: dict(svhn(), **{'test_32x32.mat': b'damaged'}), 'test_32x32.mat: '),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_unusable_source_is_rejected(convert, monkeypatch, contents, part):
    monkeypatch.setattr(sources, 'MAX_BYTES', 2**22)
    convert.write(contents() if callable(contents) else contents)
    convert.reject(part)


def test_meaningless_arguments_are_rejected(convert):
    convert.write(CIFAR_10)
    convert.reject('--coarse', coarse=True)
    for data_dir in convert.source, convert.source / 'below':
        harness.set_flags(data_dir=str(data_dir))
        with pytest.raises(script.UserError, match=f'--data_dir={data_dir} is in'):
            cifar10_convert.main(['', str(convert.source)])
    cifar10_convert.FLAGS['data_dir'].unparse()
    with pytest.raises(app.UsageError, match='--data_dir='):
        cifar10_convert.main(['', str(convert.source)])


def test_existing_data_set_is_left_alone(convert):
    convert.write({'a': 6, 'b': 6})
    target = convert.data_dir / reference.DATA_FOLDER
    target.mkdir(parents=True)
    assert convert().names == ['a', 'b']  # An empty folder is replaced.
    before = harness.contents(convert.data_dir)
    with pytest.raises(script.UserError, match=str(target)):
        convert()
    assert harness.contents(convert.data_dir) == before


def test_full_disk_leaves_nothing(convert, file_size_limit):
    convert.write({'a': 6, 'b': 6})
    file_size_limit(5000)
    convert.reject(f'--data_dir={convert.data_dir}: File too large')


def test_conversion_is_complete_after_a_kill_and_in_any_locale(start, convert, tmp_path):
    written = convert.write({'кот': 6, 'dog': 6})
    flags = convert.source, f'--data_dir={convert.data_dir}'
    die = 'import os, signal; os.rename = lambda *args: os.kill(os.getpid(), signal.SIGKILL)'
    assert start('cifar10_convert.py', *flags, before=die).wait() == -signal.SIGKILL
    assert sorted(os.listdir(str(convert.data_dir))) == ['.convert', '.lock']
    with script.locked(str(convert.data_dir), ''), pytest.raises(script.UserError, match='another'):
        convert()
    log, env = str(tmp_path / 'log'), harness.ascii_only()
    ended = harness.start_script(log, 'cifar10_convert.py', flags, env)
    assert ended.wait() == 0, ended.stderr
    found = convert.read()
    assert found.names == ['dog', 'кот']
    assert_pictures(found.training + found.test, found.names, written)
