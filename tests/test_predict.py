"""Tests of support/pictures.py and cifar10_predict.py, against Pillow and NumPy."""

import collections
import io
import itertools
import json
import os
import re
import struct
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

import cifar10_input
from support import pictures
from tests import harness
from tests import reference

PREDICT = 'cifar10_predict.py'
RESULTS = os.path.join(harness.FOLDER, 'results')
NAMES = ['Bär', 'fire engine', 'apple', 'x', 'no. 5', 'ship', 'zebra']

# --- What is expected --------------------------------------------------------


def mosaic(height, width, seed=0):
    """A Pillow image of coloured tiles, of which no two windows are alike."""
    tiles = np.random.RandomState(seed).randint(
        0, 256, [height // 7 + 1, width // 7 + 1, 3], dtype=np.uint8
    )
    return Image.fromarray(tiles).resize((width, height), Image.NEAREST)


def shrunk(image):
    """What Pillow makes of it: the largest central square, [32, 32, 3]."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.convert('RGB').crop((left, top, left + side, top + side))
    return np.asarray(square.resize((32, 32), Image.BILINEAR))


def assert_alike(image, expected, most=1, mean=0.3):
    """Within so many grey levels; at most, and on average."""
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    difference = np.abs(image.astype(int) - expected)
    assert difference.max() <= most
    assert difference.mean() <= mean


def read_all(paths):
    """The images of files that can all be read."""
    lists = list(pictures.read([str(path) for path in paths], 32, len(paths)))
    assert len(lists) == 1
    assert [problem for _, _, problem in lists[0]] == [None] * len(paths)
    return [image for _, image, _ in lists[0]]


# --- Pictures of many kinds --------------------------------------------------

SIZES = [(32, 32), (100, 100), (61, 203), (204, 61), (33, 32), (31, 47), (5, 3), (1, 1)]


def with_alpha(image):
    alpha = Image.effect_noise(image.size, 200)
    image = image.copy()
    image.putalpha(alpha)
    return image


KINDS = {
    'RGB.png': lambda image: image,
    'RGBA.png': with_alpha,
    'grey.png': lambda image: image.convert('L'),
    'grey with alpha.png': lambda image: with_alpha(image.convert('L')),
    'palette.png': lambda image: image.convert('P', palette=Image.ADAPTIVE),
    'palette of 5.png': lambda image: image.convert('P', palette=Image.ADAPTIVE, colors=5),
    'black and white.png': lambda image: image.convert('1'),
    'RGB.bmp': lambda image: image,
    'RGBA.bmp': with_alpha,
    'grey.bmp': lambda image: image.convert('L'),
    'palette.bmp': lambda image: image.convert('P', palette=Image.ADAPTIVE),
    'palette of 5.bmp': lambda image: image.convert('P', palette=Image.ADAPTIVE, colors=5),
    'palette.gif': lambda image: image.convert('P', palette=Image.ADAPTIVE),
    'grey.gif': lambda image: image.convert('L'),
}


@pytest.mark.parametrize('kind', KINDS)
def test_a_lossless_picture_of_any_size_is_what_pillow_makes_of_it(tmp_path, kind):
    images = [KINDS[kind](mosaic(height, width)) for height, width in SIZES]
    paths = [tmp_path / f'{i} {kind}' for i in range(len(images))]
    for image, path in zip(images, paths):
        image.save(str(path))
    results = read_all(paths)
    for image, result in zip(images, results):
        assert_alike(result, shrunk(image))
    assert np.array_equal(results[0], np.asarray(images[0].convert('RGB')))  # 32x32.


def test_16_bits_a_channel_become_8(tmp_path):
    grey = [mosaic(height, width).convert('L') for height, width in SIZES]
    paths = [tmp_path / f'{i}.png' for i in range(len(grey))]
    for i, (image, path) in enumerate(zip(grey, paths)):
        low = np.random.RandomState(i).randint(0, 128, [image.size[1], image.size[0]])
        Image.fromarray((np.asarray(image).astype(np.uint16) << 8) + low.astype(np.uint16)).save(
            str(path)
        )
    for image, result in zip(grey, read_all(paths)):
        assert_alike(result, shrunk(image), mean=0.6)  # The low bits are cut off, or rounded.


@pytest.mark.parametrize(
    'mode, options, most, mean',
    [
        ('L', {}, 16, 3),  # TensorFlow's cosine transform is the fast one.
        ('RGB', dict(subsampling=0), 16, 3),
        ('RGB', dict(subsampling=2), 30, 5),  # Colours between pixels: a matter of taste.
        ('RGB', dict(subsampling=0, progressive=True), 16, 3),
        ('CMYK', {}, 30, 5),
    ],
    ids=['grey', '4:4:4', '4:2:0', 'progressive', 'CMYK'],
)
def test_a_jpeg_is_what_pillow_makes_of_it(tmp_path, mode, options, most, mean):
    paths = [tmp_path / f'{i}.jpg' for i in range(len(SIZES))]
    for (height, width), path in zip(SIZES, paths):
        mosaic(height, width).convert(mode).save(str(path), quality=95, **options)
    for path, result in zip(paths, read_all(paths)):
        assert_alike(result, shrunk(Image.open(str(path))), most, mean)


def test_bitmaps_of_different_depth_are_read_in_any_order(tmp_path):
    expected = {}
    for i, kind in enumerate(['RGB.bmp', 'RGBA.bmp', 'grey.bmp', 'palette.bmp']):
        image = KINDS[kind](mosaic(40 + i, 70, seed=i))
        image.save(str(tmp_path / kind))
        expected[str(tmp_path / kind)] = shrunk(image)
    paths = [path for order in itertools.permutations(expected) for path in order]
    lists = list(pictures.read(paths, 32, 1))
    assert len(lists) == 24 * 4
    for [(path, image, problem)] in lists:
        assert problem is None
        assert_alike(image, expected[path])


def test_a_bitmap_may_begin_with_its_top_row(tmp_path):
    image = mosaic(40, 70)
    contents = io.BytesIO()
    image.transpose(Image.FLIP_TOP_BOTTOM).save(contents, 'BMP')
    changed = bytearray(contents.getvalue())
    changed[22:26] = struct.pack('<i', -40)
    (tmp_path / 'x.bmp').write_bytes(changed)
    assert_alike(read_all([tmp_path / 'x.bmp'])[0], shrunk(image))


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [
        mosaic(48, 90, seed).convert('P', palette=Image.ADAPTIVE, colors=64) for seed in range(4)
    ]
    path = tmp_path / 'x.gif'
    frames[2].save(str(path), save_all=True, append_images=[frames[0], frames[1], frames[3]])
    assert Image.open(str(path)).n_frames == 4
    assert_alike(read_all([path])[0], shrunk(frames[2]))


def test_the_contents_count_not_the_name(tmp_path):
    image = mosaic(40, 70)
    for name, kind in ('a.jpg', 'PNG'), ('b.png', 'BMP'), ('c', 'GIF'), ('d.bmp', 'PNG'):
        image = image.convert('P', palette=Image.ADAPTIVE) if kind == 'GIF' else image
        image.save(str(tmp_path / name), kind)
        assert_alike(read_all([tmp_path / name])[0], shrunk(image))


# --- Reading many ------------------------------------------------------------


def test_pictures_come_in_their_order_in_lists_as_long_as_asked_with_what_is_wrong(tmp_path):
    images = {}
    for i in range(0, 7):
        image = mosaic(200 - 25 * i, 40 + 60 * (i % 3), seed=i)  # The first take longest.
        images[str(tmp_path / f'{i}.png')] = image
        image.save(str(tmp_path / f'{i}.png'))
    (tmp_path / '1.png').unlink()
    (tmp_path / '4.png').write_text('This is text.\nReally.\n')
    (tmp_path / '6.png').unlink()
    (tmp_path / '6.png').mkdir()
    lists = list(pictures.read(list(images), 32, 3))
    assert [len(some) for some in lists] == [3, 3, 1]
    read = [each for some in lists for each in some]
    assert [path for path, _, _ in read] == list(images)
    problems = {path[-5]: problem for path, _, problem in read if problem is not None}
    assert sorted(problems) == ['1', '4', '6']
    assert problems['1'] == 'No such file or directory'
    assert problems['6'] == 'Is a directory'
    assert problems['4'].strip() and '\n' not in problems['4']
    for path, result, problem in read:
        if problem:
            assert result is None
        else:
            assert_alike(result, shrunk(images[path]))


def test_arrays_are_scaled_like_files():
    images = [mosaic(height, width) for height, width in SIZES]
    arrays = [np.asarray(image) for image in images]
    [some] = pictures.read(arrays, 32, 100)
    for image, array, (picture, result, problem) in zip(images, arrays, some):
        assert picture is array and problem is None
        assert_alike(result, shrunk(image))


def test_no_more_is_taken_from_an_endless_source_than_the_lists_that_are_wanted(tmp_path):
    mosaic(40, 70).save(str(tmp_path / 'x.png'))
    taken = []

    def endless():
        while True:
            taken.append(str(tmp_path / 'x.png'))
            yield taken[-1]

    lists = pictures.read(endless(), 32, 4)
    assert len(next(lists)) == 4
    assert len(taken) == 4
    next(lists)
    assert len(taken) == 8
    lists.close()
    assert len(taken) == 8


def test_no_pictures_make_no_lists():
    assert list(pictures.read([], 32, 4)) == []


# --- The script --------------------------------------------------------------


Model = collections.namedtuple('Model', 'folder averages raw')
Five = collections.namedtuple('Five', 'images paths expected')  # Views -> [5, 7].


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """Three checkpoints of 7 classes and their names. Only the newest one's averages count."""
    folder = tmp_path_factory.mktemp('model')

    variables = reference.variables_of_seven_classes
    # As text, the last one would be the smallest.
    for step, seed in (5, 3), (900, 4), (1000, 1):
        values = reference.checkpoint_values(step, variables(seed + 10), variables(seed))
        reference.write_checkpoint(folder, step, values)
    text = ''.join(f'{name}\n' for name in NAMES)
    (folder / 'batches.meta.txt').write_bytes(text.encode())
    return Model(str(folder), variables(1), variables(11))


@pytest.fixture(scope='module')
def five(tmp_path_factory, model):
    """Five images, their paths, in no alphabetical order, and their probabilities."""
    images = reference.rectangle_images(5)
    folder = tmp_path_factory.mktemp('five')
    paths = [str(folder / f'{name}.png') for name in ('e', 'b', 'd', 'a', 'c')]
    for image, path in zip(images, paths):
        Image.fromarray(image).save(path)
    expected = {views: reference.probabilities(model.averages, images, views) for views in (1, 10)}
    # A wrong order of the classes or of the pictures has to show, other views and variables too.
    for rows in expected.values():
        assert len(set(rows.argmax(axis=1))) > 1
        assert (rows.max(axis=1) > 0.3).all() and (rows.max(axis=1) < 0.999).all()
    raw = reference.probabilities(model.raw, images, 1)
    for other in expected[10], raw:
        assert np.abs(other - expected[1]).max() > 0.01
    return Five(images, paths, expected)


def parse(script):
    """The paths, and [pictures, classes] dicts of class -> probability, of --json."""
    objects = [json.loads(line) for line in script.stdout.splitlines()]
    assert all(sorted(each) == ['classes', 'picture'] for each in objects)
    found = []
    for each in objects:
        assert all(sorted(one) == ['class', 'probability'] for one in each['classes'])
        values = [one['probability'] for one in each['classes']]
        assert values == sorted(values, reverse=True)
        assert abs(sum(values) - 1) < 1e-5
        found.append({one['class']: one['probability'] for one in each['classes']})
    return [each['picture'] for each in objects], found


def assert_probabilities(found, expected):
    for classes, row in zip(found, expected):
        assert sorted(classes) == sorted(NAMES)
        np.testing.assert_allclose([classes[name] for name in NAMES], row, atol=2e-5)


@pytest.mark.parametrize('views, batch_size', [(1, 128), (10, 128), (10, 2)])
def test_probabilities_are_numpys_from_the_averages_of_the_newest_checkpoint(
    start, model, five, views, batch_size
):
    flags = [f'--checkpoint_dir={model.folder}', f'--views={views}', f'--batch_size={batch_size}']
    predict = start(PREDICT, *flags, '--json', *five.paths)
    assert predict.wait() == 0, predict.stderr
    assert predict.errors == []
    seen, found = parse(predict)
    assert seen == five.paths
    assert_probabilities(found, five.expected[views])


def test_a_fresh_clone_names_a_picture_with_the_published_model_and_no_data_set(start, tmp_path):
    image = mosaic(300, 451)
    image.save(str(tmp_path / 'my cat.png'))
    results = sorted(os.listdir(RESULTS))
    predict = start(
        PREDICT,
        f'--data_dir={tmp_path}/nowhere/data',
        'my cat.png',
        before=f'import os; os.chdir({str(tmp_path)!r})',
    )
    assert predict.wait() == 0, predict.stderr
    assert predict.errors == []
    assert len(predict.lines) == 1
    line = re.match(r'my cat\.png: (\w+) (\d\.\d\d), (\w+) (\d\.\d\d), (\w+) (\d\.\d\d)$',
                    predict.lines[0])  # fmt: skip
    values = reference.read_checkpoint(f'{RESULTS}/model.ckpt-150000')
    averages = {name: values[name + reference.AVERAGE] for name in reference.MODEL}
    [image] = read_all([tmp_path / 'my cat.png'])
    [expected] = reference.probabilities(averages, image[np.newaxis], 10)
    names = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    assert cifar10_input.CLASS_NAMES == names
    ranked = [names[i] for i in expected.argsort()[::-1]]
    assert list(line.groups()[::2]) == ranked[:3]
    shown = [float(text) for text in line.groups()[1::2]]
    np.testing.assert_allclose(shown, sorted(expected)[:-4:-1], atol=0.00501)
    assert os.listdir(str(tmp_path)) == ['my cat.png']
    assert sorted(os.listdir(RESULTS)) == results


@pytest.mark.parametrize('top_k', [2, 100])
def test_top_k_says_how_many_classes_are_named(start, model, five, top_k):
    flags = [f'--checkpoint_dir={model.folder}', f'--top_k={top_k}', '--views=1']
    predict = start(PREDICT, *flags, *five.paths)
    assert predict.wait() == 0, predict.stderr
    assert len(predict.lines) == 5
    for line, path, row in zip(predict.lines, five.paths, five.expected[1]):
        before, text = line.split(': ')
        assert before == path
        named = [each.rsplit(' ', 1) for each in text.split(', ')]
        assert [name for name, _ in named] == [NAMES[i] for i in row.argsort()[::-1][:top_k]]
        assert all(re.match(r'[01]\.\d\d$', value) for _, value in named)


def test_names_come_from_standard_input_and_are_answered_before_it_ends(model, five, tmp_path):
    names = ['a b.png', 'ü,:.png', '-x.png']
    for image, name in zip(five.images, names):
        Image.fromarray(image).save(str(tmp_path / name))
    command = [sys.executable, os.path.join(harness.FOLDER, PREDICT), '--batch_size=1']
    command += [f'--checkpoint_dir={model.folder}', '--json', '--views=1', '-']
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(harness.script_environment(), PYTHONIOENCODING='utf-8'),
        cwd=str(tmp_path),
    )
    answers = []
    for name in names:
        process.stdin.write(f'{name}\n'.encode())
        process.stdin.flush()
        answers.append(process.stdout.readline().decode())
    rest, _ = process.communicate()
    assert process.returncode == 0 and rest == b''
    objects = [json.loads(answer) for answer in answers]
    assert [each['picture'] for each in objects] == names
    found = [{one['class']: one['probability'] for one in each['classes']} for each in objects]
    assert_probabilities(found, five.expected[1])


def from_stdin(contents, tmp_path):
    """For `before`: code that gives a script these bytes as standard input."""
    path = tmp_path / 'stdin'
    path.write_bytes(contents)
    return f'import os, sys; os.dup2(os.open({str(path)!r}, 0), 0); sys.stdin = open(0)'


def test_names_need_not_be_utf8(start, model, five, tmp_path):
    name = os.fsencode(str(tmp_path)) + b'/gr\xfc\xdfe.png'
    shutil.copy(five.paths[0], name)
    flags = [f'--checkpoint_dir={model.folder}', '--views=1', '-']
    predict = start(PREDICT, *flags, before=from_stdin(name + b'\n', tmp_path))
    assert predict.wait() == 0, predict.stderr
    with open(predict.out, 'rb') as out:
        assert out.read().startswith(name + b': ')


def test_names_that_no_file_can_have_are_named_and_the_others_go_on(start, model, five, tmp_path):
    lines = ['\0', 'a\0b', '', 'a' * 5000, five.paths[0]]
    contents = ''.join(line + '\n' for line in lines).encode()
    flags = [f'--checkpoint_dir={model.folder}', '--batch_size=2', '-']
    predict = start(PREDICT, *flags, before=from_stdin(contents, tmp_path))
    assert predict.wait() == 1
    assert [line.split(':')[0] for line in predict.lines] == [five.paths[0]]
    assert 'Traceback' not in predict.stderr
    assert len(predict.errors) == 4


def test_pictures_that_cannot_be_read_are_named_and_the_others_go_on(start, model, five, tmp_path):
    _, paths, expected = five
    text = tmp_path / 'text.jpg'
    text.write_text('Not a picture.\n')
    missing = str(tmp_path / 'missing.png')
    mixed = [missing, *paths[:2], str(text), paths[2], str(tmp_path), *paths[3:]]
    flags = [f'--checkpoint_dir={model.folder}', '--batch_size=1', '--views=1', '--json']
    predict = start(PREDICT, *flags, *mixed)
    assert predict.wait() == 1
    seen, found = parse(predict)
    assert seen == paths
    assert_probabilities(found, expected[1])
    assert predict.errors[0] == f'{missing}: No such file or directory'
    assert re.match(rf'{re.escape(str(text))}: \S', predict.errors[1])
    assert predict.errors[2] == f'{tmp_path}: Is a directory'
    assert len(predict.errors) == 3


# --- No picture at all -------------------------------------------------------


def encode(kind, size=(20, 10), mode='RGB'):
    contents = io.BytesIO()
    mosaic(size[1], size[0]).convert(mode).save(contents, kind)
    return contents.getvalue()


def huge_bitmap(mode, height=30000):
    data = bytearray(encode('BMP', mode=mode))
    data[18:26] = struct.pack('<ii', 30000, height)
    return bytes(data)


# tests/soak/fuzz.py knows many more.
NASTY = collections.OrderedDict(
    [
        ('zero bytes', b''),
        ('text', b'Hello,\nworld.\n\n[[\n'),
        ('huge BMP', huge_bitmap('RGB')),
        ('huge BMP, palette', huge_bitmap('P')),
        ('truncated PNG', encode('PNG')[:-30]),
        ('truncated JPEG', encode('JPEG')[:500]),
        ('truncated GIF', encode('GIF', mode='P')[:-30]),
        ('truncated BMP', encode('BMP')[:-30]),
        ('truncated BMP, palette', encode('BMP', mode='P')[:300]),
        ('BMP signature', b'BM'),
        ('BMP signature and noise', b'BM\xff\xfe\x80' + bytes(range(128, 150))),
        ('BMP signature and new lines', b'BM\n\n \n[[\n\n'),
        ('GIF signature and noise', b'GIF\xff\xfe\x80'),
    ]
)


def test_what_is_no_picture_is_named_in_a_line_each_and_crashes_nothing(
    start, model, five, tmp_path
):
    names = []
    for name, contents in NASTY.items():
        names.append(str(tmp_path / name))
        (tmp_path / name).write_bytes(contents)
    flags = [f'--checkpoint_dir={model.folder}', '--views=1']
    predict = start(PREDICT, *flags, *names, five.paths[0])
    assert predict.wait() == 1, predict.stderr
    assert [line.split(':')[0] for line in predict.lines] == [five.paths[0]]
    # The library for JPEG has something to say of its own.
    lines = [line for line in predict.errors if 'JPEG library' not in line]
    assert [line.split(': ')[0] for line in lines] == names
    assert all(re.match(r'[^:]+: \S', line) for line in lines)


# --- Errors of the user ------------------------------------------------------


def test_without_a_picture_it_shows_its_usage(start, model):
    predict = start(PREDICT, f'--checkpoint_dir={model.folder}')
    assert predict.wait() == 1
    assert 'python cifar10_predict.py cat.jpg dog.png' in predict.stdout + predict.stderr
    assert 'name pictures, or -' in predict.stdout + predict.stderr
    assert 'Traceback' not in predict.stderr


def test_without_a_checkpoint_it_says_so_in_one_line(start, five, tmp_path):
    predict = start(PREDICT, f'--checkpoint_dir={tmp_path}', five.paths[0])
    assert predict.wait() == 1
    assert predict.stdout == ''
    assert len(predict.errors) == 1
    assert f'no checkpoint in {tmp_path}' in predict.errors[0]


def test_another_number_of_classes_than_the_names_say_is_a_message(start, model, five, tmp_path):
    values = reference.checkpoint_values(3, model.averages, model.averages)
    started = []
    for num_classes, names in (10, None), (2, 'cat\ndog\n'):  # CIFAR-10's, or those in a file.
        folder = tmp_path / str(num_classes)
        path = reference.write_checkpoint(folder, 3, values)
        if names:
            (folder / 'batches.meta.txt').write_text(names)
        predict = start(PREDICT, f'--checkpoint_dir={folder}', five.paths[0])
        started.append((num_classes, path, predict))
    for num_classes, path, predict in started:
        assert predict.wait() == 1
        assert predict.stdout == ''
        assert len(predict.errors) == 1
        assert predict.errors[0].startswith(f'cifar10_predict.py: cannot use {path}: ')
        assert 'batches.meta.txt' in predict.errors[0]
        assert re.search(rf'\[7\].*not.*\[{num_classes}\]', predict.errors[0])
