"""Converts your own images to a data set: six files of records and the names of the classes.

    python cifar10_convert.py SOURCE --data_dir=/data/mine
    python cifar10_train.py --data_dir=/data/mine --train_dir=/data/run

SOURCE is one of

    a folder with a folder of pictures for each class: SOURCE/train/CLASS/* and SOURCE/test/CLASS/*,
        or SOURCE/CLASS/*, of which a sixth of each class, always the same, becomes the test set
    CIFAR-100, binary or Python version: the .tar.gz archive, or the folder in it
    CIFAR-10, Python version: the .tar.gz archive, or the folder in it
    CIFAR-10 from Kaggle: a folder with trainLabels.csv and train/*.png
    SVHN, cropped digits: a folder with train_32x32.mat and test_32x32.mat (needs SciPy)

The largest central square of each picture is scaled to 32x32. The examples are shuffled, always in
the same order. Unreadable pictures are named and skipped.
"""

import support  # noqa: F401 -- First, because it handles Ctrl-C during imports.

import contextlib
import itertools
import os
import pathlib
import random
import shutil
import sys

from absl import app

import cifar10
import cifar10_input
from support import dataset, flags, pictures, script, sources

FLAGS = flags.FLAGS
flags.DEFINE_bool('coarse', False, 'Use the 20 superclasses of CIFAR-100.')
flags.DEFINE_bool('keep_going', False, 'Skip unreadable pictures, however many there are.')
flags.declare_key_flag('data_dir')

SEED = 1
PICTURES_AT_A_TIME = 256

TRAINING_NAMES = 'train', 'training'
TEST_NAMES = 'test', 'testing', 'val', 'valid', 'validation'
NOT_PICTURES = '__macosx', '@eadir', 'thumbs.db', 'desktop.ini'  # Of macOS, Synology, Windows.
LAYOUT = (
    'Expected SOURCE/CLASS/PICTURE, or SOURCE/train/CLASS/PICTURE and SOURCE/test/CLASS/PICTURE.'
)


# --- Sources -----------------------------------------------------------------


def read_source(source):
    """Returns the class names and two lists, for training and test, of pairs (label, picture)."""
    try:
        return sources.read(source, FLAGS.coarse) or folders_of_pictures(source)
    except script.UserError:
        raise
    except Exception as error:  # Damaged files raise errors of many types.
        raise script.UserError(f'cannot read {source}: {script.reason(error)}')


def folders_of_pictures(source):
    folders = folders_in(source)
    training = [folder for folder in folders if folder.name.lower() in TRAINING_NAMES]
    test = [folder for folder in folders if folder.name.lower() in TEST_NAMES]
    if not (training and test):
        classes = pictures_by_class(folders)
        training, test = sources.split(classes.values())
        return list(classes), training, test
    if len(folders) > 2:
        raise script.UserError(
            f'{source} has the folders {", ".join(folder.name for folder in folders)}. Move all '
            'but one for training and one for the test to another place.'
        )
    training, test = [pictures_by_class(folders_in(folder)) for [folder] in (training, test)]
    names = list(training) + sorted(set(test) - set(training))
    training, test = [
        [(label, path) for label, name in enumerate(names) for path in half.get(name, [])]
        for half in (training, test)
    ]
    return names, training, test


def visible(folder):
    paths = sorted(pathlib.Path(folder).iterdir())
    return [path for path in paths if path.name[0] != '.' and path.name.lower() not in NOT_PICTURES]


def folders_in(folder):
    """The folders in a folder, by name. Prints what else is there; pictures there are an error."""
    paths = visible(folder)
    files = [path for path in paths if not path.is_dir()]
    for path in files:
        if path.suffix.lower() in pictures.SUFFIXES and len(files) < len(paths):
            raise script.UserError(f'{path} is not in the folder of a class. {LAYOUT}')
    if files:
        others = f' and {len(files) - 1} others there' if len(files) > 1 else ''
        print(script.printable(f'Not used: {files[0]}{others}'))
    return [path for path in paths if path.is_dir()]


def pictures_by_class(folders):
    """Dict of class name -> list of paths."""
    classes = {}
    for folder in folders:
        paths = visible(folder)
        for path in paths:
            if path.is_dir():
                raise script.UserError(f'{path} is a folder in the folder of a class. {LAYOUT}')
        # The same name in every locale. The file system may hold any bytes.
        classes[os.fsencode(folder.name).decode(errors='replace')] = [str(path) for path in paths]
    return classes


# --- Records -----------------------------------------------------------------


def check(source, names, labels):
    """Rejects what no data set can be made of.

    Args:
      names: of the classes.
      labels: dict of 'training' and 'test' -> the labels of their examples.
    """
    if not 2 <= len(names) <= 256:
        raise script.UserError(f'{source} has {len(names)} classes, not 2 to 256. {LAYOUT}')
    for name in names:
        if name != name.strip() or not name.isprintable() or '\ufffd' in name:
            raise script.UserError(f'{name!r} cannot be the name of a class. Rename its folder.')
    largest = max(labels['training'] + labels['test'], default=0)
    if largest >= len(names):
        raise script.UserError(f'{source} has the label {largest}, but only {len(names)} classes')
    for label in sorted(set(range(len(names))) - set(labels['training'])):
        raise script.UserError(
            f'{source} has no readable training picture of class {names[label]}. Add some, or '
            'remove the class.'
        )
    for half, least in ('training', 5), ('test', 1):  # One for each file.
        if len(labels[half]) < least:
            raise script.UserError(
                f'{source} has {len(labels[half])} readable {half} pictures; at least {least} '
                'are needed'
            )


def records(examples):
    """Yields the record of each example, or None if its picture is unreadable."""
    paths_or_arrays = (picture for _, picture in examples)
    lists = pictures.read(paths_or_arrays, cifar10_input.RECORD_SIZE, PICTURES_AT_A_TIME)
    results = itertools.chain.from_iterable(lists)
    for (label, _), (picture, image, problem) in zip(examples, results):
        if problem:
            print(script.printable(f'{picture}: {problem}'), file=sys.stderr)
            yield None
        else:
            yield bytes([label]) + image.transpose(2, 0, 1).tobytes()


def write_data_set(source, folder):
    """Converts a source to a data set in an existing folder. Returns a summary in words."""
    names, training, test = read_source(source)
    labels = {'training': [label for label, _ in training], 'test': [label for label, _ in test]}
    check(source, names, labels)
    # Files sorted by class would give batches of one class.
    random.Random(SEED).shuffle(training)
    random.Random(SEED).shuffle(test)
    examples = training + test
    halves = ['training'] * len(training) + ['test'] * len(test)
    written = {'training': [], 'test': []}
    done = unreadable = 0
    with contextlib.ExitStack() as stack:
        files = {
            half: itertools.cycle([stack.enter_context(open(path, 'wb')) for path in paths])
            for half, paths in (
                ('training', cifar10_input.data_files(False, folder)),
                ('test', cifar10_input.data_files(True, folder)),
            )
        }
        stack.enter_context(script.progress(lambda: f'{done} of {len(examples)} pictures'))
        for half, (label, _), record in zip(halves, examples, records(examples)):
            done += 1
            if record:
                next(files[half]).write(record)
                written[half].append(label)
                continue
            unreadable += 1
            if unreadable > len(examples) / 100 and not FLAGS.keep_going:
                raise script.UserError(
                    f'{unreadable} of {len(examples)} pictures are unreadable, more than one in a '
                    'hundred. To skip them, use --keep_going.'
                )
    check(source, names, written)
    dataset.write_class_names(folder, names)
    return (
        f'{len(written["training"])} pictures for training and {len(written["test"])} for the '
        f'test, {len(names)} classes, {unreadable} unreadable pictures skipped'
    )


def main(argv):
    if len(argv) != 2:
        raise app.UsageError('name one SOURCE')
    if FLAGS['data_dir'].using_default_value:
        raise app.UsageError('name the new data set: --data_dir=FOLDER (of make: DATA_DIR=FOLDER)')
    script.reject_flags('use_fp16')
    source, folder = argv[1], cifar10.data_folder()
    data_dir = script.output_folder('data_dir')
    if (os.path.realpath(data_dir) + os.sep).startswith(os.path.realpath(source) + os.sep):
        raise script.UserError(f'--data_dir={data_dir} is in {source}. Choose a folder outside.')
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise script.UserError(f'{folder} exists already; nothing was changed')
    with script.locked(data_dir, f'another process is converting to {data_dir}'):
        unfinished = os.path.join(data_dir, '.convert')
        shutil.rmtree(unfinished, ignore_errors=True)  # Of a process that was killed.
        try:
            os.mkdir(unfinished)
            summary = write_data_set(source, unfinished)
            os.rename(unfinished, folder)
        except OSError as error:
            raise script.UserError(f'--data_dir={data_dir}: {script.reason(error)}')
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    print(script.printable(f'Saved {folder}: {summary}.'))


if __name__ == '__main__':
    script.run(main, takes_arguments=True)
