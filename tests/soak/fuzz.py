"""Feeds malformed files to everything that decodes files.

    python tests/soak/fuzz.py                              3,000 cases of each kind
    python tests/soak/fuzz.py --quick                      300 of each kind
    python tests/soak/fuzz.py --kinds=records --only=17    one case, with its traceback

The kinds are data files, the files of a folder of checkpoints, and pictures. A case depends only on
its number. Besides success, only a UserError is allowed: no other exception, no crash, no hang, and
above all no success with wrong data. Therefore each kind decides independently what is valid.
"""

import contextlib
import faulthandler
import functools
import io
import multiprocessing
import os
import random
import struct
import tempfile
import zlib

import numpy as np
from PIL import Image

import soak
import cifar10
from support import checkpoints, dataset, pictures, script
from tests import reference

HANG_SECS = 30
RECORD_BYTES = 3073
FORMATS = [f'PNG {mode}' for mode in ('RGBA', 'L', 'P', '1', 'I;16')] + [
    *['BMP RGB', 'BMP L', 'BMP P', 'GIF P', 'JPEG RGB', 'JPEG L', 'JPEG CMYK']
]


def mangle(data, chance):
    """The bytes with one to four random changes, possibly to the same bytes again."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(len(data) + 1), chance.choice([1, 2, 9, RECORD_BYTES])
        how = chance.choice(['set', 'set', 'cut', 'insert', 'drop', 'double'])
        if how == 'set':
            data[at : at + 1] = [chance.choice([0, 9, 10, 127, 128, 255, chance.randrange(256)])]
        elif how == 'cut':
            del data[at:]
        elif how == 'insert':
            data[at:at] = random_bytes(chance, chance.randint(1, 9))
        elif how == 'drop':
            del data[at : at + size]
        else:
            data[at:at] = data[at : at + size]
    return bytes(data)


def random_bytes(chance, count):
    return bytes(chance.randrange(256) for _ in range(count))


def write(folder, contents):
    """Writes files, given as a dict of name -> bytes, or None for no file."""
    for name, content in contents.items():
        if content is not None:
            with open(os.path.join(folder, name), 'wb') as file:
                file.write(content)


def rejection(function, *args):
    """Calls a function without its output. Returns its result and the message of a UserError."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return function(*args), None
        except script.UserError as error:
            assert len(str(error).splitlines()) == 1
            return None, str(error)


def fuzz_records(chance, scratch):
    """Six custom data files, one or two of them changed. Returns: are they valid?"""
    folder, contents = os.path.join(scratch, reference.DATA_FOLDER), {}
    os.makedirs(folder)
    for name in reference.DATA_FILES:
        images = reference.random_images(chance.randint(1, 3), seed=chance.randrange(1 << 30))
        contents[name] = reference.records(images, [chance.randrange(10) for _ in images])
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
            changed[record + place] = chance.randrange(12 if how == 'label' else 256)
            contents[name] = bytes(changed)
    write(folder, contents)
    wrong = [
        name
        for name, content in contents.items()
        if not content or len(content) % RECORD_BYTES or max(content[::RECORD_BYTES]) > 9
    ]
    cifar10.FLAGS(['fuzz.py', f'--data_dir={scratch}', '--data_url=file:///nowhere'])
    _, problem = rejection(dataset.maybe_download_and_extract, RECORD_BYTES)
    assert bool(problem) == bool(wrong), f'wrong are {wrong}, but: {problem}'
    assert not wrong or any(name in problem for name in wrong), f'not named: {problem}'
    return not wrong


@functools.lru_cache(maxsize=None)
def sound_checkpoints():
    """Two small checkpoints: dict of step -> values, dict of file name -> contents."""
    values, files = {}, {}
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
    return values, files


def fuzz_checkpoints(chance, scratch):
    """Two checkpoints, a state file and a mark, with up to three files changed.

    Returns: is a checkpoint usable?
    """
    values, sound = sound_checkpoints()
    files, changed = dict(sound), chance.choices(sorted(sound), k=chance.randint(1, 3))
    for name in changed:
        how = chance.choice(['mangle', 'mangle', 'noise', 'empty', 'other', 'remove'])
        if how == 'mangle':
            files[name] = mangle(sound[name], chance)
        elif how == 'noise':
            files[name] = random_bytes(chance, chance.randrange(400))
        elif how == 'other':
            files[name] = sound[chance.choice(sorted(sound))]
        else:
            files[name] = b'' if how == 'empty' else None
    for name in 'model.ckpt-%s.index', 'model.ckpt-%s', '%s.index', 'model.ckpt-%s.tempstate1':
        if chance.random() < 0.2:
            files[name % chance.choice(['', '-1', '1e3', '٣', '9' * 30, '0012', 'a b'])] = b'x'
    write(scratch, files)
    step = checkpoints.finished_step(scratch)
    assert step is None or isinstance(step, int)
    assert step == 12 or 'finished' in changed
    path, _ = rejection(checkpoints.newest, scratch)
    intact = [step for step in values if not any(f'ckpt-{step}.' in name for name in changed)]
    if not intact and path is None:
        return False
    found = reference.read_checkpoint(path)
    assert checkpoints.step_of(path) in values and checkpoints.step_of(path) >= max([0, *intact])
    # The files of the other checkpoint may have this one's name, but then all of them.
    assert any(
        found.keys() == each.keys()
        and all(np.array_equal(found[name], each[name]) for name in each)
        for each in values.values()
    ), 'restored wrong values'
    return True


def encode(chance):
    """A random picture of one color in a random format, and its color if the format keeps it."""
    kind, mode = chance.choice(FORMATS).split()
    size, color = (chance.randint(1, 60), chance.randint(1, 60)), tuple(random_bytes(chance, 3))
    image = Image.new('RGB', size, color)
    if mode == 'I;16':  # Pillow converts to this mode only in steps.
        image = image.convert('L').convert('I')
    image, contents = image.convert(mode, dither=0), io.BytesIO()
    image.save(contents, kind)
    kept = None if mode in ('1', 'I;16') else np.asarray(image.convert('RGB'))[0, 0]
    return contents.getvalue(), kept


def fuzz_pictures(chance, scratch):
    """A picture, changed or intact, or a bomb. Returns: could it be read?"""
    intact, color = encode(chance)
    how = chance.choice(['mangled', 'mangled', 'mangled', 'intact', 'bomb'])
    contents = mangle(intact, chance) if how == 'mangled' else intact
    if how == 'bomb':  # A header that claims 900 million pixels.
        header = b'IHDR' + struct.pack('>IIBBBBB', 30000, 30000, 8, 2, 0, 0, 0)
        contents = b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + header
        contents += struct.pack('>I', zlib.crc32(header)) + b'\0' * 100
    path = os.path.join(scratch, 'picture.jpg')
    write(scratch, {'picture.jpg': contents})
    [[(picture, image, problem)]] = pictures.read([path], 32, 1)
    assert picture == path
    if image is None:
        assert contents != intact, f'rejected a good picture: {problem}'
        assert problem.strip() and len(problem.splitlines()) == 1, problem
        return False
    assert problem is None and how != 'bomb', problem
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    if contents == intact and color is not None:
        np.testing.assert_allclose(image.mean(axis=(0, 1)), color, atol=4)
    return True


KINDS = {'records': fuzz_records, 'checkpoints': fuzz_checkpoints, 'pictures': fuzz_pictures}


def run_kind(kind, cases, current, valid):
    """Runs cases of one kind. `current` and `valid` get the number of the case and of successes."""
    os.environ['PATH'] = ''  # No npm: nothing malformed must lead to a download.
    for case in cases:
        current.value = case
        faulthandler.dump_traceback_later(HANG_SECS, exit=True)
        with tempfile.TemporaryDirectory() as scratch:
            valid.value += KINDS[kind](random.Random(f'{kind} {case}'), scratch)


def test(args, scratch):
    cases = range(300 if args.quick else args.cases) if args.only is None else [args.only]
    summaries, failures = [], []
    for kind in args.kinds.split(','):
        current, valid = multiprocessing.Value('i'), multiprocessing.Value('i')
        job = kind, cases, current, valid
        process = multiprocessing.Process(target=run_kind, args=job, daemon=True)  # It may crash.
        process.start()
        process.join()
        if process.exitcode:
            failures.append(f'--kinds={kind} --only={current.value}: status {process.exitcode}')
        summaries.append(f'{len(cases)} cases of {kind}, {valid.value} of them valid nevertheless')
    soak.expect(not failures, '; '.join(failures))
    return '; '.join(summaries)


if __name__ == '__main__':
    soak.run(
        __doc__,
        test,
        kinds=dict(default=','.join(KINDS), help='default: %(default)s'),
        cases=dict(type=int, default=3000, help='of each kind; default: %(default)s'),
        only=dict(type=int, help='the number of a single case'),
    )
