"""A client of exported models that uses nothing but TensorFlow.

Reads {folders: {views: path}, requests: {name: [signature, inputs]}} as JSON from stdin. Writes the
answers as JSON: by views, way to load the model, and name of the request.
"""

import base64
import json
import sys

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
INPUTS = {'images': 'images', 'serving_default': 'image_bytes'}


def answer(run, signature, inputs):
    if signature == 'images':
        inputs = np.array(inputs, np.uint8).reshape(-1, 32, 32, 3)
    else:
        inputs = [base64.b64decode(each) for each in inputs]
    try:
        outputs = run(signature, inputs)
    except tf.errors.OpError as error:
        return {'error': type(error).__name__, 'message': str(error)}
    classes, scores = outputs['classes'], outputs['scores']
    return {
        'classes': [[name.decode('utf-8') for name in row] for row in classes],
        'scores': scores.tolist(),
        'shape': classes.shape,
    }


def describe(infos):
    """Dict of name -> type and shape."""
    return {
        key: [tf.dtypes.as_dtype(info.dtype).name, [dim.size for dim in info.tensor_shape.dim]]
        for key, info in infos.items()
    }


def with_session(folder, requests):
    """The signatures, and the answers in a session of TensorFlow 1."""
    with tf.Graph().as_default(), v1.Session() as session:
        signatures = v1.saved_model.load(session, ['serve'], folder).signature_def

        def run(signature, given):
            name = signatures[signature].inputs[INPUTS[signature]].name
            outputs = signatures[signature].outputs
            return session.run({key: info.name for key, info in outputs.items()}, {name: given})

        shown = {
            name: [describe(each.inputs), describe(each.outputs), each.method_name]
            for name, each in signatures.items()
        }
        return shown, {name: answer(run, *request) for name, request in requests.items()}


def with_function(folder, requests):
    """The answers of TensorFlow 2's functions."""
    signatures = tf.saved_model.load(folder, tags=['serve']).signatures

    def run(signature, given):
        given = tf.constant(given, tf.uint8 if signature == 'images' else tf.string)
        outputs = signatures[signature](**{INPUTS[signature]: given})
        return {key: tensor.numpy() for key, tensor in outputs.items()}

    return {name: answer(run, *request) for name, request in requests.items()}


job = json.load(sys.stdin)
result = {'version': tf.__version__}
for views, folder in job['folders'].items():
    signatures, answers = with_session(folder, job['requests'])
    result[views] = {'signatures': signatures, 'session': answers}
    if tf.__version__[0] == '2':
        result[views]['function'] = with_function(folder, job['requests'])
json.dump(result, sys.stdout)
