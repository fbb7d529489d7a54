"""Tests of cifar10_convert.py and support/sources.py."""

import collections
import gzip
import io
import os
import pickle
import shutil
import socket
import struct
import sys
import tarfile
import weakref

from absl import app
from absl import flags
import numpy as np
from PIL import Image
import pytest

import cifar10_convert
from support import pictures, script, sources
from tests import harness
from tests import reference

FLAGS = flags.FLAGS
CONVERT = 'cifar10_convert.py'
FILES = sorted(reference.DATA_FILES + ['batches.meta.txt'])
LAYOUT = 'SOURCE/train/CLASS/PICTURE'

DataSet = collections.namedtuple('DataSet', 'names training test')  # Lists of (label, planes).


# --- Helpers -------------------------------------------------------------------


def planes_of(image):
    return image.transpose(2, 0, 1).tobytes()


def write_pictures(folder, counts):
    """Writes random 32x32 pictures, so many for each class folder in `counts`.

    Returns:
      Dict of planes, as in a record, -> path below the folder.
    """
    written = {}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = reference.random_images(1, seed=len(written))[0]
            Image.fromarray(image).save(str(folder / name / f'{i}.png'))
            written[planes_of(image)] = f'{name}/{i}.png'
    return written


def records_in(folder, *names):
    contents = b''.join((folder / name).read_bytes() for name in names)
    assert len(contents) % 3073 == 0
    return [(contents[i], contents[i + 1 : i + 3073]) for i in range(0, len(contents), 3073)]


def read_data_set(data_dir):
    """The data set, which has to be the only thing in data_dir."""
    folder = data_dir / reference.DATA_FOLDER
    assert sorted(os.listdir(str(data_dir))) == ['.lock', reference.DATA_FOLDER]
    assert sorted(os.listdir(str(folder))) == FILES
    names = (folder / 'batches.meta.txt').read_text(encoding='utf-8').splitlines()
    training = records_in(folder, *reference.TRAINING_FILES)
    return DataSet(names, training, records_in(folder, 'test_batch.bin'))


def assert_records(records, names, written, paths):
    """The records are these pictures, each once, with the label of its folder."""
    assert sorted(written[planes] for _, planes in records) == sorted(paths)
    for label, planes in records:
        assert names[label] == written[planes].split('/')[-2]


def replace_by_text(path):
    path.write_text('no picture')


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(str(path))


def replace_by_device(path):
    path.unlink()
    path.symlink_to('/dev/zero')


def cut_in_half(path):
    os.truncate(str(path), path.stat().st_size // 2)


def change_bytes(path):
    contents = bytearray(path.read_bytes())
    middle = len(contents) // 2
    contents[middle : middle + 20] = bytes(byte ^ 255 for byte in contents[middle : middle + 20])
    path.write_bytes(bytes(contents))


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / 'data'


@pytest.fixture
def convert(data_dir):
    """Function that converts a source in this process and returns the DataSet."""

    def run(source, **values):
        for name, value in dict(values, data_dir=str(data_dir)).items():
            setattr(FLAGS, name, value)
        cifar10_convert.main([CONVERT, str(source)])
        return read_data_set(data_dir)

    return run


@pytest.fixture
def reject(convert, data_dir):
    """Function that expects an error, and nothing written. Returns the message."""

    def run(source, **values):
        with pytest.raises(script.UserError) as error:
            convert(source, **values)
        assert os.listdir(str(data_dir)) == ['.lock']
        assert '\n' not in str(error.value)
        return str(error.value)

    return run


# --- Folders of pictures ---------------------------------------------------------


@pytest.mark.parametrize(
    'train, test',
    [('train', 'test'), ('Train', 'Test'), ('training', 'TESTING'), ('train', 'val')],
)
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


def test_every_file_mixes_the_classes(convert, data_dir, tmp_path):
    write_pictures(tmp_path / 'source', {'a': 48, 'b': 36, 'c': 60})
    convert(tmp_path / 'source')
    for name in reference.DATA_FILES:
        labels = [label for label, _ in records_in(data_dir / reference.DATA_FOLDER, name)]
        assert len(labels) == 24 and set(labels) == {0, 1, 2}
        assert np.count_nonzero(np.diff(labels)) > 7, 'sorted by class'


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
    assert output.err == ''
    assert f'Not used: {source}/README.txt\n' in output.out


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
    ],
)
def test_unusable_folders_are_rejected(reject, tmp_path, counts, parts):
    write_pictures(tmp_path / 'source', counts)
    message = reject(tmp_path / 'source')
    assert all(part in message for part in parts), message


@pytest.mark.parametrize('n', [256, 257])
def test_number_of_classes_is_at_most_256(convert, reject, tmp_path, n):
    for i in range(n):
        for half in 'train', 'test':
            folder = tmp_path / 'source' / half / f'{i:03}'
            folder.mkdir(parents=True)
            Image.new('RGB', (32, 32), (i % 256,) * 3).save(str(folder / '1.png'))
    if n == 257:
        assert '257' in reject(tmp_path / 'source')
        return
    found = convert(tmp_path / 'source')
    assert len(found.names) == len(found.test) == len(found.training) == 256
    assert all(planes == bytes([label]) * 3072 for label, planes in found.training + found.test)


def test_class_names_do_not_depend_on_the_locale(tmp_path, data_dir):
    write_pictures(tmp_path / 'source', {'кот': 6, 'dog': 6})
    ascii_only = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    env = dict(harness.script_environment(), **ascii_only)
    converter = harness.start_script(
        str(tmp_path / 'log'), CONVERT, [tmp_path / 'source', f'--data_dir={data_dir}'], env
    )
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


def replace_by_socket(path):
    path.unlink()
    folder = os.getcwd()
    os.chdir(str(path.parent))  # The path of a socket has to be short.
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(folder)


@pytest.mark.parametrize(
    'spoil',
    [replace_by_text, cut_in_half, replace_by_fifo, replace_by_socket, replace_by_device],
)
def test_one_unreadable_picture_in_a_hundred_is_named_and_skipped(convert, capsys, hundred, spoil):
    source, written = hundred
    spoil(source / 'train/b/7.png')
    found = convert(source)
    assert (len(found.training), len(found.test)) == (79, 20)
    assert_all_but(found, written, ['train/b/7.png'])
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f'{source}/train/b/7.png: ')
    assert '1 unreadable' in output.out


def test_more_unreadable_pictures_need_keep_going(convert, reject, capsys, hundred):
    source, written = hundred
    spoiled = ['train/b/7.png', 'test/a/3.png']
    for path in spoiled:
        (source / path).write_text('no picture')
    message = reject(source)
    assert '2 of 100' in message and '--keep_going' in message
    named = [line.split(': ')[0] for line in capsys.readouterr().err.splitlines()]
    assert named == [f'{source}/{path}' for path in spoiled]
    assert_all_but(convert(source, keep_going=True), written, spoiled)


def test_class_with_only_unreadable_pictures_is_rejected(reject, hundred):
    source, _ = hundred
    for i in range(40):
        (source / f'train/b/{i}.png').write_text('no picture')
    assert 'class b' in reject(source, keep_going=True)


# --- CIFAR-10 and CIFAR-100 ------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 writes its strings; `calls` is a function that the file calls."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack('<i', len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue()


LEVELS = {'fine': 100, 'coarse': 20}
NAMES = {level: [f'{level}_{n - i}' for i in range(n)] for level, n in LEVELS.items()}
FINE = np.arange(130) * 7 % 100
LABELS = {'fine': FINE, 'coarse': FINE // 5}
PLANES = [planes_of(image) for image in reference.random_images(130, seed=6)]


def published(kind):
    """Dict of file name -> contents with 130 images, 100 of them for training."""
    rows = np.stack([np.frombuffer(planes, np.uint8) for planes in PLANES])
    levels = {'coarse': ''} if kind == 'CIFAR-10' else {'fine': 'fine_', 'coarse': 'coarse_'}
    training, test = slice(100), slice(100, None)

    def batch(part):
        values = {
            f'{key}labels'.encode(): LABELS[each][part].tolist() for each, key in levels.items()
        }
        values[b'data'] = rows[part]
        return python2_pickle(values)

    if kind == 'binary':
        records = np.column_stack([LABELS['coarse'], LABELS['fine'], rows]).astype(np.uint8)
        files = {
            f'{each}_label_names.txt': '\n'.join(NAMES[each] + ['']).encode() for each in LEVELS
        }
        return dict(
            files, **{'train.bin': records[training].tobytes(), 'test.bin': records[test].tobytes()}
        )
    names = {
        f'{key}label_names'.encode(): [name.encode() for name in NAMES[level]]
        for level, key in levels.items()
    }
    if kind == 'python':
        return {'meta': python2_pickle(names), 'train': batch(training), 'test': batch(test)}
    files = {f'data_batch_{i + 1}': batch(slice(20 * i, 20 * i + 20)) for i in range(5)}
    return dict(files, **{'test_batch': batch(test), 'batches.meta': python2_pickle(names)})


def write_files(folder, files):
    folder.mkdir(parents=True)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return folder


def write_archive(path, files):
    with tarfile.open(str(path), 'w:gz') as archive:
        for name, contents in files.items():
            info = tarfile.TarInfo('cifar/' + name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return path


@pytest.mark.parametrize('packed', [False, True], ids=['folder', 'archive'])
@pytest.mark.parametrize(
    'kind, level',
    [
        ('binary', 'fine'),
        ('binary', 'coarse'),
        ('python', 'fine'),
        ('python', 'coarse'),
        ('CIFAR-10', 'coarse'),
    ],
)
def test_cifar_keeps_images_labels_and_names(convert, tmp_path, kind, level, packed):
    write = write_archive if packed else write_files
    source = write(tmp_path / 'source', published(kind))
    found = convert(source, coarse=level == 'coarse' and kind != 'CIFAR-10')
    expected = list(zip(LABELS[level], PLANES))
    assert sorted(found.training) == sorted(expected[:100])
    assert sorted(found.test) == sorted(expected[100:])
    assert found.names == NAMES[level]


class Call:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_cannot_call_functions(reject, tmp_path):
    files = published('CIFAR-10')
    attack = {b'label_names': [b'a', b'b'], b'labels': [], b'data': Call(str(tmp_path / 'hacked'))}
    files['test_batch'] = python2_pickle(attack)
    assert 'mkdir' in reject(write_files(tmp_path / 'source', files))
    assert not (tmp_path / 'hacked').exists()


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
        ('CIFAR-10', {'test_batch': python2_pickle({b'labels': [1]})}, ["'data'"]),
        ('CIFAR-10', {'test_batch': python2_pickle({b'labels': [1], b'data': 1})}, []),
        ('CIFAR-10', {'data_batch_1.bin': b'', 'batches.meta': None}, ['needs no conversion']),
    ],
)
def test_unusable_cifar_folders_are_rejected(reject, tmp_path, kind, change, parts):
    files = dict(published(kind), **change)
    source = write_files(
        tmp_path / 'source', {name: each for name, each in files.items() if each is not None}
    )
    message = reject(source)
    assert str(source) in message and all(part in message for part in parts), message


def test_labels_have_to_match_the_images(reject, tmp_path):
    files = published('CIFAR-10')
    images = np.zeros([3, 3072], np.uint8)
    files['test_batch'] = python2_pickle({b'labels': [1, 2], b'data': images})
    assert '2 labels for 3 images' in reject(write_files(tmp_path / 'source', files))


def test_coarse_is_for_cifar_100_only(reject, tmp_path):
    assert '--coarse' in reject(write_files(tmp_path / 'x', published('CIFAR-10')), coarse=True)


def leave_out_names(path):
    files = published('binary')
    del files['fine_label_names.txt']
    write_archive(path, files)


def replace_by_bomb(path):
    path.write_bytes(gzip.compress(bytes(2**24)))
    assert path.stat().st_size < 2**15


@pytest.mark.parametrize(
    'spoil, part',
    [
        (lambda path: path.unlink(), 'No such file'),
        (replace_by_text, '.tar.gz'),
        (lambda path: path.write_bytes(gzip.compress(b'text')), ''),
        (cut_in_half, ''),
        (lambda path: os.truncate(str(path), path.stat().st_size - 4), ''),
        (lambda path: write_archive(path, {'something': b'else'}), 'neither CIFAR-10 nor'),
        (leave_out_names, "'fine_label_names.txt'"),
        (change_bytes, ''),
        (replace_by_bomb, 'more than 4194304'),
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
    message = reject(archive)
    assert str(archive) in message and part in message, message


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


def svhn_arrays(n, seed=0):
    labels = np.arange(n) % 10
    images = reference.random_images(n, seed)
    y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, np.newaxis]
    return {'X': np.stack(images, axis=-1), 'y': y}, list(zip(labels, map(planes_of, images)))


@pytest.fixture
def svhn(tmp_path):
    """Function that writes SVHN, with other arrays in the test set. Returns the folder."""
    scipy_io = pytest.importorskip('scipy.io')

    def write(**arrays):
        (tmp_path / 'svhn').mkdir()
        training, test = svhn_arrays(25)[0], dict(svhn_arrays(13, seed=1)[0], **arrays)
        for name, values in ('train', training), ('test', test):
            path = str(tmp_path / 'svhn' / f'{name}_32x32.mat')
            scipy_io.savemat(path, values, do_compression=True)
        return tmp_path / 'svhn'

    return write


def test_svhn_keeps_images_and_label_10_is_a_zero(convert, svhn):
    found = convert(svhn())
    assert found.names == list('0123456789')
    assert sorted(found.training) == sorted(svhn_arrays(25)[1])
    assert sorted(found.test) == sorted(svhn_arrays(13, seed=1)[1])


@pytest.mark.parametrize(
    'arrays, part',
    [
        (dict(y=np.ones([12, 1], np.uint8)), '12 labels for 13 images'),
        (dict(y=np.full([13, 1], 12, np.uint8)), '1 to 10'),
        (dict(y=np.zeros([13, 1], np.uint8)), '1 to 10'),
        (dict(X=np.zeros([32, 32, 3, 13])), 'float64'),
        (dict(X=np.zeros([32, 32, 13], np.uint8)), ''),
        (dict(X=np.zeros([32, 32, 1, 13], np.uint8)), '[13, 32, 32, 1]'),
    ],
)
def test_svhn_with_unexpected_arrays_is_rejected(reject, svhn, arrays, part):
    message = reject(svhn(**arrays))
    assert 'svhn' in message and part in message, message


@pytest.mark.parametrize(
    'spoil, part',
    [
        (lambda path: path.write_bytes(b'MATLAB 7.3 MAT-file'.ljust(512)), '-v7'),
        (lambda path: path.write_bytes(b''), 'test_32x32.mat'),
        (lambda path: path.unlink(), 'No such file'),
        (cut_in_half, 'test_32x32.mat'),
        (change_bytes, 'test_32x32.mat'),
        (replace_by_device, 'not a regular file'),
    ],
    ids=['version 7.3', 'empty', 'missing', 'truncated', 'changed', 'device'],
)
def test_unreadable_svhn_is_rejected(reject, svhn, spoil, part):
    folder = svhn()
    spoil(folder / 'test_32x32.mat')
    assert part in reject(folder)


def test_svhn_needs_scipy(reject, svhn, monkeypatch):
    folder = svhn()
    monkeypatch.setitem(sys.modules, 'scipy', None)
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    assert 'pip install scipy' in reject(folder)


# --- Output ----------------------------------------------------------------------


def contents_of(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_existing_data_set_is_left_alone(convert, data_dir, tmp_path):
    write_pictures(tmp_path / 'source', {'a': 6, 'b': 6})
    reference.write_data(data_dir, reference.random_images(20), [1] * 20, test_images=5)
    before = contents_of(data_dir)
    with pytest.raises(script.UserError, match=f'{data_dir}/{reference.DATA_FOLDER}'):
        convert(tmp_path / 'source')
    assert contents_of(data_dir) == before


def test_empty_folder_is_replaced(convert, data_dir, tmp_path):
    write_pictures(tmp_path / 'source', {'a': 6, 'b': 6})
    (data_dir / reference.DATA_FOLDER).mkdir(parents=True)
    assert convert(tmp_path / 'source').names == ['a', 'b']


@pytest.mark.parametrize('place', ['file', 'file/below', 'source', 'source/below'])
def test_unusable_data_dir_is_rejected(tmp_path, place):
    write_pictures(tmp_path / 'source', {'a': 6, 'b': 6})
    (tmp_path / 'file').write_text('')
    FLAGS.data_dir = str(tmp_path / place)
    with pytest.raises(script.UserError, match=f'--data_dir={tmp_path}/{place}'):
        cifar10_convert.main([CONVERT, str(tmp_path / 'source')])


def test_full_disk_leaves_nothing(reject, data_dir, tmp_path, monkeypatch):
    def fail(folder, names):
        assert os.path.getsize(f'{folder}/data_batch_5.bin') > 0
        raise OSError(28, 'No space left on device')

    write_pictures(tmp_path / 'source', {'a': 6, 'b': 6})
    monkeypatch.setattr(cifar10_convert.dataset, 'write_class_names', fail)
    message = reject(tmp_path / 'source')
    assert f'--data_dir={data_dir}' in message and 'No space left' in message


def test_killed_conversion_leaves_no_data_set(start, convert, data_dir, hundred):
    stalled = '''
import time
from support import pictures
read = pictures.read
def stall(sources, size, at_a_time):
    lists = read(sources, size, 4)
    yield next(lists)
    yield next(lists)
    print('stalled', flush=True)
    time.sleep(1000)
pictures.read = stall
'''
    source, written = hundred
    killed = start(CONVERT, source, f'--data_dir={data_dir}', before=stalled)
    killed.wait_for('^stalled')
    with pytest.raises(script.UserError, match=str(data_dir)):
        convert(source)
    killed.kill()
    assert sorted(os.listdir(str(data_dir))) == ['.convert', '.lock']
    assert_all_but(convert(source), written, [])


# --- The script ------------------------------------------------------------------


def test_error_is_one_line_and_status_1(start, data_dir):
    converter = start(CONVERT, '/missing\x1b[31m', f'--data_dir={data_dir}')
    assert converter.wait() == 1
    (line,) = converter.errors
    assert line.startswith(f'{CONVERT}: ') and '/missing\\x1b[31m' in line


def test_usage_asks_for_source_and_data_dir():
    with pytest.raises(app.UsageError, match='--data_dir=.*DATA_DIR='):
        cifar10_convert.main([CONVERT, 'source'])
    for arguments in [], ['a', 'b']:
        with pytest.raises(app.UsageError, match='SOURCE'):
            cifar10_convert.main([CONVERT] + arguments)


def test_use_fp16_is_rejected(tmp_path):
    FLAGS.data_dir, FLAGS.use_fp16 = str(tmp_path / 'data'), True
    with pytest.raises(script.UserError, match='--use_fp16'):
        cifar10_convert.main([CONVERT, str(tmp_path)])


def test_progress_is_printed(convert, hundred, capsys, monkeypatch):
    monkeypatch.setattr(cifar10_convert, 'PROGRESS_SECS', 0)
    convert(hundred[0])
    assert '50 of 100' in capsys.readouterr().out


class Counted(np.ndarray):
    """An array, so that living ones can be counted."""


def test_memory_holds_few_images(convert, tmp_path, monkeypatch):
    living, most = set(), []

    def read(paths, size, at_a_time):
        for number, path in enumerate(paths):
            image = np.zeros([size, size, 3], np.uint8).view(Counted)
            living.add(number)
            weakref.finalize(image, living.discard, number)
            most.append(len(living))
            yield [(path, image, None)]

    write_pictures(tmp_path / 'source', {'a': 60, 'b': 60})
    monkeypatch.setattr(pictures, 'read', read)
    convert(tmp_path / 'source')
    assert len(most) == 120 and max(most) <= 3
