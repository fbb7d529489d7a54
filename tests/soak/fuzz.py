"""Feeds malformed files to whatever decodes some: 9,000 cases in some minutes.

    python tests/soak/fuzz.py                              3,000 cases of each kind
    python tests/soak/fuzz.py --quick                      300 of each kind
    python tests/soak/fuzz.py --kinds=records --only=17    one case, with its traceback

The kinds are data files, the files of a folder of checkpoints, and pictures. A case is
made from its number alone. None may end in anything but the error that is meant for users: no
other exception, no crash, no hang of half a minute, and above all no success with
wrong data, which is why each kind has a second opinion of its own on what is valid.
"""

import argparse
import contextlib
import faulthandler
import functools
import io
import os
import random
import struct
import subprocess
import sys
import tempfile
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import cifar10_input
from support import checkpoints, dataset, pictures, script
from tests import reference

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf

HANG_SECS = 30
RECORD_BYTES = 3073


def mangle(data, chance):
    """The bytes with one to four random changes, possibly to the same bytes again."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        how = chance.choice(['flip', 'set', 'cut', 'insert', 'drop', 'double'])
        if how == 'flip' and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif how == 'set' and at < len(data):
            data[at] = chance.choice([0, 9, 10, 127, 128, 255])
        elif how == 'cut':
            del data[at:]
        elif how == 'insert':
            data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 9)))
        elif how == 'drop':
            del data[at : at + chance.choice([1, 2, 9, RECORD_BYTES])]
        elif how == 'double':
            data[at:at] = data[at : at + chance.choice([1, 4, RECORD_BYTES])]
    return bytes(data)


def write(path, data):
    with open(path, 'wb') as file:
        file.write(data)


# --- Data files ----------------------------------------------------------------


def fuzz_records(chance, scratch):
    """Six data files of the user's own, one or two of them changed. Returns: are they valid?"""
    folder = os.path.join(scratch, reference.DATA_FOLDER)
    os.makedirs(folder)
    contents = {}
    for name in reference.DATA_FILES:
        count = chance.randint(1, 3)
        images = reference.random_images(count, seed=chance.randrange(1 << 30))
        labels = [chance.randrange(10) for _ in range(count)]
        contents[name] = reference.records(images, labels)
    for name in chance.sample(reference.DATA_FILES, chance.randint(1, 2)):
        how = chance.choice(['mangle', 'mangle', 'label', 'pixel', 'remove'])
        if how == 'mangle':
            contents[name] = mangle(contents[name], chance)
        elif how == 'remove':
            contents[name] = None
        else:
            changed = bytearray(contents[name])
            record = chance.randrange(len(changed) // RECORD_BYTES) * RECORD_BYTES
            place = 0 if how == 'label' else chance.randrange(1, RECORD_BYTES)
            changed[record + place] = chance.randrange(256)
            contents[name] = bytes(changed)
    for name, content in contents.items():
        if content is not None:
            write(os.path.join(folder, name), content)

    wrong = [
        name
        for name, content in contents.items()
        if not content or len(content) % RECORD_BYTES or max(content[::RECORD_BYTES]) > 9
    ]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            dataset.maybe_download_and_extract(scratch, 'file:///nowhere', RECORD_BYTES, 10)
    except script.UserError as error:
        assert wrong, f'refused without need: {error}'
        assert any(name in str(error) for name in wrong), f'not named: {error}'
        assert len(str(error).splitlines()) == 1
        return False
    assert not wrong, f'accepted {wrong}'
    if chance.random() < 0.1:  # It takes some time.
        check_decoding(folder, b''.join(contents[name] for name in reference.TRAINING_FILES))
    return True


def check_decoding(folder, expected):
    """Do labels and sums of pixels come out of the graph as they are in the files?"""
    expected = np.frombuffer(expected, np.uint8).reshape(-1, RECORD_BYTES)
    with tf.Graph().as_default(), tf.Session() as session:
        files = cifar10_input.data_files(False, folder)
        queue = tf.train.string_input_producer(files, num_epochs=1)
        record = cifar10_input.read_cifar10(queue, 2)
        session.run(tf.local_variables_initializer())
        coordinator = tf.train.Coordinator()
        threads = tf.train.start_queue_runners(session, coordinator)
        seen = []
        with contextlib.suppress(tf.errors.OutOfRangeError):
            while True:
                labels, images = session.run([record.label, record.uint8image])
                seen += zip(labels[:, 0].tolist(), images.sum(axis=(1, 2, 3), dtype=int).tolist())
        coordinator.request_stop()
        coordinator.join(threads)
    sums = expected[:, 1:].sum(axis=1, dtype=int)
    assert sorted(seen) == sorted(zip(expected[:, 0].tolist(), sums.tolist()))


# --- Checkpoints -----------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def sound_checkpoints():
    """Two small checkpoints: dict of step -> values, dict of file name -> contents, graph."""
    values, files, graph = {}, {}, tf.Graph()
    with tempfile.TemporaryDirectory() as folder:
        for step in 7, 12:
            values[step] = {'global_step': np.int64(step)}
            for name in 'conv1/biases', 'conv2/biases', 'local4/biases':
                values[step][name] = np.random.RandomState(step).randn(64).astype(np.float32)
            reference.write_checkpoint(folder, step, values[step])
        for name in os.listdir(folder):
            with open(os.path.join(folder, name), 'rb') as file:
                files[name] = file.read()
    files.update({f'model.ckpt-{step}.meta': b'not read' for step in values})
    files.update(checkpoint=b'model_checkpoint_path: "model.ckpt-12"\n', finished=b'12\n')
    with graph.as_default():
        for name, value in values[7].items():
            tf.get_variable(name, initializer=value)
    return values, files, graph


def fuzz_checkpoints(chance, scratch):
    """Two checkpoints, a state file and a mark, with up to three files changed.

    Returns: is a checkpoint usable?
    """
    values, sound, graph = sound_checkpoints()
    files, changed = dict(sound), chance.choices(sorted(sound), k=chance.randint(1, 3))
    for name in changed:
        how = chance.choice(['mangle', 'mangle', 'noise', 'empty', 'other', 'remove'])
        if how == 'mangle':
            files[name] = mangle(sound[name], chance)
        elif how == 'noise':
            files[name] = bytes(chance.randrange(256) for _ in range(chance.randrange(400)))
        elif how == 'other':
            files[name] = sound[chance.choice(sorted(sound))]
        else:
            files[name] = b'' if how == 'empty' else None
    for name in 'model.ckpt-%s.index', 'model.ckpt-%s', '%s.index', 'model.ckpt-%s.tempstate1':
        if chance.random() < 0.2:
            files[name % chance.choice(['', '-1', '1e3', '٣', '9' * 30, '0012', 'a b'])] = b'x'
    for name, content in files.items():
        if content is not None:
            write(os.path.join(scratch, name), content)

    step = checkpoints.finished_step(scratch)
    assert step is None or isinstance(step, int)
    assert step == 12 or 'finished' in changed
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            path = checkpoints.newest(scratch)
    except script.UserError as error:
        assert len(str(error).splitlines()) == 1
        path = None
    intact = [step for step in values if not any(f'ckpt-{step}.' in name for name in changed)]
    if not intact and path is None:
        return False
    found = reference.read_checkpoint(path)
    assert checkpoints.step_of(path) in values and checkpoints.step_of(path) >= max([0, *intact])
    # A file of the other checkpoint may stand under this one's name: all of it, then.
    assert any(
        found.keys() == each.keys()
        and all(np.array_equal(found[name], each[name]) for name in each)
        for each in values.values()
    ), 'wrong values were taken for good'

    max_to_keep = chance.choice([0, 1, 2, 5])
    with graph.as_default():
        checkpoints.choose(path, max_to_keep)
    assert tf.train.latest_checkpoint(scratch) == path
    listed = tf.train.get_checkpoint_state(scratch).all_model_checkpoint_paths
    steps = [checkpoints.step_of(each) for each in listed]
    assert steps == sorted(steps) and listed[-1] == path
    assert len(listed) <= (max_to_keep or len(files))
    return True


# --- Pictures ----------------------------------------------------------------------

# Each with the grey levels by which a decoder may differ from Pillow: at most, on average.
PICTURES = {
    'PNG': (['RGB', 'RGBA', 'L', 'LA', 'P', '1', 'I;16'], 1, 0.6),
    'BMP': (['RGB', 'RGBA', 'L', 'P'], 1, 0.6),
    'GIF': (['P', 'L', 'animated'], 1, 0.6),
    'JPEG': (['RGB', 'L', 'CMYK'], 40, 6),
}
HUGE = 30000


def encode(image, kind, **options):
    contents = io.BytesIO()
    image.save(contents, kind, **options)
    return contents.getvalue()


def mosaic(random, mode, longest):
    """A Pillow image of coloured tiles."""
    width, height = random.randint(1, longest + 1, 2)
    tiles = random.randint(0, 256, [height // 5 + 1, width // 5 + 1, 3]).astype(np.uint8)
    image = Image.fromarray(tiles).resize((width, height), Image.NEAREST)
    if mode == 'I;16':
        return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
    if mode in ('RGBA', 'LA'):
        image = image.convert(mode[:-1])
        image.putalpha(Image.effect_noise(image.size, 200))
        return image
    if mode in ('P', 'animated'):
        return image.convert('P', palette=Image.ADAPTIVE, colors=int(random.choice([4, 16, 200])))
    return image.convert(mode)


def sound_picture(kind, mode, random, longest=60):
    """Bytes of a file, and what Pillow makes of them: [32, 32, 3] uint8."""
    image, options = mosaic(random, mode, longest), {}
    if mode == 'animated':
        others = [Image.new('P', image.size, color) for color in (1, 2)]
        options = dict(save_all=True, append_images=others)
    elif kind == 'JPEG':
        options = dict(quality=90, progressive=bool(random.randint(2)))
        options.update({} if mode == 'L' else dict(subsampling=0))
    data = encode(image, kind, **options)
    if mode == 'I;16':
        decoded = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    else:
        decoded = Image.open(io.BytesIO(data))
    width, height = decoded.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = decoded.convert('RGB').crop((left, top, left + side, top + side))
    return data, np.asarray(square.resize((32, 32), Image.BILINEAR))


def png_header(width, height, bits, color_type):
    """A PNG without a pixel, its checksums right."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data) & 0xFFFFFFFF
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', checksum)

    header = struct.pack('>IIBBBBB', width, height, bits, color_type, 0, 0, 0)
    parts = [chunk(b'IHDR', header), chunk(b'IDAT', zlib.compress(b'')), chunk(b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def patched(data, at, values, form):
    end = at + struct.calcsize(form)
    return data[:at] + struct.pack(form, *values) + data[end:]


@functools.lru_cache(maxsize=None)
def nasty_pictures():
    """Dict of name -> bytes of a file that is no picture."""
    image = Image.effect_noise((20, 10), 90)
    png, jpeg = encode(image.convert('RGB'), 'PNG'), encode(image.convert('RGB'), 'JPEG')
    gif = encode(image.convert('P'), 'GIF')
    bitmaps = {mode: encode(image.convert(mode), 'BMP') for mode in ('RGB', 'RGBA', 'L', 'P')}
    frame = gif.index(b',' + struct.pack('<HHHH', 0, 0, 20, 10)) + 5
    huge_gif = patched(patched(gif, 6, [HUGE, HUGE], '<HH'), frame, [HUGE, HUGE], '<HH')
    size_in_jpeg = jpeg.index(b'\xff\xc0') + 5
    found = {
        'zero bytes': b'',
        'one byte': b'B',
        'zeros': bytes(1000),
        'ones': b'\xff' * 1000,
        'text called .jpg': b'Hello,\nworld.\n\n[[\n',
        'huge PNG': png_header(HUGE, HUGE, 8, 2),
        'huge PNG, 1 bit': png_header(HUGE, HUGE, 1, 0),
        'huge PNG, 16 bits': png_header(HUGE, HUGE, 16, 6),
        'largest PNG': png_header((1 << 31) - 1, (1 << 31) - 1, 8, 2),
        'empty PNG': png_header(0, 0, 8, 2),
        'huge JPEG': patched(jpeg, size_in_jpeg, [HUGE, HUGE], '>HH'),
        'empty JPEG': patched(jpeg, size_in_jpeg, [0, 0], '>HH'),
        'huge GIF': huge_gif,
        'WebP': b'RIFF\x10\x00\x00\x00WEBPVP8 ' + bytes(8),
        'TIFF': b'II*\x00' + bytes(40),
        'PNG signature': png[:8],
        'JPEG signature': jpeg[:3],
        'GIF signature': gif[:6],
        'PNG, half of it': png[: len(png) // 2],
        'JPEG, half of it': jpeg[: len(jpeg) // 2],
        'GIF, half of it': gif[: len(gif) // 2],
    }
    for mode, data in bitmaps.items():
        for size in [HUGE, HUGE], [HUGE, -HUGE], [1 << 30, 1 << 30], [-1 << 31, -1 << 31], [0, 0]:
            found[f'BMP, {mode}, {size}'] = patched(data, 18, size, '<ii')
        found[f'BMP, {mode}, half of it'] = data[: len(data) // 2]
        if mode in ('L', 'P'):  # The palette stands behind the header.
            for header_bytes in HUGE, 1 << 30, -15, -1 << 31:
                found[f'BMP, {mode}, header of {header_bytes} bytes'] = patched(
                    data, 14, [header_bytes], '<i'
                )
    for length in 0, 5, 13, 20, 28, 40, 53:
        found[f'BMP signature and {length} bytes'] = b'BM' + b'\xff' * length
        found[f'BMP signature and {length} new lines'] = b'BM' + b'\n' * length
    return found


@functools.lru_cache(maxsize=None)
def picture_reader():
    """A list of paths to read, and the lists that come of it."""
    waiting = []
    return waiting, pictures.read(iter(waiting.pop, None), 32, 1)


def fuzz_pictures(chance, scratch):
    """A picture, changed or as it is, or a file that is none. Returns: could it be read?"""
    kind = chance.choice(sorted(PICTURES))
    modes, most, mean = PICTURES[kind]
    random = np.random.RandomState(chance.randrange(1 << 30))
    contents, expected = sound_picture(kind, chance.choice(modes), random)
    how = chance.choice(['mangle', 'mangle', 'mangle', 'sound', 'nasty'])
    if how == 'mangle':
        sound, contents = contents, mangle(contents, chance)
        how = 'sound' if contents == sound else how
    elif how == 'nasty':
        how = chance.choice(sorted(nasty_pictures()))
        contents = nasty_pictures()[how]
    path = os.path.join(scratch, 'picture.jpg')
    write(path, contents)
    waiting, lists = picture_reader()
    waiting.append(path)
    [(picture, image, problem)] = next(lists)

    assert picture == path and not waiting
    if image is None:
        assert how != 'sound', f'refused without need: {problem}'
        assert problem.strip() and len(problem.splitlines()) == 1, f'said {problem!r}'
        return False
    assert problem is None and how in ('mangle', 'sound'), f'read {how}, and said {problem!r}'
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    if how == 'sound':
        difference = np.abs(image.astype(int) - expected)
        assert difference.max() <= most and difference.mean() <= mean, 'other pixels than Pillow'
    return True


# --- Running -----------------------------------------------------------------------

KINDS = {'records': fuzz_records, 'checkpoints': fuzz_checkpoints, 'pictures': fuzz_pictures}


def run_kind(kind, cases, log):
    """Runs cases of one kind in this process; `log` is told the number of each beforehand."""
    os.environ['PATH'] = ''  # No npm: nothing malformed must lead to a download.
    successes = 0
    for case in cases:
        log.seek(0)
        log.write(f'{case} ')
        log.flush()
        faulthandler.dump_traceback_later(HANG_SECS, exit=True)
        with tempfile.TemporaryDirectory() as scratch:
            successes += KINDS[kind](random.Random(f'{kind} {case}'), scratch)
    faulthandler.cancel_dump_traceback_later()
    print(f'{kind}: {len(cases)} cases, {successes} of them valid all the same', flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kinds', default=','.join(KINDS), help='which (default: %(default)s)')
    parser.add_argument('--cases', type=int, default=3000, help='of each kind (%(default)s)')
    parser.add_argument('--quick', action='store_true', help='300 of each kind')
    parser.add_argument('--only', type=int, help='the number of a single case')
    args = parser.parse_args()
    kinds = args.kinds.split(',')
    if args.only is not None and len(kinds) > 1:
        parser.error('--only needs --kinds with one kind')
    if len(kinds) == 1:
        cases = range(300 if args.quick else args.cases)
        with open(os.environ.get('FUZZ_LOG', os.devnull), 'w') as log:
            return run_kind(kinds[0], cases if args.only is None else [args.only], log)
    failed = False
    for kind in kinds:  # In a process of its own, which may crash.
        command = [sys.executable, os.path.abspath(__file__), '--kinds=' + kind]
        command += ['--quick'] if args.quick else [f'--cases={args.cases}']
        with tempfile.NamedTemporaryFile('r') as log:
            status = subprocess.call(command, env=dict(os.environ, FUZZ_LOG=log.name))
            if status:
                failed = True
                case = log.read() or '?'
                print(f'fuzz.py: FAILED: --kinds={kind} --only={case}: status {status}', flush=True)
    sys.exit(failed)


if __name__ == '__main__':
    main()
