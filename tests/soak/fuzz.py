"""Feeds malformed input to whatever decodes something: 12,000 cases in some minutes.

    python tests/soak/fuzz.py                            3,000 cases of each kind
    python tests/soak/fuzz.py --quick                    300 of each kind
    python tests/soak/fuzz.py --kinds=flags --only=17    one case, with its traceback

The kinds are data files, archives, the files of a folder of checkpoints, and command
lines. A case is made from its number alone. None may end in anything but the error
that is meant for users: no other exception, no crash, no hang of half a minute, and
above all no success with wrong data, which is why each kind has a second opinion of
its own on what is valid.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import cifar10
import cifar10_eval
import cifar10_input
import cifar10_multi_gpu_train
import cifar10_test
import cifar10_train
from support import checkpoints
from support import dataset
from support import script

import numpy as np
import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
HANG_SECS = 30
RECORD_BYTES = 3073
NAMES = cifar10_test.DOWNLOAD_NAMES


def mangle(data, chance, most=4):
    """The bytes with one to `most` random changes, possibly to the same bytes again."""
    data = bytearray(data)
    for _ in range(chance.randint(1, most)):
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
            del data[at:at + chance.choice([1, 2, 9, RECORD_BYTES])]
        elif how == 'double':
            data[at:at] = data[at:at + chance.choice([1, 4, RECORD_BYTES])]
    return bytes(data)


def write(path, data):
    with open(path, 'wb') as file:
        file.write(data)


# --- Data files ----------------------------------------------------------------

def fuzz_records(chance, scratch):
    """Six data files of the user's own, at least one of them changed."""
    folder = os.path.join(scratch, 'cifar-10-batches-bin')
    os.makedirs(folder)
    contents = {}
    for name in NAMES:
        contents[name] = cifar10_test.download_records(chance.random(), chance.randint(1, 3))
    for name in chance.sample(NAMES, chance.randint(1, 2)):
        how = chance.choice(['mangle', 'mangle', 'label', 'pixel', 'remove', 'folder', 'link'])
        if how == 'mangle':
            contents[name] = mangle(contents[name], chance)
        elif how in ('label', 'pixel'):
            changed = bytearray(contents[name])
            record = chance.randrange(len(changed) // RECORD_BYTES) * RECORD_BYTES
            place = 0 if how == 'label' else chance.randrange(1, RECORD_BYTES)
            changed[record + place] = chance.randrange(256)
            contents[name] = bytes(changed)
        else:
            contents[name] = how
    for name, content in contents.items():
        path = os.path.join(folder, name)
        if content == 'folder':
            os.mkdir(path)
        elif content == 'link':
            os.symlink('nowhere', path)
        elif content != 'remove':
            write(path, content)

    wrong = [name for name, content in contents.items() if isinstance(content, str) or
             not content or len(content) % RECORD_BYTES or max(content[::RECORD_BYTES]) > 9]
    try:
        dataset.maybe_download_and_extract(scratch, 'file:///nowhere')
    except dataset.DataError as error:
        assert wrong, 'refused without need: %s' % error
        assert any(name in str(error) for name in wrong), 'not named: %s' % error
        assert len(str(error).splitlines()) == 1
        return False
    assert not wrong, 'accepted %s' % wrong
    if chance.random() < 0.1:  # It takes some time.
        check_decoding(folder, b''.join(contents[name] for name in NAMES[:5]))
    return True


def check_decoding(folder, expected):
    """Do labels and sums of pixels come out of the graph as they are in the files?"""
    expected = np.frombuffer(expected, np.uint8).reshape(-1, RECORD_BYTES)
    with tf.Graph().as_default(), tf.Session() as session:
        queue = tf.train.string_input_producer(cifar10_input.data_files(False, folder),
                                               num_epochs=1)
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
    assert sorted(seen) == sorted(zip(expected[:, 0].tolist(),
                                      expected[:, 1:].sum(axis=1, dtype=int).tolist()))


# --- Archives --------------------------------------------------------------------

def fuzz_archives(chance, scratch):
    """An archive whose bytes are changed, packed or unpacked, or that has a bad member."""
    files, archive, _ = cifar10_test.download_stand_in()
    how = chance.choice(['packed', 'unpacked', 'header', 'member'])
    if how == 'packed':
        archive = mangle(archive, chance)
    elif how == 'member':
        kind = chance.choice(['dot dot', 'dot dot data', 'absolute', 'symlink', 'hard link',
                              'fifo', 'device', 'huge', 'negative'])
        members = [(name, files[name]) for name in NAMES]
        members.insert(chance.randint(0, 6), cifar10_test.download_bad_member(kind))
        archive = cifar10_test.download_tar(members)
    else:
        plain = bytearray(zlib.decompress(archive, 31))
        if how == 'unpacked':
            plain = mangle(plain, chance)
        else:
            start = chance.choice([i for i in range(0, len(plain), 512)
                                   if plain[i + 257:i + 262] == b'ustar'])
            for _ in range(chance.randint(1, 5)):
                plain[start + chance.choice([chance.randrange(500), 0, 124, 125, 135, 156])] = (
                    chance.choice([0, 0x2e, 0x2f, 0x80, 0xff, chance.randrange(256)]))
            plain[start + 148:start + 156] = b' ' * 8  # So that the checksum is right.
            plain[start + 148:start + 156] = b'%06o\0 ' % sum(plain[start:start + 512])
        packed = zlib.compressobj(1, zlib.DEFLATED, 31)
        archive = packed.compress(bytes(plain)) + packed.flush()
    path, data_dir = os.path.join(scratch, 'archive'), os.path.join(scratch, 'data')
    write(path, archive)

    try:
        folder = dataset.maybe_download_and_extract(data_dir, 'file://' + path)
        accepted = True
    except dataset.DataError as error:
        assert path in str(error), 'the source is not named: %s' % error
        accepted = False
    names = sorted(os.path.relpath(os.path.join(parent, name), scratch)
                   for parent, _, names in os.walk(scratch) for name in names)
    expected = ['archive', 'data/.cifar10_download.lock']
    if accepted:
        expected += ['data/cifar-10-batches-bin/' + name for name in NAMES]
        for name in NAMES:
            with open(os.path.join(folder, name), 'rb') as file:
                assert file.read() == files[name], '%s is not the official one' % name
    assert names == sorted(expected), 'written: %s' % names
    return accepted


# --- Checkpoints -----------------------------------------------------------------

def make_checkpoints(folder):
    """Writes two small checkpoints. Returns dict of step -> values."""
    values = {}
    for step in 7, 12:
        values[step] = {'global_step': np.int64(step)}
        for name in 'conv1/biases', 'conv2/biases', 'local4/biases':
            values[step][name] = np.random.RandomState(step).randn(64).astype(np.float32)
        cifar10_test.write_checkpoint(folder, step, values[step])
        write(os.path.join(folder, 'model.ckpt-%d.meta' % step), b'not read')
    write(os.path.join(folder, 'checkpoint'), b'model_checkpoint_path: "model.ckpt-12"\n')
    checkpoints.mark_finished(folder, 12)
    return values


def fuzz_checkpoints(chance, scratch, originals=[]):
    """A folder of two checkpoints, a state file and a mark, with up to three files changed."""
    if not originals:  # Kept from the first case to the last.
        folder = tempfile.mkdtemp()
        values = make_checkpoints(folder)
        files = {}
        for name in os.listdir(folder):
            with open(os.path.join(folder, name), 'rb') as file:
                files[name] = file.read()
        shutil.rmtree(folder)
        originals += [values, files]
    values, files = originals[0], dict(originals[1])
    changed = set()
    for name in chance.choices(sorted(files), k=chance.randint(1, 3)):
        changed.add(name)
        how = chance.choice(['mangle', 'mangle', 'noise', 'empty', 'other', 'remove', 'folder'])
        files[name] = {
            'mangle': lambda: mangle(originals[1][name], chance),
            'noise': lambda: bytes(chance.randrange(256) for _ in range(chance.randrange(400))),
            'empty': lambda: b'',
            'other': lambda: originals[1][chance.choice(sorted(files))],
            'remove': lambda: None,
            'folder': lambda: 'folder'}[how]()
    for name in 'model.ckpt-%s.index', 'model.ckpt-%s', '%s.index', 'model.ckpt-%s.tempstate1':
        if chance.random() < 0.2:
            files[name % chance.choice(['', '-1', '1e3', '٣', '9' * 30, '0012', 'a b'])] = b'x'
    for name, content in files.items():
        path = os.path.join(scratch, name)
        if content == 'folder':
            os.mkdir(path)
        elif content is not None:
            write(path, content)

    step = checkpoints.finished_step(scratch)
    assert step is None or isinstance(step, int)
    if 'finished' not in changed:
        assert step == 12
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            checkpoint = checkpoints.newest_checkpoint(scratch)
    except script.UserError as error:
        assert len(str(error).splitlines()) == 1
        checkpoint = None
    if not any(name.startswith('model.ckpt-12') for name in changed):
        assert checkpoint and checkpoint.step == 12
    elif not any(name.startswith('model.ckpt-7') for name in changed):
        assert checkpoint and checkpoint.step in (7, 12)
    if checkpoint:
        reader = tf.train.load_checkpoint(checkpoint.path)
        found = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
        # A file of the other checkpoint may stand under this one's name: all of it, then.
        assert any(found.keys() == each.keys() and
                   all(np.array_equal(found[name], each[name]) for name in each)
                   for each in values.values()), 'wrong values were taken for good'
    return checkpoint is not None


# --- Command lines ---------------------------------------------------------------

UNREADABLE_FOLDERS = ['[1]', 'a\\b', 'file:///tmp']
WORDS = ['', '0', '1', '-1', '7', '1.5', '1e9', 'true', 'false', 'maybe', 'test', 'train_eval',
         'nan', ' 5', '5 ', '0x10', '99999999999999999999', '٣', 'é', '\udcff', '=', '--',
         '\t'] + UNREADABLE_FOLDERS
NUMBERS = {'batch_size': 1, 'max_steps': 1, 'log_frequency': 1, 'save_checkpoint_secs': 1,
           'max_to_keep': 0, 'num_gpus': 1, 'eval_interval_secs': 1, 'num_examples': 1}
BOOLEANS = ['use_fp16', 'log_device_placement', 'run_once', 'use_moving_averages']
CHECKPOINT_FOLDERS = ['train_dir', 'eval_dir', 'checkpoint_dir']
STRINGS = ['data_dir', 'data_url'] + CHECKPOINT_FOLDERS


def is_valid(name, value):
    """A second opinion on --name=value."""
    if name in NUMBERS:
        try:
            number = int(value, 16 if value.startswith('0x') else 10)
        except ValueError:
            return False
        return number >= NUMBERS[name]
    if name in BOOLEANS:
        return value.lower() in ('true', 't', '1', 'false', 'f', '0')
    if name == 'eval_data':
        return value in ('test', 'train_eval')
    if name in CHECKPOINT_FOLDERS and value in UNREADABLE_FOLDERS:
        return False
    return '\udcff' not in value  # No text in UTF-8.


def fuzz_flags(chance, scratch):
    """A command line of one to four arguments, right or wrong."""
    names = sorted(NUMBERS) + BOOLEANS + STRINGS + ['eval_data']
    arguments, expected = [], True  # None: anything may come of it.
    for _ in range(chance.randint(1, 4)):
        name, value = chance.choice(names), chance.choice(WORDS + ['%d' % chance.getrandbits(70)])
        how = chance.choice(['valid', 'valid', 'value', 'value', 'name', 'stray', 'dashes', 'odd'])
        if how == 'valid':
            while not is_valid(name, value):
                value = chance.choice(WORDS)
        elif how == 'name':
            name = mangle(name.encode(), chance, 1).decode(errors='replace').replace('\0', '?')
        if how == 'stray':
            arguments.append(chance.choice(['', 'train', '-', '5', 'a=b', '٣']))
            expected = False if expected else expected
        elif how == 'dashes':
            arguments.append('-' * chance.randint(3, 5) + name + '=' + value)
            expected = None
        elif how == 'odd':
            arguments.append(chance.choice(['--', '--=', '-=', '--=1', '-1', '--flagfile',
                                            '--flagfile=/nowhere', '--undefok', '--no' + name,
                                            '--' + name, '--help=maybe', '-h', '--nohelp']))
            expected = None
        else:
            arguments.append('--%s=%s' % (name, value))
            if expected and name in names:
                expected = is_valid(name, value)
            elif expected and not name.startswith(('no', 'help')):
                expected = False

    output, errors = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    argv, sys.argv = sys.argv, ['script.py'] + arguments
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            script.run(lambda: 0)
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
        for name in 'help', 'h':  # Defined by run().
            delattr(FLAGS, name)
        for name in FLAGS:
            FLAGS[name].unparse()
    assert status in (0, 2), 'status %r for %r' % (status, arguments)
    assert expected is None or (status == 0) == expected, 'status %d for %r' % (status, arguments)
    lines = errors.getvalue().split('\n')
    if status:
        assert lines[0].startswith('script.py: ') and lines[0].endswith('(see --help)'), lines
    assert len(lines) == (2 if status else 1), '%r says %r' % (arguments, lines)
    return status == 0


# --- Running -----------------------------------------------------------------------

KINDS = {'records': fuzz_records, 'archives': fuzz_archives, 'checkpoints': fuzz_checkpoints,
         'flags': fuzz_flags}


def run_kind(kind, cases, log):
    """Runs cases of one kind in this process; `log` is told the number of each beforehand."""
    files, _, _ = cifar10_test.download_stand_in()
    if kind == 'archives':  # The stand-in is what is official.
        dataset.SHA256 = {name: hashlib.sha256(data).hexdigest()
                                   for name, data in files.items()}
        dataset._FILE_BYTES = cifar10_test.DOWNLOAD_RECORDS * RECORD_BYTES
    dataset._say = lambda *args, **kwargs: None
    os.environ['PATH'] = ''  # No npm: a malformed archive must not lead to a download.
    successes = 0
    for case in cases:
        log.seek(0)
        log.write('%d ' % case)
        log.flush()
        faulthandler.dump_traceback_later(HANG_SECS, exit=True)
        with tempfile.TemporaryDirectory() as scratch:
            successes += KINDS[kind](random.Random('%s %d' % (kind, case)), scratch)
    faulthandler.cancel_dump_traceback_later()
    print('%s: %d cases, %d of them valid all the same' % (kind, len(cases), successes), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kinds', default=','.join(KINDS), help='which (default: %(default)s)')
    parser.add_argument('--cases', type=int, default=3000, help='of each kind (%(default)s)')
    parser.add_argument('--quick', action='store_true', help='300 of each kind')
    parser.add_argument('--only', type=int, help='the number of a single case')
    args = parser.parse_args()
    kinds = args.kinds.split(',')
    if args.only is not None and len(kinds) > 1:
        parser.error('--only needs --kinds with one kind')
    if args.only is not None or len(kinds) == 1:
        cases = range(300 if args.quick else args.cases)
        with open(os.environ.get('FUZZ_LOG', os.devnull), 'w') as log:
            return run_kind(kinds[0], cases if args.only is None else [args.only], log)
    failed = False
    for kind in kinds:  # In a process of its own, which may crash.
        with tempfile.NamedTemporaryFile('r') as log:
            status = subprocess.call(
                [sys.executable, os.path.abspath(__file__), '--kinds=' + kind,
                 '--cases=%d' % args.cases] + (['--quick'] if args.quick else []),
                env=dict(os.environ, FUZZ_LOG=log.name))
            if status:
                failed = True
                print('fuzz.py: FAILED with status %d: --kinds=%s --only=%s'
                      % (status, kind, log.read() or '?'), flush=True)
    sys.exit(failed)


if __name__ == '__main__':
    main()
