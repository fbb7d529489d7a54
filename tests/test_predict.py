"""Tests of support/pictures.py and cifar10_predict.py, against Pillow and NumPy."""

import json
import os
import re
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

import cifar10_predict
from support import dataset, devices, pictures, script
from tests import harness, reference

PREDICT = 'cifar10_predict.py'
RESULTS = f'{harness.FOLDER}/results'
IMAGES = reference.rectangle_images(5)


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


def read(path):
    """The image in a file, or the reason why it cannot be read."""
    [[(_, image, problem)]] = pictures.read([str(path)], 32, 1)
    return image if problem is None else problem


@pytest.mark.parametrize(
    'mode, kind, options',
    [
        ('RGBA', 'png', {}),
        ('P', 'png', {}),
        ('1', 'bmp', {}),
        ('P', 'gif', dict(save_all=True)),
        ('RGBA', 'webp', dict(lossless=True, exact=True)),
        ('RGB', 'webp', dict(lossless=True, save_all=True)),
        ('L', 'jpeg', dict(progressive=True)),
        ('CMYK', 'jpeg', {}),
    ],
)
def test_picture_is_what_pillow_reads(tmp_path, mode, kind, options):
    path = str(tmp_path / 'picture')  # The contents decide about the format, not the name.
    for height, width in (32, 32), (61, 203), (204, 61), (31, 47), (5, 3), (1, 1):
        image = mosaic(height, width).convert(mode)
        if mode == 'RGBA':
            image.putalpha(Image.effect_noise(image.size, 200))
        if 'save_all' in options:  # An animation, of which the first frame counts.
            options = dict(options, append_images=[mosaic(height, width, seed=1).convert(mode)])
        image.save(path, kind, **options)
        assert_similar(read(path), scaled(Image.open(path) if kind == 'jpeg' else image))


def test_16_bit_grey_becomes_8_bit(tmp_path):
    grey = mosaic(61, 203).convert('L')
    low = np.random.RandomState(1).randint(0, 128, [61, 203])
    pixels = (np.asarray(grey).astype(int) * 256 + low).astype(np.uint16)
    Image.fromarray(pixels).save(str(tmp_path / 'x.png'))
    assert_similar(read(tmp_path / 'x.png'), scaled(grey), mean=0.6)


def test_exif_orientation_is_applied(tmp_path):
    upright, path = mosaic(48, 96), str(tmp_path / 'x.png')
    exif = Image.Exif()
    exif[0x112] = 6  # How a camera that was held this way stores an upright picture.
    upright.transpose(Image.ROTATE_90).save(path, exif=exif)
    assert_similar(read(path), scaled(upright))
    upright.save(path, exif=b'Exif\0\0junk')
    assert_similar(read(path), scaled(upright))


def test_unreadable_files_get_a_reason(tmp_path):
    path, one_line = tmp_path / 'x', r'[^\n]*\S[^\n]*$'
    for contents in b'', b'Hello,\nworld.\n\n[[\n', b'GIF\xff\xfe\x80':
        path.write_bytes(contents)
        assert re.match(one_line, read(path))
    for kind, spoil in ('png', True), ('jpeg', True), ('tiff', False):
        mosaic(90, 90).save(str(path), kind)
        if spoil:
            harness.cut_in_half(path)
        assert re.match(one_line, read(path))
    os.mkfifo(str(tmp_path / 'fifo'))
    for path in tmp_path / 'fifo', tmp_path, '/dev/zero':
        assert read(path) == 'not a regular file'
    assert read(tmp_path / 'missing') == 'No such file or directory'
    assert 'null' in read('a\0b')


def test_number_of_pixels_and_bytes_is_limited(tmp_path, monkeypatch):
    path = tmp_path / 'x.png'
    mosaic(40, 70).save(str(path))
    monkeypatch.setattr(pictures, 'MAX_PIXELS', 2799)
    assert '2799' in read(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)  # Above twice that, Pillow gives up.
    assert '2799' in read(path)
    os.truncate(str(path), pictures.MAX_FILE_BYTES + 1)
    assert str(pictures.MAX_FILE_BYTES) in read(path)


def test_only_large_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    def transpose(picture):
        alone.append(pictures._decoding_large.locked())
        return picture

    mosaic(40, 70).save(str(tmp_path / 'x.png'))
    monkeypatch.setattr(pictures.ImageOps, 'exif_transpose', transpose)
    for limit, expected in (2800, False), (2799, True):
        alone = []
        monkeypatch.setattr(pictures, 'LARGE_PIXELS', limit)
        list(pictures.read([str(tmp_path / 'x.png')] * 3, 32, 3))
        assert alone == [expected] * 3


def test_pictures_come_in_order_in_lists_and_no_more_are_taken(tmp_path):
    images = [mosaic(200 - 25 * i, 40 + 60 * (i % 3), seed=i) for i in range(7)]
    sources = [str(tmp_path / f'{i}.png') for i in range(7)]
    for source, image in zip(sources, images):
        image.save(source)
    os.remove(sources[4])
    sources[2] = np.asarray(images[2])
    taken, results = [], []
    lists = pictures.read((taken.append(source) or source for source in sources), 32, 3)
    for total in 3, 6, 7:
        results += next(lists)
        assert len(results) == len(taken) == total
    assert list(lists) == [] and results[4][1] is None and results[4][2]
    assert all(result[0] is source for result, source in zip(results, sources))
    for i in set(range(7)) - {4}:
        assert_similar(results[i][1], scaled(images[i]))
        assert results[i][2] is None


@pytest.fixture
def predict(seven_classes, capsys):
    """Function that predicts without data. Returns the status, stdout and stderr, as lines."""

    def run(*names, **values):
        defaults = dict(checkpoint_dir=seven_classes.folder, views='1', data_dir='/nowhere')
        harness.set_flags(**dict(defaults, **values))
        status = cifar10_predict.main([PREDICT, *map(str, names)])
        output = capsys.readouterr()
        return status, output.out.splitlines(), output.err.splitlines()

    return run


@pytest.fixture
def paths(tmp_path):
    """Files with the images, in no alphabetical order. One name is no UTF-8."""
    found = [str(tmp_path / f'{name}.png') for name in ('e', 'b', 'gr\udcfc\udcdf', 'a', 'c')]
    for path, image in zip(found, IMAGES):
        Image.fromarray(image).save(path)
    return found


@pytest.mark.parametrize(
    'given, used, averages, views',
    [
        ('SEVEN', 'SEVEN/model.ckpt-1000', True, 1),
        ('SEVEN', 'SEVEN/model.ckpt-1000', False, 10),
        ('SEVEN/model.ckpt-5', 'SEVEN/model.ckpt-5', True, 1),
        (RESULTS, f'{RESULTS}/model.ckpt-150000', True, 10),
    ],
)
def test_probabilities_are_those_of_numpy(
    predict, seven_classes, paths, given, used, averages, views
):
    given, used = [path.replace('SEVEN', seven_classes.folder) for path in (given, used)]
    flags = dict(checkpoint_dir=given, use_moving_averages=averages, views=str(views))
    status, lines, errors = predict(*paths, json=True, batch_size=2, **flags)
    assert (status, errors) == (0, [])
    names = seven_classes.names if given != RESULTS else dataset.CLASS_NAMES
    values, suffix = reference.read_checkpoint(used), reference.AVERAGE if averages else ''
    variables = {name: values[name + suffix] for name in reference.MODEL}
    for path, line, row in zip(paths, lines, reference.probabilities(variables, IMAGES, views)):
        found, order = json.loads(line), np.argsort(-row)
        assert found['picture'] == path
        assert [each['class'] for each in found['classes']] == [names[i] for i in order]
        probabilities = [each['probability'] for each in found['classes']]
        np.testing.assert_allclose(probabilities, row[order], atol=2e-5)


@pytest.mark.parametrize('batch_size, use_fp16', [(1, False), (128, True)])
def test_lines_have_top_k_classes_or_the_error(
    predict, seven_classes, paths, tmp_path, monkeypatch, batch_size, use_fp16
):
    asked, session_config = [], devices.session_config
    monkeypatch.setattr(
        devices, 'session_config', lambda on: asked.append(on) or session_config(on)
    )
    mixed = ['\x1b[2J', *paths[:2], tmp_path, *paths[2:]]
    status, lines, errors = predict(*mixed, top_k=2, batch_size=batch_size, use_fp16=use_fp16)
    assert (status, asked, len(lines), len(errors)) == (1, [use_fp16], 5, 2 + use_fp16)
    assert [line.split(': ')[0] for line in errors[-2:]] == ['\\x1b[2J', str(tmp_path)]
    expected = reference.probabilities(seven_classes.averages, IMAGES, 1)
    tolerance = 0.03 if use_fp16 else 0.0051
    for line, path, row in zip(lines, paths, expected):
        first, second = [seven_classes.names[i] for i in row.argsort()[-2:][::-1]]
        pattern = f'{re.escape(script.printable(path))}: {first} (\\S+), {second} (\\S+)$'
        printed = re.match(pattern, line).groups()
        np.testing.assert_allclose(np.float64(printed), np.sort(row)[:-3:-1], atol=tolerance)


def test_wrong_number_of_class_names_is_an_error(predict, seven_classes, paths, tmp_path):
    values = reference.read_checkpoint(seven_classes.folder + '/model.ckpt-5')
    reference.write_checkpoint(tmp_path, 5, values)
    pattern = f'7 classes.* 10 names.*{tmp_path}/batches.meta.txt'
    with pytest.raises(script.UserError, match=pattern):
        predict(*paths, checkpoint_dir=str(tmp_path))


def test_names_from_stdin_are_answered_at_once(seven_classes, tmp_path):
    flags = f'--checkpoint_dir={seven_classes.folder}', '--batch_size=1', '--top_k=7', '-'
    process = subprocess.Popen(
        [sys.executable, os.path.join(harness.FOLDER, PREDICT), *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=harness.ascii_only(),
        cwd=str(tmp_path),
    )
    for name, printed in ('ü,:.png', '\\udcc3\\udcbc,:.png'), ('-a \x1b.png', '-a \\x1b.png'):
        Image.fromarray(IMAGES[0]).save(str(tmp_path / name))
        process.stdin.write(f'{name}\n'.encode())
        process.stdin.flush()
        line = process.stdout.readline().decode('ascii')
        assert line.startswith(printed + ': ') and 'B\\xe4r' in line
    rest, _ = process.communicate()
    assert (process.returncode, rest) == (0, b'')
