"""Does a SavedModel say the same as the evaluator? All of the test set as PNG pictures.

    python tests/soak/served.py             one view and ten, some minutes
    python tests/soak/served.py --quick     one view

Exports the published model with this generation of TensorFlow, and has processes of their own
load and ask it, one of each generation whose environment is there. In this generation the
number of right answers has to be the evaluator's, in the other one at most one answer in a
thousand may be another.
"""

import argparse
import os
import subprocess
import sys
import tempfile

FOLDER = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [FOLDER, os.path.join(FOLDER, 'results')]

import numpy as np

import cifar10
import cifar10_export
import cifar10_input
import cifar10_predict
import record
from support.compat import tf

FLAGS = cifar10.FLAGS

# Usage: python -c ASK MODEL PICTURES ANSWERS
ASK = '''
import sys
import numpy as np
from support.compat import tf
tf.disable_v2_behavior()
model, pictures, answers = sys.argv[1:]
pictures = np.load(pictures)
with tf.Session(graph=tf.Graph()) as session:
    signature = tf.saved_model.load(session, ['serve'], model).signature_def['serving_default']
    given = signature.inputs['image_bytes'].name
    wanted = signature.outputs['classes'].name
    classes = [session.run(wanted, {given: some})[:, 0] for some in np.array_split(pictures, 100)]
np.save(answers, np.concatenate(classes).astype(str))
'''


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
    return np.array(pictures), names  # No picture ends with a zero byte.


def check(views, pictures, truth, scratch):
    """Returns whether it is as it has to be, for so many views."""
    FLAGS.views, FLAGS.export_dir = views, os.path.join(scratch, views)
    cifar10_export.main()
    (step,) = os.listdir(FLAGS.export_dir)
    checkpoint = f'{FLAGS.checkpoint_dir}/model.ckpt-{step}'
    expected = round(len(truth) * record.precision(checkpoint, averages=True, views=views))
    print(f'{views} views: the evaluator counts {expected} of {len(truth)}.', flush=True)
    answers = {}
    other = os.path.join(FOLDER, '.venv', 'tf2' if tf.__version__ < '2' else 'tf1', 'bin', 'python')
    for python in sys.executable, other:
        if not os.path.exists(python):
            print(f'No {python}: not asked.')
            continue
        path = os.path.join(scratch, f'{views}-{len(answers)}.npy')
        command = [python, '-c', ASK, os.path.join(FLAGS.export_dir, step), pictures, path]
        asked = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if asked.returncode:
            sys.exit(f'FAILED: {asked.stderr[-4000:]}')
        answers[python] = np.load(path)
        right = np.count_nonzero(answers[python] == truth)
        print(f'{python}: {right} right.', flush=True)
    own, *others = answers.values()
    differ = [int(np.count_nonzero(own != each)) for each in others]
    print(f'Other answers in the other generation: {differ}', flush=True)
    return np.count_nonzero(own == truth) == expected and all(
        each <= len(truth) / 1000 for each in differ
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--data_dir', default='/tmp/cifar10_data')
    args = parser.parse_args()
    cifar10_predict.set_defaults()
    FLAGS([sys.argv[0], f'--data_dir={args.data_dir}'])
    cifar10.maybe_download_and_extract()
    encoded, truth = test_set()
    with tempfile.TemporaryDirectory() as scratch:
        pictures = os.path.join(scratch, 'pictures.npy')
        np.save(pictures, encoded)
        good = [
            check(views, pictures, truth, scratch)
            for views in (['1'] if args.quick else ['1', '10'])
        ]
    if not all(good):
        sys.exit('FAILED: the SavedModel does not say what the evaluator says.')
    print('All as it has to be.')


if __name__ == '__main__':
    main()
