"""Says what is in a picture, with the published model or one of your own.

    python cifar10_predict.py cat.jpg dog.png
    python cifar10_predict.py --checkpoint_dir=/tmp/cifar10_train --views=1 cat.jpg
    find photos -name '*.jpg' | python cifar10_predict.py --json -

A picture may be a PNG, JPEG, BMP or GIF (its first frame) of any size. Its largest central
square, made as small as the images of the data set, takes the way of the evaluator: cut into
views, standardized, through the network with the moving averages of the variables.

One line a picture: the most probable classes. Pictures that cannot be read are named on
standard error, and make the exit status 1.
"""

import json
import os
import signal
import sys

import cifar10
import cifar10_eval
import cifar10_input
from support import checkpoints, devices, pictures, script

from absl import app
import numpy as np
import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_integer('top_k', 3, 'Classes to name.', lower_bound=1)
tf.flags.DEFINE_bool('json', False, 'Print a JSON object a picture, with all classes.')
for _name in 'batch_size', 'checkpoint_dir', 'use_moving_averages', 'views':
    tf.flags.declare_key_flag(_name)


def set_defaults():
    """The published model, and ten views, where the command line says nothing else."""
    here = os.path.dirname(os.path.abspath(__file__))
    FLAGS.set_default('checkpoint_dir', os.path.join(here, 'results'))
    FLAGS.set_default('views', '10')


def newest_model():
    """The newest checkpoint in --checkpoint_dir, and the names of its classes."""
    path = checkpoints.newest(FLAGS.checkpoint_dir, required=True)
    return path, cifar10_input.class_names(FLAGS.checkpoint_dir)


def class_probabilities(images, num_classes):
    """[n, 32, 32, 3] uint8 -> [n, num_classes] float32, from as many views as --views says."""
    num_views = int(FLAGS.views)
    views = cifar10_input.fixed_views(images, num_views)
    return cifar10.probabilities(views, num_classes, num_views)


def restore(session, path):
    """Gives the variables of class_probabilities() their values from a checkpoint.

    Raises:
      script.UserError: it is of another model, or has another number of classes.
    """
    variables = cifar10_eval.model_variables()
    problem = checkpoints.misfit(path, variables)
    if problem:
        if 'softmax_linear' in problem:
            names = os.path.join(os.path.dirname(path), cifar10_input.CLASS_NAMES_FILE)
            problem += f'; it has another number of classes than {names} (CIFAR-10, without it)'
        raise script.UserError(f'cannot use {path}: {problem}')
    tf.train.Saver(variables).restore(session, path)


def describe(picture, class_names, probabilities):
    """One line on a picture: the --top_k most probable classes, or JSON with all of them."""
    ranked = [(class_names[i], float(probabilities[i])) for i in np.argsort(-probabilities)]
    if FLAGS.json:
        classes = [{'class': name, 'probability': value} for name, value in ranked]
        return json.dumps({'picture': picture, 'classes': classes})
    return f'{picture}: ' + ', '.join(
        f'{name} {value:.2f}' for name, value in ranked[: FLAGS.top_k]
    )


def main(arguments):
    if not arguments:
        raise app.UsageError('name pictures, or - to read their names from standard input')
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # With `| head`, end as other commands do.
    names = arguments
    if arguments == ['-']:
        names = (os.fsdecode(line.rstrip(b'\n')) for line in sys.stdin.buffer)
    checkpoint, class_names = newest_model()
    size = cifar10_input.RECORD_SIZE
    black = np.zeros([size, size, 3], np.uint8)  # In the place of what cannot be read.
    all_read = True
    with tf.Graph().as_default(), tf.Session(config=devices.session_config(False)) as session:
        images = tf.placeholder(tf.uint8, [None, size, size, 3])
        probabilities = class_probabilities(images, len(class_names))
        restore(session, checkpoint)
        pictures_per_batch = max(1, FLAGS.batch_size // int(FLAGS.views))
        for batch in pictures.read(names, size, pictures_per_batch):
            pixels = [black if problem else image for _, image, problem in batch]
            rows = session.run(probabilities, {images: pixels})
            for (name, _, problem), row in zip(batch, rows):
                if problem:
                    all_read = False
                    print(f'{name}: {problem}', file=sys.stderr)
                else:
                    # Names of files are bytes, and need not be UTF-8.
                    sys.stdout.buffer.write(os.fsencode(describe(name, class_names, row) + '\n'))
            sys.stdout.flush()
    return 0 if all_read else 1


if __name__ == '__main__':
    set_defaults()
    script.run(main, takes_arguments=True)
