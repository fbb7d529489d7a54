"""Tests of cifar10_convert.py and support/sources.py."""

import collections
import gzip
import io
import os
import pickle
import shutil
import struct
import sys
import tarfile

from absl import app
import numpy as np
from PIL import Image
import pytest

import cifar10_convert
from support import pictures, script, sources
from tests import harness, reference

CONVERT = 'cifar10_convert.py'
LAYOUT = 'SOURCE/train/CLASS/PICTURE'

DataSet = collections.namedtuple('DataSet', 'names training test')  # Lists of (label, planes).


def write_pictures(folder, counts):
    """Writes random 32x32 pictures, that many for each class folder in `counts`.

    Returns:
      Dict of planes, as in a record, -> path below the folder.
    """
    written = {}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = reference.random_images(1, seed=len(written))[0]
            Image.fromarray(image).save(str(folder / name / f'{i}.png'))
            written[image.transpose(2, 0, 1).tobytes()] = f'{name}/{i}.png'
    return written


def read_data_set(data_dir):
    """The data set, which has to be the only thing in data_dir."""
    folder = data_dir / reference.DATA_FOLDER
    assert sorted(os.listdir(str(data_dir))) == ['.lock', reference.DATA_FOLDER]
    assert sorted(os.listdir(str(folder))) == sorted(['batches.meta.txt', *reference.DATA_FILES])
    names = (folder / 'batches.meta.txt').read_text(encoding='utf-8').splitlines()
    parts = [(folder / name).read_bytes() for name in reference.DATA_FILES]
    parts = [[(p[i], p[i + 1 : i + 3073]) for i in range(0, len(p), 3073)] for p in parts]
    for part in parts:
        labels = [label for label, _ in part]
        assert len(set(labels)) == 1 or labels != sorted(labels), 'sorted by class'
    return DataSet(names, sum(parts[:-1], []), parts[-1])


def assert_records(records, names, written, paths):
    """The records are these pictures, each once, with the label of its folder."""
    assert sorted(written[planes] for _, planes in records) == sorted(paths)
    assert all(names[label] == written[planes].split('/')[-2] for label, planes in records)


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(str(path))


def replace_by_device(path):
    path.unlink()
    path.symlink_to('/dev/zero')


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / 'data'


@pytest.fixture
def convert(data_dir):
    """Function that converts a source in this process and returns the DataSet."""

    def run(source, **values):
        harness.set_flags(**dict(values, data_dir=str(data_dir)))
        cifar10_convert.main([CONVERT, str(source)])
        return read_data_set(data_dir)

    return run


@pytest.fixture
def reject(convert, data_dir):
    """Function that expects an error with these parts, and nothing written."""

    def run(source, *parts, **values):
        with pytest.raises(script.UserError) as error:
            convert(source, **values)
        message = str(error.value)
        assert [part for part in parts if part not in message] == [] and '\n' not in message, (
            message
        )
        assert os.listdir(str(data_dir)) == ['.lock']

    return run


# --- Folders of pictures ---------------------------------------------------------


@pytest.mark.parametrize('train, test', [('train', 'test'), ('Train', 'TESTING'), ('train', 'val')])
def test_folders_for_training_and_test_become_records(convert, tmp_path, capsys, train, test):
    names = ['Dog', 'a dog', 'tree', 'Ähre']
    counts = [('tree', 31), ('a dog', 40), ('Ähre', 22), ('Dog', 28)]
    training = {f'{train}/{name}': count for name, count in counts}
    testing = {f'{test}/a dog': 5, f'{test}/Ähre': 9, f'{test}/tree': 1}
    written = write_pictures(tmp_path / 'source', dict(training, **testing))
    found = convert(tmp_path / 'source')
    assert found.names == names
    for records, half in (found.training, train), (found.test, test):
        paths = [path for path in written.values() if path.startswith(half + '/')]
        assert_records(records, names, written, paths)
    output = capsys.readouterr().out
    assert all(number in output for number in ('121 pictures', '15 for', '4 classes', '0 unread'))


def test_sixth_of_each_class_is_always_the_same_test_set(convert, data_dir, tmp_path):
    counts = collections.OrderedDict([('cat', 36), ('ant', 17), ('bee', 5), ('owl', 6)])
    written = write_pictures(tmp_path / 'first', counts)
    found = convert(tmp_path / 'first')
    names = ['ant', 'bee', 'cat', 'owl']
    assert found.names == names
    assert collections.Counter(names[label] for label, _ in found.test) == dict(cat=6, ant=2, owl=1)
    assert_records(found.training + found.test, names, written, written.values())
    cats = {written[planes] for label, planes in found.test if names[label] == 'cat'}
    in_order = [f'cat/{i}.png' for i in range(36)]
    assert all(cats != set(some) for some in (in_order[:6], in_order[-6:], in_order[::6]))

    for path in reversed(list(written.values())):  # Another order in the folder.
        target = tmp_path / 'second' / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(tmp_path / 'first' / path), str(target))
    shutil.rmtree(str(data_dir))
    assert convert(tmp_path / 'second') == found


def test_system_files_are_neither_classes_nor_pictures(convert, tmp_path, capsys):
    source = tmp_path / 'source'
    written = write_pictures(source, {'one': 12, 'two': 12})
    for path in '__MACOSX/one/._0.png', '.git/HEAD', 'one/.DS_Store', 'two/Thumbs.db', '@eaDir/x':
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(b'\0\1')
    (source / 'README.txt').write_text('Where the pictures are from.')
    found = convert(source)
    assert found.names == ['one', 'two']
    assert_records(found.training + found.test, found.names, written, written.values())
    output = capsys.readouterr()
    assert output.err == '' and f'{source}/README.txt' in output.out


@pytest.mark.parametrize(
    'counts, parts',
    [
        ({'': 5}, ['0 classes', LAYOUT]),
        ({'.hidden': 5}, ['0 classes', LAYOUT]),
        ({'one': 6}, ['1 classes', LAYOUT]),
        ({'train': 0, 'train/a': 6, 'train/b': 6}, ['/train/a ', LAYOUT]),
        ({'a': 6, 'b/2019': 6, 'b/2020': 6}, ['/b/2019 ', LAYOUT]),
        ({'train/a': 6, 'train/b/x': 6, 'test/a': 6}, ['/train/b/x ', LAYOUT]),
        ({'train/a': 6, 'train/b': 6, 'val/a': 6, 'test/a': 6}, ['test, train, val']),
        ({'train/a': 6, 'train/b': 6, 'TRAIN/a': 6, 'test/a': 6}, ['TRAIN, test, train']),
        ({'train/a': 6, 'train/b': 6, 'test/c': 6}, ['class c']),
        ({'a': 6, 'b': 6, 'empty': 0}, ['class empty']),
        ({'train/a': 6, 'train/b': 6, 'test': 0}, ['0 readable test', 'at least 1']),
        ({'a': 1, 'b': 1}, ['2 readable training', 'at least 5']),
        ({'a': 6, 'b\x1b[31m': 6}, ["'b\\x1b[31m'"]),
        ({'a': 6, 'b ': 6}, ["'b '"]),
        ({'a': 6, 'gr\udcfc\udcdf': 6}, ['gr', 'Rename']),
        ({f'{half}/{i}': 1 for half in ('train', 'test') for i in range(257)}, ['257']),
    ],
)
def test_unusable_folders_are_rejected(reject, tmp_path, counts, parts):
    write_pictures(tmp_path / 'source', counts)
    reject(tmp_path / 'source', *parts)


def test_class_names_do_not_depend_on_the_locale(tmp_path, data_dir):
    write_pictures(tmp_path / 'source', {'кот': 6, 'dog': 6})
    flags = [tmp_path / 'source', f'--data_dir={data_dir}']
    converter = harness.start_script(str(tmp_path / 'log'), CONVERT, flags, harness.ascii_only())
    assert converter.wait() == 0, converter.stderr
    assert read_data_set(data_dir).names == ['dog', 'кот']


# --- Unreadable pictures ---------------------------------------------------------


@pytest.fixture
def hundred(tmp_path):
    """A source with 80 pictures for training and 20 for the test, and its dict from planes."""
    counts = {'train/a': 40, 'train/b': 40, 'test/a': 10, 'test/b': 10}
    return tmp_path / 'source', write_pictures(tmp_path / 'source', counts)


def assert_all_but(found, written, missing):
    paths = [path for path in written.values() if path not in missing]
    assert_records(found.training + found.test, ['a', 'b'], written, paths)


@pytest.mark.parametrize('spoil', [harness.cut_in_half, replace_by_fifo])
def test_one_unreadable_picture_in_a_hundred_is_named_and_skipped(convert, capsys, hundred, spoil):
    source, written = hundred
    spoil(source / 'train/b/7.png')
    assert_all_but(convert(source), written, ['train/b/7.png'])
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f'{source}/train/b/7.png: ') and '1 unreadable' in output.out


def test_more_unreadable_pictures_need_keep_going(convert, reject, capsys, hundred, monkeypatch):
    monkeypatch.setattr(script, 'PROGRESS_SECS', 0.01)
    source, written = hundred
    spoiled = ['train/b/7.png', 'test/a/3.png']
    for path in spoiled:
        (source / path).write_text('no picture')
    reject(source, '2 of 100', '--keep_going')
    output = capsys.readouterr()
    assert ' of 100 pictures after ' in output.out
    named = [line.split(': ')[0] for line in output.err.splitlines()]
    assert named == [f'{source}/{path}' for path in spoiled]
    assert_all_but(convert(source, keep_going=True), written, spoiled)


def test_class_with_only_unreadable_pictures_is_rejected(reject, hundred):
    source, _ = hundred
    for i in range(40):
        (source / f'train/b/{i}.png').write_text('no picture')
    reject(source, 'class b', keep_going=True)


# --- CIFAR-10 and CIFAR-100 ------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 writes its strings."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack('<i', len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


class Call:
    """Pickles as a call of a function."""

    def __init__(self, *function_and_argument):
        self.call = function_and_argument

    def __reduce__(self):
        return self.call[0], self.call[1:]


def python2_pickle(**value):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump({key.encode(): each for key, each in value.items()})
    return file.getvalue()


NAMES = {'fine': [f'f_{100 - i}' for i in range(100)], 'coarse': [f'c_{i}' for i in range(20)]}
LABELS = {'fine': np.arange(130) * 7 % 100, 'coarse': np.arange(130) * 7 % 100 // 5}
PLANES = reference.random_images(130, seed=6).transpose(0, 3, 1, 2).reshape(130, -1)


def published(kind):
    """Dict of file name -> contents with 130 images, 100 of them for training."""

    def python(part):
        values = {f'{prefix}labels': LABELS[level][part].tolist() for level, prefix in levels}
        return python2_pickle(data=PLANES[part], **values)

    if kind == 'binary':
        records = np.column_stack([LABELS['coarse'], LABELS['fine'], PLANES]).astype(np.uint8)
        files = {
            f'{each}_label_names.txt': '\n'.join(NAMES[each] + ['']).encode() for each in NAMES
        }
        return dict(files, **{'train.bin': bytes(records[:100]), 'test.bin': bytes(records[100:])})
    levels = [('coarse', '')] if kind == 'CIFAR-10' else [('fine', 'fine_'), ('coarse', 'coarse_')]
    names = {f'{prefix}label_names': [n.encode() for n in NAMES[level]] for level, prefix in levels}
    meta, test = python2_pickle(**names), python(slice(100, None))
    if kind == 'python':
        return {'meta': meta, 'train': python(slice(100)), 'test': test}
    files = {f'data_batch_{i + 1}': python(slice(20 * i, 20 * i + 20)) for i in range(5)}
    return dict(files, **{'test_batch': test, 'batches.meta': meta})


def write_files(folder, files):
    folder.mkdir(parents=True)
    for name, contents in files.items():
        if contents is not None:
            (folder / name).write_bytes(contents)
    return folder


def write_archive(path, files):
    with tarfile.open(str(path), 'w:gz') as archive:
        for name, contents in files.items():
            info = tarfile.TarInfo('cifar/' + name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return path


@pytest.mark.parametrize('write', [write_files, write_archive], ids=['folder', 'archive'])
@pytest.mark.parametrize(
    'kind, level',
    [(kind, level) for kind in ('binary', 'python') for level in NAMES] + [('CIFAR-10', 'coarse')],
)
def test_cifar_keeps_images_labels_and_names(convert, tmp_path, kind, level, write):
    source = write(tmp_path / 'source', published(kind))
    found = convert(source, coarse=level == 'coarse' and kind != 'CIFAR-10')
    expected = list(zip(LABELS[level], map(bytes, PLANES)))
    assert sorted(found.training) == sorted(expected[:100])
    assert sorted(found.test) == sorted(expected[100:])
    assert found.names == NAMES[level]


@pytest.mark.parametrize(
    'kind, change, parts',
    [
        ('binary', {'fine_label_names.txt': b'a b c'}, ['label 99', '3 classes']),
        ('binary', {'fine_label_names.txt': b'\xff\xfe'}, []),
        ('binary', {'fine_label_names.txt': None}, ['No such file']),
        ('binary', {'test.bin': b'\0' * 3075}, []),
        ('binary', {'test.bin': b''}, ['0 readable test']),
        ('CIFAR-10', {'batches.meta': b'no pickle'}, []),
        ('CIFAR-10', {'data_batch_3': b''}, []),
        ('CIFAR-10', {'test_batch': python2_pickle(labels=[1])}, ["'data'"]),
        ('CIFAR-10', {'test_batch': python2_pickle(labels=[1], data=1)}, []),
        (
            'CIFAR-10',
            {'test_batch': python2_pickle(labels=[1], data=PLANES[:3])},
            ['1 labels for 3'],
        ),
        ('CIFAR-10', {'test_batch': python2_pickle(labels=[], data=Call(sys.exit, 1))}, ['exit']),
        ('CIFAR-10', {'data_batch_1.bin': b'', 'batches.meta': None}, ['needs no conversion']),
    ],
)
def test_unusable_cifar_folders_are_rejected(reject, tmp_path, kind, change, parts):
    source = write_files(tmp_path / 'source', dict(published(kind), **change))
    reject(source, str(source), *parts)


def test_coarse_is_for_cifar_100_only(reject, tmp_path):
    reject(write_files(tmp_path / 'x', published('CIFAR-10')), '--coarse', coarse=True)


@pytest.mark.parametrize(
    'spoil, part',
    [
        (lambda path: path.unlink(), 'No such file'),
        (lambda path: path.write_text('text'), '.tar.gz'),
        (lambda path: path.write_bytes(gzip.compress(b'text')), ''),
        (harness.cut_in_half, ''),
        (lambda path: os.truncate(str(path), path.stat().st_size - 4), ''),
        (lambda path: write_archive(path, {'something': b'else'}), 'neither CIFAR-10 nor'),
        (lambda path: write_archive(path, {'train.bin': b''}), "'fine_label_names.txt'"),
        (harness.change_bytes, ''),
        (lambda path: path.write_bytes(gzip.compress(bytes(2**24))), 'more than 4194304'),
        (replace_by_fifo, 'not a regular file'),
        (replace_by_device, 'not a regular file'),
        (lambda path: os.truncate(str(path), 2**22 + 1), 'limit of 4194304'),
    ],
    ids='missing text no-tar half no-checksum other member changed bomb fifo device large'.split(),
)
def test_unusable_archives_are_rejected(reject, tmp_path, monkeypatch, spoil, part):
    monkeypatch.setattr(sources, 'MAX_BYTES', 2**22)
    archive = write_archive(tmp_path / 'cifar.tar.gz', published('binary'))
    spoil(archive)
    reject(archive, str(archive), part)


# --- Kaggle and SVHN -------------------------------------------------------------


def test_kaggle_uses_the_labelled_pictures(convert, tmp_path, capsys):
    written = write_pictures(tmp_path / 'source', {'train': 24, 'test': 3})
    rows = [f'{i},{"dog" if i % 2 else "cat"}\n' for i in range(24)]
    (tmp_path / 'source' / 'trainLabels.csv').write_text('id,label\n' + ''.join(rows))
    found = convert(tmp_path / 'source')
    assert found.names == ['cat', 'dog']
    assert (len(found.training), len(found.test)) == (20, 4)
    for label, planes in found.training + found.test:
        half, name = written[planes].split('/')
        assert half == 'train' and int(name[:-4]) % 2 == label
    assert 'test set' in capsys.readouterr().out


def svhn_arrays(part):
    y = np.where(LABELS['fine'][part] % 10, LABELS['fine'][part] % 10, 10)
    images = PLANES[part].reshape(-1, 3, 32, 32)
    return {'X': images.transpose(2, 3, 1, 0), 'y': y.astype(np.uint8)[:, np.newaxis]}


@pytest.fixture
def svhn(tmp_path):
    """Function that writes SVHN, with other arrays in the test set. Returns the folder."""
    scipy_io = pytest.importorskip('scipy.io')

    def write(**arrays):
        folder = tmp_path / 'svhn'
        folder.mkdir()
        test = dict(svhn_arrays(slice(25, 38)), **arrays)
        for name, values in ('train', svhn_arrays(slice(25))), ('test', test):
            scipy_io.savemat(str(folder / f'{name}_32x32.mat'), values, do_compression=True)
        return folder

    return write


def test_svhn_keeps_images_and_label_10_is_a_zero(convert, svhn):
    found = convert(svhn())
    assert found.names == list('0123456789')
    expected = list(zip(LABELS['fine'] % 10, map(bytes, PLANES)))
    assert sorted(found.training) == sorted(expected[:25])
    assert sorted(found.test) == sorted(expected[25:38])


@pytest.mark.parametrize(
    'arrays, part',
    [
        (dict(y=np.ones([12, 1], np.uint8)), '12 labels for 13 images'),
        (dict(y=np.full([13, 1], 12, np.uint8)), '1 to 10'),
        (dict(y=np.zeros([13, 1], np.uint8)), '1 to 10'),
        (dict(X=np.zeros([32, 32, 3, 13])), 'float64'),
        (dict(X=np.zeros([32, 32, 1, 13], np.uint8)), '[13, 32, 32, 1]'),
        (lambda path: path.write_bytes(b'MATLAB 7.3 MAT-file'.ljust(512)), '-v7'),
        (lambda path: path.write_bytes(b''), 'test_32x32.mat'),
        (lambda path: path.unlink(), 'No such file'),
        (harness.cut_in_half, 'test_32x32.mat'),
        (replace_by_device, 'not a regular file'),
    ],
)
def test_unusable_svhn_is_rejected(reject, svhn, arrays, part):
    if isinstance(arrays, dict):
        folder = svhn(**arrays)
    else:
        folder = svhn()
        arrays(folder / 'test_32x32.mat')
    reject(folder, part)


def test_svhn_needs_scipy(reject, svhn, monkeypatch):
    folder = svhn()
    monkeypatch.setitem(sys.modules, 'scipy', None)
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    reject(folder, 'pip install scipy')


# --- Output ----------------------------------------------------------------------


def test_existing_data_set_is_left_alone(convert, data_dir, tmp_path):
    write_pictures(tmp_path / 'source', {'a': 6, 'b': 6})
    (data_dir / reference.DATA_FOLDER).mkdir(parents=True)
    assert convert(tmp_path / 'source').names == ['a', 'b']  # An empty folder is replaced.
    before = harness.contents(data_dir)
    with pytest.raises(script.UserError, match=f'{data_dir}/{reference.DATA_FOLDER}'):
        convert(tmp_path / 'source')
    assert harness.contents(data_dir) == before


@pytest.mark.parametrize('place', ['source', 'source/below'])
def test_data_dir_in_the_source_is_rejected(tmp_path, place):
    write_pictures(tmp_path / 'source', {'a': 6, 'b': 6})
    harness.set_flags(data_dir=str(tmp_path / place))
    with pytest.raises(script.UserError, match=f'--data_dir={tmp_path}/{place}'):
        cifar10_convert.main([CONVERT, str(tmp_path / 'source')])


def test_full_disk_leaves_nothing(reject, data_dir, tmp_path, monkeypatch):
    def fail(folder, names):
        assert os.path.getsize(f'{folder}/data_batch_5.bin') > 0
        raise OSError(28, 'No space left on device')

    write_pictures(tmp_path / 'source', {'a': 6, 'b': 6})
    monkeypatch.setattr(cifar10_convert.dataset, 'write_class_names', fail)
    reject(tmp_path / 'source', f'--data_dir={data_dir}', 'No space left')


def test_killed_conversion_leaves_no_data_set(start, convert, data_dir, hundred):
    source, written = hundred
    before = 'import tests.programs.stalled_pictures'
    killed = start(CONVERT, source, f'--data_dir={data_dir}', before=before)
    killed.wait_for('^stalled')
    with pytest.raises(script.UserError, match=str(data_dir)):
        convert(source)
    killed.kill()
    assert sorted(os.listdir(str(data_dir))) == ['.convert', '.lock']
    assert_all_but(convert(source), written, [])


def test_usage_asks_for_source_and_data_dir():
    with pytest.raises(app.UsageError, match='--data_dir=.*DATA_DIR='):
        cifar10_convert.main([CONVERT, 'source'])
    with pytest.raises(app.UsageError, match='SOURCE'):
        cifar10_convert.main([CONVERT])


# --- Pictures and data sets in other places -------------------------------------


@pytest.mark.parametrize('place', ['', 'train/'])
def test_picture_outside_the_classes_is_rejected(reject, tmp_path, place):
    counts = {'train/a': 6, 'train/b': 6, 'test/a': 6, 'test/b': 6} if place else {'a': 6, 'b': 6}
    source = tmp_path / 'source'
    write_pictures(source, counts)
    for suffix in pictures.SUFFIXES:
        stray = source / f'{place}stray{suffix.upper()}'
        stray.write_bytes(b'')
        reject(source, f'{stray} is not in the folder of a class', cifar10_convert.LAYOUT)
        stray.unlink()


def test_folder_around_a_data_set_is_not_mistaken_for_pictures(reject, tmp_path):
    (tmp_path / 'source' / 'cifar-10-batches-py').mkdir(parents=True)
    (tmp_path / 'source' / 'cifar-10-batches-py' / 'batches.meta').write_bytes(b'')
    reject(tmp_path / 'source', 'cifar-10-batches-py is. Name that.')
