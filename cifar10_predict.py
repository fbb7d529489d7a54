"""Classifies pictures with the published model or your own.

    python cifar10_predict.py cat.jpg dog.png
    python cifar10_predict.py --checkpoint_dir=/tmp/cifar10_train --views=1 cat.jpg
    find photos -name '*.jpg' | python cifar10_predict.py --json -

A picture is a BMP, GIF, JPEG, PNG or WebP file of any size. It is cropped to its largest central
square, scaled to 32x32 and classified exactly as in evaluation, by default with ten views.

Prints a line for each picture, with its most probable classes. Unreadable pictures are named on
standard error, and the exit status is 1.
"""

import support  # noqa: F401 -- First, because it handles Ctrl-C during imports.

import json
import os
import signal
import sys

from absl import app
import numpy as np

import cifar10
import cifar10_eval
import cifar10_input
from support import checkpoints, dataset, devices, flags, pictures, script, views
from support.compat import tf

FLAGS = flags.FLAGS
flags.DEFINE_integer('top_k', 3, 'Number of classes to print.', lower_bound=1)
flags.DEFINE_bool('json', False, 'Print a JSON object for each picture, with all classes.')
for _name in 'batch_size', 'checkpoint_dir', 'use_fp16', 'use_moving_averages', 'views':
    flags.declare_key_flag(_name)


def set_defaults():
    """The defaults of prediction and export: the published model, ten views."""
    here = os.path.dirname(os.path.abspath(__file__))
    FLAGS.set_default('checkpoint_dir', os.path.join(here, 'results'))
    FLAGS.set_default('views', '10')


def newest_model():
    """Returns the newest checkpoint in --checkpoint_dir and the names of its classes."""
    path = checkpoints.newest_required('checkpoint_dir')
    folder = os.path.dirname(path)
    names = dataset.class_names(folder)
    with checkpoints.reading(path):
        shapes = tf.train.load_checkpoint(path).get_variable_to_shape_map()
    num_classes = shapes.get('softmax_linear/biases', [len(names)])[0]
    if num_classes != len(names):
        raise script.UserError(
            f'{path} has {num_classes} classes, but there are {len(names)} names. Name the classes '
            f'in {os.path.join(folder, dataset.CLASS_NAMES_FILE)}, one per line.'
        )
    return path, names


class Model:
    """The network for a number of classes that does not depend on --data_dir."""

    def __init__(self, num_classes):
        self._num_classes = num_classes

    def inference(self, images):
        return cifar10.inference(images, self._num_classes)


def class_probabilities(images, num_classes):
    """[n, 32, 32, 3] uint8 -> [n, num_classes] float32, means over the --views of an image."""
    crops = views.crop(images, int(FLAGS.views), cifar10_input.IMAGE_SIZE)
    standardized = cifar10_input.standardize(tf.cast(crops, tf.float32))
    return views.probabilities(Model(num_classes).inference, standardized)


def restore(session, path):
    """Assigns the values in a checkpoint to the variables of class_probabilities()."""
    variables = cifar10_eval.model_variables()
    checkpoints.check(path, variables)
    checkpoints.restore(session, path, variables)


def describe(picture, class_names, probabilities):
    """A line about a picture: the --top_k most probable classes, or JSON with all of them."""
    ranked = [(class_names[i], float(probabilities[i])) for i in np.argsort(-probabilities)]
    if FLAGS.json:
        classes = [{'class': name, 'probability': value} for name, value in ranked]
        return json.dumps({'picture': picture, 'classes': classes})
    best = ', '.join(f'{name} {value:.2f}' for name, value in ranked[: FLAGS.top_k])
    return script.printable(f'{picture}: {best}')


def main(argv):
    names = argv[1:]
    if not names:
        raise app.UsageError('name pictures, or - to read their names from standard input')
    if names == ['-']:
        names = (os.fsdecode(line.rstrip(b'\n')) for line in sys.stdin.buffer)
    checkpoint, class_names = newest_model()
    if FLAGS.use_fp16:
        print(devices.describe(FLAGS.use_fp16), file=sys.stderr)
    size = cifar10_input.RECORD_SIZE
    config = devices.session_config(FLAGS.use_fp16)
    all_read = True
    with tf.Graph().as_default(), tf.Session(config=config) as session:
        images = tf.placeholder(tf.uint8, [None, size, size, 3])
        probabilities = class_probabilities(images, len(class_names))
        restore(session, checkpoint)
        pictures_per_batch = max(1, FLAGS.batch_size // int(FLAGS.views))
        for batch in pictures.read(names, size, pictures_per_batch):
            readable = [image for _, image, problem in batch if not problem]
            rows = iter(session.run(probabilities, {images: readable}) if readable else [])
            for name, _, problem in batch:
                if problem:
                    all_read = False
                    print(script.printable(f'{name}: {problem}'), file=sys.stderr)
                else:
                    print(describe(name, class_names, next(rows)))
    return 0 if all_read else 1


if __name__ == '__main__':
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # With `| head`, end as other commands do.
    set_defaults()
    script.run(main, takes_arguments=True)
