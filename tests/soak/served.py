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


def compare(views, pictures, truth, scratch):
    """Returns a summary for that many views."""
    FLAGS.views, FLAGS.export_dir = views, os.path.join(scratch, views)
    cifar10_export.main()
    (step,) = os.listdir(FLAGS.export_dir)
    expected = evaluate(f'{FLAGS.checkpoint_dir}/model.ckpt-{step}')
    answers = []
    other = os.path.join(soak.ROOT, '.venv', 'tf2' if tf.__version__ < '2' else 'tf1')
    for python in sys.executable, os.path.join(other, 'bin', 'python'):
        if not os.path.exists(python):
            print(f'{python} does not exist.')
            continue
        path = os.path.join(scratch, f'{views}-{len(answers)}.npy')
        ask = os.path.join(soak.ROOT, 'tests', 'soak', 'ask_model.py')
        command = [python, ask, os.path.join(FLAGS.export_dir, step), pictures, path]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        expect(result.returncode == 0, f'{python} failed: {result.stderr[-4000:]}')
        answers.append(np.load(path))
    correct = np.count_nonzero(answers[0] == truth)
    summary = (
        f'with --views={views}, {correct} of {len(truth)} correct as served, '
        f'{expected} in the evaluator'
    )
    expect(correct == expected, summary)
    if not answers[1:]:
        return summary + ', the other generation was not asked'
    different = np.count_nonzero(answers[0] != answers[1])
    summary += f', {different} other answers in the other generation'
    expect(different <= len(truth) / 1000, summary)
    return summary


def test(args, scratch):
    cifar10_predict.set_defaults()
    FLAGS([sys.argv[0], f'--data_dir={args.data_dir}'])
    cifar10.maybe_download_and_extract()
    encoded, truth = test_set()
    pictures = os.path.join(scratch, 'pictures.npy')
    np.save(pictures, encoded)
    views = ['1'] if args.quick else ['1', '10']
    return '; '.join(compare(each, pictures, truth, scratch) for each in views)


if __name__ == '__main__':
    soak.run(__doc__, test)
