"""Tests of support/pictures.py and cifar10_predict.py, against Pillow and NumPy."""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

import cifar10_predict
from support import dataset, devices, pictures, script
from tests import harness, reference

PREDICT = 'cifar10_predict.py'
RESULTS = os.path.join(harness.FOLDER, 'results')

SIZES = [(32, 32), (61, 203), (204, 61), (31, 47), (5, 3), (1, 1)]


def mosaic(height, width, seed=0):
    """A Pillow image of coloured tiles."""
    tiles = np.random.RandomState(seed).randint(0, 256, [height // 7 + 1, width // 7 + 1, 3])
    return Image.fromarray(tiles.astype(np.uint8)).resize((width, height), Image.NEAREST)


def scaled(image):
    """The largest central square, scaled by Pillow, [32, 32, 3]."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.convert('RGB').crop((left, top, left + side, top + side))
    return np.asarray(square.resize((32, 32), Image.BILINEAR))


def assert_similar(image, expected, mean=0.3):
    """Within one grey level, and less on average."""
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    difference = np.abs(image.astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() <= mean


def read(*paths):
    """The images of readable files."""
    [results] = pictures.read(map(str, paths), 32, len(paths))
    assert [problem for _, _, problem in results] == [None] * len(paths)
    return [image for _, image, _ in results]


def read_one(path):
    return read(path)[0]


def problem_of(path):
    [[(_, image, problem)]] = pictures.read([str(path)], 32, 1)
    assert image is None
    assert re.match(r'[^\n]*\S[^\n]*$', problem), 'not one line'
    return problem


# --- Formats -------------------------------------------------------------------


def with_alpha(image):
    image = image.copy()
    image.putalpha(Image.effect_noise(image.size, 200))
    return image


def palette(image, colors=256):
    return image.convert('P', palette=Image.ADAPTIVE, colors=colors)


KINDS = {
    'RGB.png': lambda image: image,
    'RGBA.png': with_alpha,
    'grey with alpha.png': lambda image: with_alpha(image.convert('L')),
    'palette.png': palette,
    'black and white.png': lambda image: image.convert('1'),
    'RGB.bmp': lambda image: image,
    'black and white.bmp': lambda image: image.convert('1'),
    'palette.gif': palette,
    'RGBA.webp': with_alpha,
    'grey.jpg': lambda image: image.convert('L'),
    'CMYK.jpg': lambda image: image.convert('CMYK'),
}


@pytest.mark.parametrize('kind', KINDS)
def test_picture_is_what_pillow_reads(tmp_path, kind):
    options = {'webp': dict(lossless=True, exact=True), 'jpg': dict(progressive=True)}
    for height, width in SIZES:
        image, path = KINDS[kind](mosaic(height, width)), str(tmp_path / kind)
        image.save(path, **options.get(kind.split('.')[1], {}))
        image = Image.open(path) if kind.endswith('jpg') else image
        assert_similar(read_one(path), scaled(image))


def test_16_bit_grey_becomes_8_bit(tmp_path):
    grey = mosaic(61, 203).convert('L')
    low = np.random.RandomState(1).randint(0, 128, [61, 203])
    pixels = (np.asarray(grey).astype(int) * 256 + low).astype(np.uint16)
    Image.fromarray(pixels).save(str(tmp_path / 'x.png'))
    assert_similar(read_one(tmp_path / 'x.png'), scaled(grey), mean=0.6)


def test_first_frame_of_an_animation_is_used(tmp_path):
    frames = [palette(mosaic(48, 90, seed), 64) for seed in range(4)]
    for kind in 'gif', 'webp':
        path = str(tmp_path / kind)  # The contents decide about the format, not the name.
        frames[2].save(path, kind, save_all=True, append_images=frames[:2], lossless=True)
        assert Image.open(path).n_frames == 3
        assert_similar(read_one(path), scaled(frames[2]))


@pytest.mark.parametrize('kind', ['png', 'webp', 'jpg'])
def test_exif_orientation_is_applied(tmp_path, kind):
    upright = mosaic(48, 96)
    options = dict(quality=100, subsampling=0) if kind == 'jpg' else dict(lossless=True)
    # How a camera that was held this way stores an upright picture.
    for orientation, stored in (2, Image.FLIP_LEFT_RIGHT), (6, Image.ROTATE_90):
        exif = Image.Exif()
        exif[0x112] = orientation
        upright.transpose(stored).save(str(tmp_path / f'x.{kind}'), exif=exif, **options)
        image = read_one(tmp_path / f'x.{kind}').astype(int)
        assert np.abs(image - scaled(upright)).mean() < (3 if kind == 'jpg' else 0.3)


def test_damaged_exif_is_ignored(tmp_path):
    for exif in b'junk', b'Exif\0\0junk', b'Exif\0\0II*\0\xff\xff\xff\xff':
        mosaic(40, 70).save(str(tmp_path / 'x.png'), exif=exif)
        assert_similar(read_one(tmp_path / 'x.png'), scaled(mosaic(40, 70)))


# --- Files that are no pictures --------------------------------------------------


def encode(kind, size=(20, 10), mode='RGB'):
    contents = io.BytesIO()
    mosaic(size[1], size[0]).convert(mode).save(contents, kind)
    return contents.getvalue()


def with_size(contents, offset, layout, width, height):
    return contents[:offset] + struct.pack(layout, width, height) + contents[offset + 8 :]


NO_PICTURES = {
    'empty': b'',
    'text': b'Hello,\nworld.\n\n[[\n',
    'truncated PNG': encode('PNG')[:-30],
    'truncated JPEG': encode('JPEG', (90, 90))[:900],
    'truncated GIF': encode('GIF', mode='P')[:-30],
    'truncated BMP': encode('BMP')[:-30],
    'truncated WebP': encode('WEBP', (90, 90))[:200],
    'GIF signature': b'GIF\xff\xfe\x80',
    'TIFF': encode('TIFF'),
    'huge BMP': with_size(encode('BMP'), 18, '<ii', 30000, 30000),
    'huge PNG': with_size(encode('PNG'), 16, '>ii', 2**31 - 1, 2**31 - 1),
}


def test_file_that_is_no_picture_gets_a_reason(tmp_path):
    for name, contents in NO_PICTURES.items():
        (tmp_path / name).write_bytes(contents)
        problem_of(tmp_path / name)


def test_number_of_pixels_and_bytes_is_limited(tmp_path, monkeypatch):
    path = tmp_path / 'x.png'
    for side in 9000, 20000:
        Image.new('1', (side, side)).save(str(path))
        assert os.path.getsize(str(path)) < 100000
        assert str(pictures.MAX_PIXELS) in problem_of(path)
    mosaic(40, 70).save(str(path))
    for limit, is_read in (2799, False), (2800, True):
        monkeypatch.setattr(pictures, 'MAX_PIXELS', limit)
        (read_one if is_read else problem_of)(path)
    os.truncate(str(path), pictures.MAX_FILE_BYTES + 1)
    assert str(pictures.MAX_FILE_BYTES) in problem_of(path)


def test_only_large_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    def transpose(picture):
        alone.append(pictures._decoding_large.locked())
        return picture

    mosaic(40, 70).save(str(tmp_path / 'x.png'))
    monkeypatch.setattr(pictures.ImageOps, 'exif_transpose', transpose)
    for limit, expected in (2800, False), (2799, True):
        alone = []
        monkeypatch.setattr(pictures, 'LARGE_PIXELS', limit)
        read(*[tmp_path / 'x.png'] * 3)
        assert alone == [expected] * 3


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(str(tmp_path / 'fifo'))
    for path in tmp_path / 'fifo', tmp_path, '/dev/zero', '/dev/stdin':
        assert problem_of(path) == 'not a regular file'
    for name in str(tmp_path / 'missing'), '', 'a\0b', 'a' * 5000:
        problem_of(name)


# --- Many pictures ---------------------------------------------------------------


def test_pictures_come_in_order_in_lists(tmp_path):
    paths = [str(tmp_path / f'{i}.png') for i in range(7)]
    images = [mosaic(200 - 25 * i, 40 + 60 * (i % 3), seed=i) for i in range(7)]
    for path, image in zip(paths, images):
        image.save(path)
    os.remove(paths[4])
    sources = [np.asarray(images[2]) if i == 2 else path for i, path in enumerate(paths)]
    lists = list(pictures.read(sources, 32, 3))
    assert [len(some) for some in lists] == [3, 3, 1]
    results = [result for some in lists for result in some]
    for i, (source, image, problem) in enumerate(results):
        assert source is sources[i]
        assert (image is None) == (problem is not None) == (i == 4)
        if image is not None:
            assert_similar(image, scaled(images[i]))


def test_no_more_pictures_are_taken_than_asked_for():
    taken = []
    lists = pictures.read((taken.append(i) or '' for i in range(99)), 32, 4)
    for expected in 4, 8:
        assert len(next(lists)) == 4 and len(taken) == expected
    lists.close()
    assert len(taken) == 8


# --- Predictions -----------------------------------------------------------------


@pytest.fixture
def predict(seven_classes, capsys):
    """Function that predicts in this process. Returns the status, stdout and stderr, as lines."""

    def run(*names, **values):
        harness.set_flags(**dict(dict(checkpoint_dir=seven_classes.folder, views='1'), **values))
        status = cifar10_predict.main([PREDICT, *map(str, names)])
        output = capsys.readouterr()
        return status, output.out.splitlines(), output.err.splitlines()

    return run


@pytest.fixture(scope='session')
def images():
    return reference.rectangle_images(5)


@pytest.fixture
def paths(images, tmp_path):
    """Files with the images, in no alphabetical order."""
    found = [str(tmp_path / f'{name}.png') for name in 'ebdac']
    for path, image in zip(found, images):
        Image.fromarray(image).save(path)
    return found


def assert_json(lines, paths, names, expected):
    """The lines have all classes of each picture, most probable first."""
    objects = [json.loads(line) for line in lines]
    assert [each['picture'] for each in objects] == paths
    for each, row in zip(objects, expected):
        order = np.argsort(-row)
        assert [one['class'] for one in each['classes']] == [names[i] for i in order]
        values = [one['probability'] for one in each['classes']]
        np.testing.assert_allclose(values, row[order], atol=2e-5)


@pytest.mark.parametrize('views, batch_size', [('1', 128), ('10', 128), ('10', 2)])
def test_probabilities_are_those_of_numpy(predict, seven_classes, images, paths, views, batch_size):
    status, lines, errors = predict(*paths, views=views, batch_size=batch_size, json=True)
    assert (status, errors) == (0, [])
    expected = reference.probabilities(seven_classes.averages, images, int(views))
    assert len(set(expected.argmax(axis=1))) > 1
    assert_json(lines, paths, seven_classes.names, expected)


def test_variables_are_chosen_by_flags(predict, seven_classes, images, paths):
    other = dict(json=True, use_moving_averages=False)
    expected = reference.probabilities(seven_classes.raw, images, 1)
    assert_json(predict(*paths, **other)[1], paths, seven_classes.names, expected)
    single = dict(checkpoint_dir=seven_classes.folder + '/model.ckpt-5', use_moving_averages=True)
    expected = reference.probabilities(reference.variables_of_seven_classes(3), images, 1)
    lines = predict(*paths, json=True, **single)[1]
    assert_json(lines, paths, seven_classes.names, expected)


def test_top_k_classes_are_printed(predict, seven_classes, images, paths):
    _, lines, _ = predict(*paths, top_k=2)
    expected = reference.probabilities(seven_classes.averages, images, 1)
    for line, path, row in zip(lines, paths, expected):
        first, second = [seven_classes.names[i] for i in row.argsort()[-2:][::-1]]
        printed = re.match(f'{path}: {first} (\\S+), {second} (\\S+)$', line).groups()
        np.testing.assert_allclose(np.float64(printed), np.sort(row)[:-3:-1], atol=0.0051)


def test_unreadable_pictures_are_named_and_the_others_classified(predict, paths, tmp_path):
    missing, folder = str(tmp_path / 'missing.png'), str(tmp_path)
    for batch_size in 1, 128:
        mixed = [missing, *paths[:2], folder, *paths[2:]]
        status, lines, errors = predict(*mixed, batch_size=batch_size)
        assert status == 1
        assert [line.split(': ')[0] for line in lines] == paths
        assert [line.split(': ')[0] for line in errors] == [missing, folder]
    assert predict(missing)[:2] == (1, [])


def test_names_are_escaped_but_exact_in_json(predict, seven_classes, paths, tmp_path):
    names = [os.fsencode(str(tmp_path)) + name for name in (b'/gr\xfc\xdfe.png', b'/\x1b[31m.png')]
    for name in names:
        shutil.copy(paths[0], name)
    decoded = [os.fsdecode(name) for name in names]
    _, lines, errors = predict(*decoded, str(tmp_path / '\x1b[2J'))
    escaped = ['gr\\udcfc\\udcdfe.png: ', '\\x1b[31m.png: ', '\\x1b[2J: ']
    assert all(f'{tmp_path}/{name}' in line for name, line in zip(escaped, lines + errors))
    _, lines, _ = predict(*decoded, json=True)
    assert [os.fsencode(json.loads(line)['picture']) for line in lines] == names


def test_use_fp16_is_honoured(predict, paths, monkeypatch):
    asked, session_config = [], devices.session_config
    monkeypatch.setattr(
        devices, 'session_config', lambda on: asked.append(on) or session_config(on)
    )
    for use_fp16 in True, False:
        assert len(predict(*paths, use_fp16=use_fp16)[2]) == use_fp16
        assert asked.pop() == use_fp16


# --- User errors -----------------------------------------------------------------


def test_missing_checkpoint_is_an_error(predict, paths, tmp_path):
    for place in tmp_path, tmp_path / 'model.ckpt-7':
        with pytest.raises(script.UserError, match=str(place)):
            predict(*paths, checkpoint_dir=str(place))


@pytest.mark.parametrize('names', [None, ['cat', 'dog']])
def test_wrong_number_of_class_names_is_an_error(predict, seven_classes, paths, tmp_path, names):
    values = reference.read_checkpoint(seven_classes.folder + '/model.ckpt-5')
    reference.write_checkpoint(tmp_path, 5, values)
    if names:
        dataset.write_class_names(str(tmp_path), names)
    parts = f'7 classes.* {len(names or dataset.CLASS_NAMES)} names.*{tmp_path}/batches.meta.txt'
    with pytest.raises(script.UserError, match=parts):
        predict(*paths, checkpoint_dir=str(tmp_path))


# --- The script ------------------------------------------------------------------


def test_fresh_clone_classifies_with_the_published_model(start, tmp_path):
    mosaic(300, 451).save(str(tmp_path / 'my cat.png'))
    results = sorted(os.listdir(RESULTS))
    chdir = f'import os; os.chdir({str(tmp_path)!r})'
    predict = start(PREDICT, f'--data_dir={tmp_path}/nowhere/data', 'my cat.png', before=chdir)
    assert (predict.wait(), predict.errors) == (0, [])
    values = reference.read_checkpoint(f'{RESULTS}/model.ckpt-150000')
    averages = {name: values[name + reference.AVERAGE] for name in reference.MODEL}
    image = read_one(tmp_path / 'my cat.png')
    [row] = reference.probabilities(averages, image[np.newaxis], 10)
    best = [f'{dataset.CLASS_NAMES[i]} {row[i]:.2f}' for i in np.argsort(-row)[:3]]
    assert predict.lines == [f'my cat.png: {", ".join(best)}']
    assert os.listdir(str(tmp_path)) == ['my cat.png']
    assert sorted(os.listdir(RESULTS)) == results


def test_names_from_stdin_are_answered_at_once(seven_classes, images, tmp_path):
    names = ['a b.png', 'ü,:.png', '-x.png']
    for image, name in zip(images, names):
        Image.fromarray(image).save(str(tmp_path / name))
    flags = f'--checkpoint_dir={seven_classes.folder}', '--batch_size=1', '--top_k=7', '-'
    process = subprocess.Popen(
        [sys.executable, os.path.join(harness.FOLDER, PREDICT), *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=harness.ascii_only(),
        cwd=str(tmp_path),
    )
    for name, printed in zip(names, ['a b.png', '\\udcc3\\udcbc,:.png', '-x.png']):
        process.stdin.write(f'{name}\n'.encode())
        process.stdin.flush()
        line = process.stdout.readline().decode('ascii')
        assert line.startswith(printed + ': ') and 'B\\xe4r' in line
    rest, _ = process.communicate()
    assert (process.returncode, rest) == (0, b'')
