"""Tests of cifar10_convert.py: what it makes of which source, and when it makes nothing."""

import collections
import io
import os
import re
import shutil
import tarfile
import weakref

import numpy as np
from PIL import Image
import pytest
from scipy import io as scipy_io
import tensorflow.compat.v1 as tf

import cifar10_convert
from support import script
from tests import reference

FLAGS = tf.flags.FLAGS

CONVERT = 'cifar10_convert.py'
FILES = reference.DATA_FILES + ['batches.meta.txt']


# --- Sources and what became of them -----------------------------------------


def write_picture(path, image):
    """`path` has to be a pathlib.Path; its suffix says in which format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(str(path))


class Drawn:
    """Folders of random pictures of 32x32, which their pixels tell apart.

    Attributes:
      folder: a pathlib.Path.
      where: dict of planes, as in a record -> path below `folder`.
    """

    def __init__(self, folder):
        self.folder, self.where = folder, {}

    def add(self, path, seed):
        image = reference.random_images(1, seed)[0]
        write_picture(self.folder / path, image)
        self.where[image.transpose(2, 0, 1).tobytes()] = path

    def add_some(self, folder, n):
        for i in range(n):
            self.add(f'{folder}/{i}.png', seed=len(self.where))


def records_in(data_dir, *names):
    """[(label, planes)] of all records in files of the data set, in their order."""
    found = []
    for name in names:
        contents = (data_dir / reference.DATA_FOLDER / name).read_bytes()
        assert len(contents) % 3073 == 0
        for i in range(0, len(contents), 3073):
            found.append((contents[i], contents[i + 1 : i + 3073]))
    return found


def names_in(data_dir):
    path = data_dir / reference.DATA_FOLDER / 'batches.meta.txt'
    return path.read_text(encoding='utf-8').splitlines()


def contents_of(data_dir):
    """Dict of name -> bytes of the seven files, which are all that is there."""
    folder = data_dir / reference.DATA_FOLDER
    assert sorted(os.listdir(str(data_dir))) == ['.lock', reference.DATA_FOLDER]
    assert sorted(os.listdir(str(folder))) == sorted(FILES)
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / 'data'


@pytest.fixture
def convert(start, data_dir):
    """Function that converts a source and returns the script, which has succeeded."""

    def run(source, *flags, status=0, **kwargs):
        converter = start(CONVERT, source, f'--data_dir={data_dir}', *flags, **kwargs)
        assert converter.wait() == status, converter.stdout + converter.stderr
        assert 'Traceback' not in converter.stderr
        return converter

    return run


@pytest.fixture
def make(data_dir):
    """Function that converts a source in this process."""

    def run(source, **flags):
        for name, value in dict(flags, data_dir=str(data_dir)).items():
            setattr(FLAGS, name, value)
        cifar10_convert.main([str(source)])

    return run


@pytest.fixture
def refuse(make, data_dir):
    """Function that converts a source in this process, and returns what is wrong with it.

    There must be nothing then that a trainer takes, nor anything half done.
    """

    def run(source):
        with pytest.raises(script.UserError) as error:
            make(source)
        assert os.listdir(str(data_dir)) == ['.lock']
        assert '\n' not in str(error.value)
        return str(error.value)

    return run


# --- Folders of pictures -----------------------------------------------------

Parts = collections.namedtuple('Parts', 'drawn names train test')


@pytest.fixture
def parts(tmp_path):
    """Folders for training and test, of classes that are not made in the order of their names."""
    drawn = Drawn(tmp_path / 'pictures')
    train = collections.OrderedDict([('tree', 31), ('a dog', 40), ('Ähre', 22), ('Dog', 28)])
    test = {'a dog': 5, 'Ähre': 9, 'tree': 1}  # And of the fourth class none.
    for name, n in train.items():
        drawn.add_some(f'train/{name}', n)
    for name, n in test.items():
        drawn.add_some(f'test/{name}', n)
    return Parts(drawn, ['Dog', 'a dog', 'tree', 'Ähre'], train, test)


def assert_each_once(drawn, records, names, paths):
    """The records are those of these pictures, each once and with the right label."""
    assert sorted(drawn.where[planes] for _, planes in records) == sorted(paths)
    for label, planes in records:
        assert drawn.where[planes].split('/')[-2] == names[label]


def test_pictures_for_training_and_test_become_records_of_just_these_with_the_classes_mixed(
    convert, data_dir, parts
):
    converter = convert(parts.drawn.folder)
    assert converter.errors == []
    assert converter.lines[-1] == (
        f'Saved {data_dir}/{reference.DATA_FOLDER}: 121 pictures for training, 15 for the test, '
        '4 classes; 0 could not be read.'
    )
    assert '136/136' in converter.stdout, 'a progress bar'
    assert sorted(contents_of(data_dir)) == sorted(FILES)
    assert names_in(data_dir) == parts.names
    for part, files in ('train', reference.TRAINING_FILES), ('test', ['test_batch.bin']):
        paths = [path for path in parts.drawn.where.values() if path.startswith(part + '/')]
        assert_each_once(parts.drawn, records_in(data_dir, *files), parts.names, paths)

    labels = {
        name: [label for label, _ in records_in(data_dir, name)] for name in reference.DATA_FILES
    }
    changes = {name: np.count_nonzero(np.diff(each)) for name, each in labels.items()}
    assert changes.pop('test_batch.bin') > 4 and min(changes.values()) > 10, 'sorted by class'
    del labels['test_batch.bin']
    assert sorted(map(len, labels.values())) == [24, 24, 24, 24, 25]
    assert all(set(each) == {0, 1, 2, 3} for each in labels.values())


def test_without_such_folders_the_same_sixth_of_each_class_is_for_the_test_at_every_run(
    start, tmp_path
):
    counts = collections.OrderedDict([('cat', 36), ('ant', 17), ('bee', 5), ('owl', 6)])
    seeds = {}
    for name, n in counts.items():
        seeds.update({f'{name}/{i}.png': len(seeds) + i for i in range(n)})
    made = [Drawn(tmp_path / 'first'), Drawn(tmp_path / 'second')]
    for drawn, paths in zip(made, [list(seeds), list(seeds)[::-1]]):
        for path in paths:  # A folder may list them in the order in which they were made.
            drawn.add(path, seeds[path])
    targets = [tmp_path / 'data1', tmp_path / 'data2']
    for drawn, target in zip(made, targets):
        assert start(CONVERT, drawn.folder, f'--data_dir={target}').wait() == 0
    assert contents_of(targets[0]) == contents_of(targets[1])

    names = ['ant', 'bee', 'cat', 'owl']
    assert names_in(targets[0]) == names
    for_test = records_in(targets[0], 'test_batch.bin')
    assert collections.Counter(names[label] for label, _ in for_test) == dict(cat=6, ant=2, owl=1)
    everything = for_test + records_in(targets[0], *reference.TRAINING_FILES)
    assert_each_once(made[0], everything, names, seeds)
    cats = {made[0].where[planes] for label, planes in for_test if names[label] == 'cat'}
    in_order = sorted(path for path in seeds if path.startswith('cat/'))
    for some in in_order[:6], in_order[-6:], in_order[::6]:
        assert cats != set(some), 'not at random'


def by_pillow(picture):
    """The largest central square of a Pillow picture as 32x32, [32, 32, 3] float."""
    picture = picture.convert('RGB')
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((32, 32), Image.BILINEAR)).astype(float)


def test_pictures_of_other_sizes_and_kinds_are_those_that_pillow_makes(make, data_dir, tmp_path):
    random = np.random.RandomState(3)
    expected = {}
    for i, (name, height, width, mode) in enumerate(
        [
            ('wide.png', 60, 200, 'RGB'),
            ('high.png', 77, 40, 'RGB'),
            ('odd.png', 33, 36, 'RGB'),
            ('small.png', 9, 12, 'RGB'),
            ('grey.png', 100, 101, 'L'),
            ('palette.png', 64, 80, 'P'),
            ('wide.bmp', 50, 97, 'RGB'),
            ('high.gif', 120, 64, 'P'),
            ('photo.jpg', 150, 100, 'RGB'),
        ]
    ):
        # In blocks of 3x3.
        noise = random.randint(0, 256, [-(-height // 3), -(-width // 3), 3]).astype(np.uint8)
        pixels = np.repeat(np.repeat(noise, 3, axis=0), 3, axis=1)[:height, :width]
        picture = Image.fromarray(pixels).convert(mode)
        path = tmp_path / 'pictures' / 'train' / f'{i} {name}' / name
        path.parent.mkdir(parents=True)
        picture.save(str(path))
        expected[i] = by_pillow(Image.open(str(path)))  # JPEG changes pixels.
        assert expected[i].std() > 15, 'too dull for a test'
    write_picture(tmp_path / 'pictures' / 'test' / '0 wide.png' / '1.png', pixels)
    make(tmp_path / 'pictures')
    records = records_in(data_dir, *reference.TRAINING_FILES)
    assert sorted(label for label, _ in records) == sorted(expected)
    for label, planes in records:
        image = np.frombuffer(planes, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)
        # Decoders of JPEG differ a little.
        tolerance = 12 if label == 8 else 2
        assert abs(image - expected[label]).max() <= tolerance, label
        assert abs(image - expected[label]).mean() <= tolerance / 4, label


def test_hidden_files_and_folders_are_no_pictures_and_no_classes(convert, data_dir, tmp_path):
    drawn = Drawn(tmp_path / 'pictures')
    for name in 'one', 'two':
        drawn.add_some(name, 12)
        (drawn.folder / name / '.DS_Store').write_bytes(b'\0\1')
    (drawn.folder / '.git').mkdir()
    (drawn.folder / '.git' / 'HEAD').write_text('ref')
    (drawn.folder / 'README.txt').write_text('Not in the folder of a class.')
    converter = convert(drawn.folder)
    assert converter.errors == []
    assert '20 pictures for training, 4 for the test, 2 classes; 0 could' in converter.lines[-1]
    assert_each_once(
        drawn, records_in(data_dir, *reference.DATA_FILES), ['one', 'two'], drawn.where.values()
    )


# --- What cannot be read -----------------------------------------------------


@pytest.fixture
def hundred(tmp_path):
    """100 pictures, 80 of them for training."""
    drawn = Drawn(tmp_path / 'pictures')
    for part, name, n in [
        ('train', 'a', 40),
        ('train', 'b', 40),
        ('test', 'a', 10),
        ('test', 'b', 10),
    ]:
        drawn.add_some(f'{part}/{name}', n)
    return drawn


def spoil(drawn, path, contents):
    (drawn.folder / path).write_bytes(contents)
    drawn.where = {planes: name for planes, name in drawn.where.items() if name != path}


def test_one_in_a_hundred_may_be_unreadable_and_is_named_and_left_out(convert, data_dir, hundred):
    spoil(hundred, 'train/b/7.png', b'no picture')
    converter = convert(hundred.folder)
    assert [line for line in converter.errors if line][0].startswith(
        f'{hundred.folder}/train/b/7.png: '
    )
    assert len([line for line in converter.errors if line]) == 1
    assert converter.lines[-1].endswith(
        ': 79 pictures for training, 20 for the test, 2 classes; 1 could not be read.'
    )
    found = records_in(data_dir, *reference.DATA_FILES)
    assert_each_once(hundred, found, ['a', 'b'], hundred.where.values())
    sizes = [len(records_in(data_dir, name)) for name in reference.TRAINING_FILES]
    assert sorted(sizes) == [15, 16, 16, 16, 16]


def test_more_than_one_in_a_hundred_make_it_stop_unless_it_is_to_keep_going(
    convert, data_dir, hundred
):
    whole = (hundred.folder / 'test/a/3.png').read_bytes()
    spoil(hundred, 'train/b/7.png', b'')
    spoil(hundred, 'test/a/3.png', whole[: len(whole) // 2])
    stopped = convert(hundred.folder, status=1)
    named = [line for line in stopped.errors if line]
    assert [line.split(': ')[0] for line in named] == [
        f'{hundred.folder}/train/b/7.png',
        f'{hundred.folder}/test/a/3.png',
        CONVERT,
    ]
    assert all(re.match(r'.+: \S', line) for line in named), 'without a reason'
    assert ' 2 of 100 pictures ' in named[-1] and '--keep_going' in named[-1]
    assert os.listdir(str(data_dir)) == ['.lock']

    kept_going = convert(hundred.folder, '--keep_going')
    assert [line.split(': ')[0] for line in kept_going.errors if line] == [
        line.split(': ')[0] for line in named[:-1]
    ]
    assert kept_going.lines[-1].endswith('2 could not be read.')
    assert_each_once(
        hundred, records_in(data_dir, *reference.DATA_FILES), ['a', 'b'], hundred.where.values()
    )


# --- CIFAR-100 ---------------------------------------------------------------


@pytest.fixture(scope='module')
def cifar_100(tmp_path_factory):
    """Few records as CIFAR-100 has them, by path: archive and folder; and their parts."""
    folder = tmp_path_factory.mktemp('cifar100')
    labels = np.random.RandomState(5).randint(0, [20, 100], [40, 2])
    labels[0] = 19, 99
    images = reference.random_images(40, seed=6)
    planes = [image.transpose(2, 0, 1).tobytes() for image in images]
    whole = [bytes([coarse, fine]) + each for (coarse, fine), each in zip(labels, planes)]
    members = {
        'train.bin': b''.join(whole[:30]),
        'test.bin': b''.join(whole[30:]),
        'fine_label_names.txt': ''.join(f'fine_{99 - i}\n' for i in range(100)).encode(),
        'coarse_label_names.txt': ''.join(f'coarse_{19 - i}\n' for i in range(20)).encode() + b'\n',
    }
    with tarfile.open(str(folder / 'cifar-100-binary.tar.gz'), 'w:gz') as archive:
        for name, contents in members.items():
            info = tarfile.TarInfo('cifar-100-binary/' + name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    (folder / 'unpacked').mkdir()
    for name, contents in members.items():
        (folder / 'unpacked' / name).write_bytes(contents)
    return folder, labels, planes


@pytest.mark.parametrize('source', ['cifar-100-binary.tar.gz', 'unpacked'])
@pytest.mark.parametrize('coarse', [False, True], ids=['fine', 'coarse'])
def test_cifar_100_keeps_its_images_with_labels_fine_or_coarse(
    make, data_dir, cifar_100, source, coarse
):
    folder, labels, planes = cifar_100
    make(folder / source, coarse=coarse)
    expected = list(zip(labels[:, 0 if coarse else 1], planes))
    assert sorted(records_in(data_dir, *reference.TRAINING_FILES)) == sorted(expected[:30])
    assert sorted(records_in(data_dir, 'test_batch.bin')) == sorted(expected[30:])
    assert names_in(data_dir) == (
        [f'coarse_{19 - i}' for i in range(20)]
        if coarse
        else [f'fine_{99 - i}' for i in range(100)]
    )


# --- SVHN --------------------------------------------------------------------


@pytest.fixture(scope='module')
def svhn(tmp_path_factory):
    """The folder, the labels, with 0 for a zero, and the planes of 25 and 8 digits."""
    folder = tmp_path_factory.mktemp('svhn')
    labels = np.append(np.arange(25) % 10, [0, 9, 1, 8, 0, 5, 6, 2])
    images = reference.random_images(33, seed=9)
    for name, part in ('train_32x32.mat', slice(0, 25)), ('test_32x32.mat', slice(25, 33)):
        y = np.where(labels[part] == 0, 10, labels[part]).astype(np.uint8)[:, np.newaxis]
        contents = {'X': np.stack(images[part], axis=-1), 'y': y}
        assert contents['X'].shape[:3] == (32, 32, 3)
        scipy_io.savemat(str(folder / name), contents, do_compression=True)
    return folder, labels, [image.transpose(2, 0, 1).tobytes() for image in images]


def test_the_digits_of_svhn_keep_their_images_and_a_ten_is_a_zero(make, data_dir, svhn):
    folder, labels, planes = svhn
    make(folder)
    assert names_in(data_dir) == list('0123456789')
    expected = list(zip(labels, planes))
    assert sorted(records_in(data_dir, *reference.TRAINING_FILES)) == sorted(expected[:25])
    assert sorted(records_in(data_dir, 'test_batch.bin')) == sorted(expected[25:])


def test_where_scipy_is_missing_svhn_and_nothing_else_asks_for_it(
    convert, data_dir, svhn, cifar_100
):
    without = "import sys; sys.modules['scipy'] = None"
    refused = convert(svhn[0], status=1, before=without)
    (error,) = refused.errors
    assert error.startswith(f'{CONVERT}: ') and 'pip install scipy' in error
    assert os.listdir(str(data_dir)) == ['.lock']
    convert(cifar_100[0] / 'unpacked', before=without)
    assert sorted(contents_of(data_dir)) == sorted(FILES)


# --- What is no source -------------------------------------------------------


@pytest.mark.parametrize(
    'folders, files, reason',
    [
        ([], ['picture.png'], 'has 0 classes; 2 to 256 are possible'),
        (['.hidden'], [], 'has 0 classes'),
        ([], ['one/%d.png'], 'has 1 classes'),
        ([], ['one/%d.png', 'two/%d.png', 'empty/.hidden'], 'no picture in .*/empty'),
        ([], ['train/a/%d.png', 'train/b/%d.png', 'test/c/1.png'], "without any training: .*'c'"),
        (
            ['train/b'],
            ['train/a/%d.png', 'test/a/1.png', 'test/b/1.png'],
            'no picture in .*/train/b',
        ),
        (['test'], ['train/a/%d.png', 'train/b/%d.png'], '0 pictures for test do not fill 1 file'),
        ([], ['a/1.png', 'b/1.png'], '2 pictures for training do not fill 5 files'),
    ],
    ids=[
        'pictures without folders',
        'nothing',
        'one class',
        'class without pictures',
        'only for the test',
        'nothing for training',
        'nothing for the test',
        'too few',
    ],
)
def test_folders_of_which_no_data_set_can_be_made_are_refused(
    refuse, tmp_path, folders, files, reason
):
    source = tmp_path / 'source'
    for folder in folders:
        (source / folder).mkdir(parents=True)
    for name in files:
        for i in range(6) if '%d' in name else [0]:
            path = source / (name % i if '%d' in name else name)
            write_picture(path.parent / 'x.png', np.zeros([4, 4, 3], np.uint8))
            (path.parent / 'x.png').rename(path)
    assert re.search(reason, refuse(source))


@pytest.mark.parametrize('n, possible', [(256, True), (257, False)])
def test_there_can_be_256_classes_and_no_more(make, refuse, data_dir, tmp_path, n, possible):
    for i in range(n):
        for name in 'train/%03d/1.png', 'test/%03d/1.png':
            path = tmp_path / 'source' / (name % i)
            if possible:
                write_picture(path, np.full([32, 32, 3], i, np.uint8))
            else:
                path.parent.mkdir(parents=True)
                path.touch()
    if not possible:
        assert 'has 257 classes; 2 to 256 are possible' in refuse(tmp_path / 'source')
        return
    make(tmp_path / 'source')
    for name in reference.DATA_FILES:
        assert all(planes == bytes([label]) * 3072 for label, planes in records_in(data_dir, name))
    assert len(records_in(data_dir, 'test_batch.bin')) == len(names_in(data_dir)) == 256


def test_what_is_neither_a_folder_nor_an_archive_is_refused(refuse, tmp_path):
    text = tmp_path / 'text.tar.gz'
    text.write_text('no archive')
    for source in text, tmp_path / 'missing':
        assert refuse(source).startswith(f'cannot read {source} as a folder or cifar-100-binary')


def damage(path):
    """Changes some bytes in the middle, as a bad disk does."""
    contents = bytearray(path.read_bytes())
    middle = len(contents) // 2
    contents[middle : middle + 20] = bytes(byte ^ 255 for byte in contents[middle : middle + 20])
    path.write_bytes(bytes(contents))


def cut_in_half(path):
    os.truncate(str(path), path.stat().st_size // 2)


@pytest.mark.parametrize(
    'damaged',
    [
        'an archive of something else',
        'archive cut short',
        'archive with other bytes',
        'missing part',
        'no records',
        'digits cut short',
        'digits with other bytes',
    ],
)
def test_a_damaged_archive_or_folder_is_named(refuse, cifar_100, svhn, tmp_path, damaged):
    shutil.copytree(str(cifar_100[0]), str(tmp_path / 'cifar'))
    shutil.copytree(str(svhn[0]), str(tmp_path / 'svhn'))
    archive, unpacked = tmp_path / 'cifar' / 'cifar-100-binary.tar.gz', tmp_path / 'cifar/unpacked'
    if damaged == 'an archive of something else':
        source = tmp_path / 'cifar-10-binary.tar.gz'
        with tarfile.open(str(source), 'w:gz') as other:
            other.add(str(unpacked), 'cifar-10-batches-bin')
    elif damaged == 'archive cut short':
        source = archive
        cut_in_half(archive)
    elif damaged == 'archive with other bytes':
        source = archive
        damage(archive)
    elif damaged == 'missing part':
        source = unpacked
        (unpacked / 'fine_label_names.txt').unlink()
    elif damaged == 'no records':
        source = unpacked
        os.truncate(str(unpacked / 'test.bin'), 3074 + 1)
    else:
        source = tmp_path / 'svhn'
        change = cut_in_half if damaged == 'digits cut short' else damage
        change(source / 'test_32x32.mat')
    assert str(source) in refuse(source)


def test_it_ends_with_one_line_and_status_1(convert, data_dir, tmp_path):
    (error,) = convert(tmp_path / 'missing', status=1).errors
    assert error.startswith(f'{CONVERT}: cannot read {tmp_path}/missing as ')


@pytest.mark.parametrize(
    'arguments, reason',
    [
        (['SOURCE'], '--data_dir'),
        (['--data_dir=DATA'], 'one source'),
        (['SOURCE', 'SOURCE', '--data_dir=DATA'], 'one source'),
    ],
    ids=['no target', 'no source', 'two sources'],
)
def test_without_source_or_target_it_says_how_to_call_it(start, tmp_path, arguments, reason):
    places = {'SOURCE': str(tmp_path), '--data_dir=DATA': f'--data_dir={tmp_path}/data'}
    converter = start(CONVERT, *[places[argument] for argument in arguments])
    assert converter.wait() == 1
    said = converter.stdout + converter.stderr
    assert reason in converter.errors[-1] or reason in said.splitlines()[-1]
    assert f'python {CONVERT} SOURCE --data_dir=' in said and 'Traceback' not in said
    assert os.listdir(str(tmp_path)) == []


# --- The target --------------------------------------------------------------


def test_a_data_set_that_is_there_is_left_alone(convert, data_dir, cifar_100):
    reference.write_data(data_dir, reference.random_images(20), [1] * 20, test_images=5)
    target = data_dir / reference.DATA_FOLDER
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in target.iterdir()}
    (error,) = convert(cifar_100[0] / 'unpacked', status=1).errors
    assert error == f'{CONVERT}: {target} holds something already; nothing was changed'
    assert os.listdir(str(data_dir)) == [reference.DATA_FOLDER]
    assert before == {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in target.iterdir()
    }


def test_an_empty_folder_in_its_place_is_no_obstacle(make, data_dir, cifar_100):
    (data_dir / reference.DATA_FOLDER).mkdir(parents=True)
    make(cifar_100[0] / 'unpacked')
    assert len(contents_of(data_dir)) == 7


# It stands still when eight pictures are in the files and four more have been read.
STALLED = """
import time
from support import pictures
read = pictures.read
def slowly(some, size, at_a_time):
    for number, each in enumerate(read(some, size, 4)):
        if number == 2:
            print('\\nstalled', flush=True)
            time.sleep(1000)
        yield each
pictures.read = slowly
"""


def test_a_killed_one_leaves_no_data_set_and_the_next_one_clears_up_and_succeeds(
    start, convert, data_dir, cifar_100, parts
):
    killed = start(CONVERT, parts.drawn.folder, f'--data_dir={data_dir}', before=STALLED)
    killed.wait_for('^stalled')
    (error,) = convert(cifar_100[0] / 'unpacked', status=1).errors
    assert error == f'{CONVERT}: another process is at work in {data_dir}'
    killed.kill()
    assert sorted(os.listdir(str(data_dir))) == ['.convert', '.lock']
    convert(cifar_100[0] / 'unpacked')
    assert len(contents_of(data_dir)) == 7
    assert len(names_in(data_dir)) == 100


def test_an_error_in_the_middle_leaves_nothing(make, data_dir, cifar_100, monkeypatch):
    def fail(*args):
        assert (data_dir / '.convert' / 'data_batch_5.bin').stat().st_size > 0
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(cifar10_convert.cifar10_input, 'write_class_names', fail)
    with pytest.raises(OSError, match='No space left'):
        make(cifar_100[0] / 'unpacked')
    assert os.listdir(str(data_dir)) == ['.lock']


# --- Memory ------------------------------------------------------------------


class Counted(np.ndarray):
    """An array of which the living can be counted."""


def test_no_more_images_are_held_than_are_read_at_a_time(make, data_dir, tmp_path, monkeypatch):
    living, most, lengths = set(), 0, []

    def read(paths, size, at_a_time):
        nonlocal most
        assert not hasattr(paths, '__len__'), 'all there already'
        images = []
        for number, path in enumerate(paths):
            image = np.zeros([size, size, 3], np.uint8).view(Counted)
            living.add(number)
            weakref.finalize(image, living.discard, number)
            images.append((path, image, None))
            most = max(most, len(living))
            if len(images) == at_a_time:
                lengths.append(at_a_time)
                yield images
                images = []
        yield images

    for i in range(300):
        path = tmp_path / 'source' / f'class {i % 3}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(cifar10_convert.pictures, 'read', read)
    monkeypatch.setattr(cifar10_convert, 'PICTURES_AT_A_TIME', 8)
    make(tmp_path / 'source')
    total = sum(len(records_in(data_dir, name)) for name in reference.DATA_FILES)
    assert total == 300 and lengths.count(8) > 30
    assert most <= 2 * 8 + 1
