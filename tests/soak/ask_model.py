"""Asks a SavedModel for the classes of pictures.

    python tests/soak/ask_model.py MODEL PICTURES.npy ANSWERS.npy

served.py runs this in both generations. It needs only TensorFlow.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import numpy as np

from support.compat import tf

model, pictures_path, answers_path = sys.argv[1:]
tf.disable_v2_behavior()
with tf.Session(graph=tf.Graph()) as session:
    signature = tf.saved_model.load(session, ['serve'], model).signature_def['serving_default']
    given, wanted = signature.inputs['image_bytes'].name, signature.outputs['classes'].name
    parts = np.array_split(np.load(pictures_path), 100)
    classes = [session.run(wanted, {given: part})[:, 0] for part in parts]
np.save(answers_path, np.concatenate(classes).astype(str))
