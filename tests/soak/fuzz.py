"""Feeds malformed files to everything that decodes files: 9,000 cases in some minutes.

    python tests/soak/fuzz.py                              3,000 cases of each kind
    python tests/soak/fuzz.py --quick                      300 of each kind
    python tests/soak/fuzz.py --kinds=records --only=17    one case, with its traceback

The kinds are data files, the files of a folder of checkpoints, and pictures. A case depends only on
its number. The only allowed outcome besides success is a UserError: no other exception, no crash,
no hang, and above all no success with wrong data. Therefore each kind decides independently which
files are valid.
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

import numpy as np
from PIL import Image

import cifar10
import cifar10_input
from support import checkpoints, dataset, pictures, script
from support.compat import tf
from tests import reference

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
            cifar10.FLAGS(['fuzz.py', f'--data_dir={scratch}', '--data_url=file:///nowhere'])
            dataset.maybe_download_and_extract(RECORD_BYTES)
    except script.UserError as error:
        assert wrong, f'rejected good files: {error}'
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
    ), 'restored wrong values'
    return True


# --- Pictures ----------------------------------------------------------------------

KINDS_OF_PICTURES = {'PNG': 'RGBA L P 1 I;16', 'BMP': 'RGB L P', 'GIF': 'P', 'JPEG': 'RGB L CMYK'}


def encode(kind, mode, random):
    """A random picture of a color, and the mean of its pixels."""
    width, height = random.randint(1, 60, 2)
    color = random.randint(0, 256, 3).astype(np.uint8)
    image = Image.fromarray(np.full([height, width, 3], color, np.uint8))
    image = image.convert('L').convert('I').convert(mode) if mode == 'I;16' else image.convert(mode)
    contents = io.BytesIO()
    image.save(contents, kind)
    return contents.getvalue(), np.asarray(image.convert('RGB')).mean(axis=(0, 1))


def fuzz_pictures(chance, scratch):
    """A picture, changed or intact, or a bomb. Returns: could it be read?"""
    kind = chance.choice(sorted(KINDS_OF_PICTURES))
    mode = chance.choice(KINDS_OF_PICTURES[kind].split())
    contents, mean = encode(kind, mode, np.random.RandomState(chance.randrange(1 << 30)))
    how = chance.choice(['mangled', 'mangled', 'mangled', 'intact', 'bomb'])
    if how == 'mangled':
        intact, contents = contents, mangle(contents, chance)
        how = 'intact' if contents == intact else how
    elif how == 'bomb':  # A header that claims 900 million pixels.
        size = struct.pack('>II', 30000, 30000)
        header = b'IHDR' + size + bytes([8, 2, 0, 0, 0])
        contents = b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + header
        contents += struct.pack('>I', zlib.crc32(header)) + b'\0' * 100
    path = os.path.join(scratch, 'picture.jpg')
    write(path, contents)
    [[(picture, image, problem)]] = pictures.read([path], 32, 1)

    assert picture == path
    if image is None:
        assert how != 'intact', f'rejected a good picture: {problem}'
        assert problem.strip() and len(problem.splitlines()) == 1, problem
        return False
    assert problem is None and how != 'bomb', problem
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    if how == 'intact' and mode not in ('1', 'I;16'):  # Their mean is another one.
        np.testing.assert_allclose(image.mean(axis=(0, 1)), mean, atol=4)
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
    print(f'{kind}: {len(cases)} cases, {successes} of them valid nevertheless', flush=True)


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
