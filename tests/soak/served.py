"""Compares a SavedModel with the evaluator on the test set, whose images it gets as PNG files.

    python tests/soak/served.py            one view and ten
    python tests/soak/served.py --quick    one view

Exports the published model with this generation of TensorFlow. A process of each generation whose
environment exists loads and asks it. In this generation the number of correct answers must be the
evaluator's; in the other one, one answer in a thousand may differ.
"""

import os
import subprocess
import sys

import soak
from soak import expect
import cifar10
import cifar10_eval
import cifar10_export
import cifar10_input
import cifar10_predict
import numpy as np
from support.compat import tf

FLAGS = cifar10.FLAGS
OTHER = os.path.join(soak.ROOT, '.venv', 'tf2' if tf.__version__ < '2' else 'tf1', 'bin', 'python')


def test_set():
    """The pictures, encoded as PNG, and the names of their classes."""
    (path,) = cifar10_input.data_files(True, cifar10.data_folder())
    records = np.fromfile(path, np.uint8).reshape(-1, cifar10_input.RECORD_BYTES)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    with tf.Graph().as_default(), tf.Session() as session:
        image = tf.placeholder(tf.uint8, [None, None, 3])
        encoded = tf.image.encode_png(image)
        pictures = [session.run(encoded, {image: each}) for each in images]
    names = np.array(cifar10.class_names())[records[:, 0]]
    return np.array(pictures), names  # No PNG file ends with a zero byte, which NumPy would drop.


def evaluate(path):
    """The number of test images that the evaluator classifies correctly."""
    with tf.Graph().as_default(), tf.Session() as session:
        is_correct = cifar10_eval.correct_predictions(cifar10)
        tf.train.Saver(cifar10_eval.model_variables()).restore(session, path)
        session.run(tf.local_variables_initializer())
        return cifar10_eval.count_correct(session, is_correct, 10**6, tf.no_op())[0]


def ask(python, model, scratch):
    """The answers of a model for the pictures in the folder, in a process of this Python."""
    script, answers = f'{soak.ROOT}/tests/soak/ask_model.py', f'{scratch}/answers.npy'
    command = [python, script, model, f'{scratch}/pictures.npy', answers]
    result = subprocess.run(command, stderr=subprocess.PIPE, universal_newlines=True)
    expect(result.returncode == 0, f'{python} failed: {result.stderr[-4000:]}')
    return np.load(answers)


def compare(views, truth, scratch):
    """Returns a summary for that many views."""
    FLAGS.views, FLAGS.export_dir = views, f'{scratch}/{views}'
    cifar10_export.main()
    (step,) = os.listdir(FLAGS.export_dir)
    expected = evaluate(f'{FLAGS.checkpoint_dir}/model.ckpt-{step}')
    answers = ask(sys.executable, f'{FLAGS.export_dir}/{step}', scratch)
    correct = np.count_nonzero(answers == truth)
    summary = f'--views={views}: {correct} of {len(truth)} as served, {expected} in the evaluator'
    expect(correct == expected, summary)
    if not os.path.exists(OTHER):
        return f'{summary}, {OTHER} does not exist'
    different = np.count_nonzero(ask(OTHER, f'{FLAGS.export_dir}/{step}', scratch) != answers)
    summary += f', {different} other answers in the other generation'
    expect(different <= len(truth) / 1000, summary)
    return summary


def test(args, scratch):
    cifar10_predict.set_defaults()
    FLAGS([sys.argv[0], f'--data_dir={args.data_dir}'])
    cifar10.maybe_download_and_extract()
    pictures, truth = test_set()
    np.save(f'{scratch}/pictures.npy', pictures)
    return '; '.join(
        compare(each, truth, scratch) for each in (['1'] if args.quick else ['1', '10'])
    )


if __name__ == '__main__':
    soak.run(__doc__, test)
