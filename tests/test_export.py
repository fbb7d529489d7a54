"""Tests of cifar10_export.py: what it writes, loaded by plain TensorFlow of both generations."""

import base64
import collections
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from support.compat import tf
from tests import harness, reference

EXPORT = 'cifar10_export.py'
OTHER = os.path.join(harness.FOLDER, '.venv', 'tf2' if tf.__version__.startswith('1.') else 'tf1')
NAMES = ['Bär', 'fire engine', 'apple', 'x', 'no. 5', 'ship', 'zebra']
STEP = 1000

# --- What is expected --------------------------------------------------------


Model = collections.namedtuple('Model', 'folder images expected')  # Views -> [5, 7].


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """Two checkpoints of 7 classes and their names; and five images with their probabilities."""
    folder = tmp_path_factory.mktemp('model')

    variables = reference.variables_of_seven_classes
    for step, seed in (900, 4), (STEP, 1):
        values = reference.checkpoint_values(step, variables(seed + 10), variables(seed))
        reference.write_checkpoint(folder, step, values)
    text = ''.join(f'{name}\n' for name in NAMES)
    (folder / 'batches.meta.txt').write_bytes(text.encode())
    images = reference.rectangle_images(5)
    expected = {views: reference.probabilities(variables(1), images, views) for views in (1, 10)}
    for rows in expected.values():
        assert len(set(rows.argmax(axis=1))) > 1
    assert np.abs(expected[10] - expected[1]).max() > 0.01
    return Model(str(folder), images, expected)


# --- A program that is not ours ----------------------------------------------

# With nothing but TensorFlow. Reads {requests: {views: [[signature, inputs], ...]}, folders} as
# JSON; writes what the models answer: by views, request and way of loading, a list.
_CLIENT = r'''
import base64, json, sys
import numpy as np
import tensorflow as tf

def value(signature, inputs):
    if signature == 'images':
        return np.array(inputs, np.uint8).reshape(-1, 32, 32, 3)
    return [base64.b64decode(each) for each in inputs]

def answer(run, signature, inputs):
    try:
        outputs = run(signature, value(signature, inputs))
    except tf.errors.OpError as error:
        return {'error': type(error).__name__}
    return {'classes': [[name.decode('utf-8') for name in row] for row in outputs['classes']],
            'scores': outputs['scores'].tolist(), 'shape': outputs['classes'].shape}

def describe(infos):
    return {key: [tf.dtypes.as_dtype(info.dtype).name,
                  [dim.size for dim in info.tensor_shape.dim]] for key, info in infos.items()}

def by_session(folder, requests):
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        meta = v1.saved_model.load(session, ['serve'], folder)
        signatures = meta.signature_def
        def run(signature, given):
            [name] = [info.name for info in signatures[signature].inputs.values()]
            outputs = signatures[signature].outputs
            return session.run({key: info.name for key, info in outputs.items()}, {name: given})
        shown = {name: [describe(each.inputs), describe(each.outputs), each.method_name]
                 for name, each in signatures.items()}
        return shown, [answer(run, *request) for request in requests]

def by_function(folder, requests):
    signatures = tf.saved_model.load(folder, tags=['serve']).signatures
    def run(signature, given):
        given = tf.constant(given, tf.uint8 if signature == 'images' else tf.string)
        name = 'images' if signature == 'images' else 'image_bytes'
        outputs = signatures[signature](**{name: given})
        return {key: tensor.numpy() for key, tensor in outputs.items()}
    return [answer(run, *request) for request in requests]

job = json.load(sys.stdin)
result = {'version': tf.__version__}
for views, folder in job['folders'].items():
    signatures, answers = by_session(folder, job['requests'])
    result[views] = {'signatures': signatures, 'session': answers}
    if tf.__version__[0] == '2':
        result[views]['function'] = by_function(folder, job['requests'])
json.dump(result, sys.stdout)
'''

Served = collections.namedtuple('Served', 'folders requests answers')


def encoded(image, kind='PNG'):
    contents = io.BytesIO()
    Image.fromarray(image).save(contents, kind)
    return base64.b64encode(contents.getvalue()).decode()


@pytest.fixture(scope='module')
def exported(start, model, tmp_path_factory):
    """Dict of views -> the folder that was written for them."""
    folders, scripts = {}, []
    for views in 1, 10:
        folder = tmp_path_factory.mktemp(f'views{views}') / 'new' / 'models'
        flags = [f'--checkpoint_dir={model.folder}', f'--export_dir={folder}', f'--views={views}']
        scripts.append(start(EXPORT, *flags))
        folders[views] = str(folder / str(STEP))
    for script, folder in zip(scripts, folders.values()):
        assert script.wait() == 0, script.stderr
        assert script.errors == []
        assert script.lines == [f'Saved {folder}, the model {model.folder}/model.ckpt-{STEP}.']
    return folders


@pytest.fixture(scope='module')
def requests(model):
    """Dict of what -> (signature, inputs)."""
    pngs = [encoded(image) for image in model.images]
    large = np.kron(model.images[2], np.ones([3, 3, 1], np.uint8))
    broken = base64.b64encode(b'Not a picture.').decode()
    images = model.images.tolist()
    return collections.OrderedDict(
        [
            ('five pictures', ('serving_default', pngs)),
            ('five images', ('images', images)),
            ('one picture', ('serving_default', pngs[3:4])),
            ('one image', ('images', images[3:4])),
            ('no picture', ('serving_default', [])),
            ('no image', ('images', [])),
            ('a broken picture', ('serving_default', [pngs[0], broken, pngs[1]])),
            ('a bitmap', ('serving_default', [encoded(model.images[0], 'BMP')])),
            ('other pictures', ('serving_default', [pngs[4], pngs[1], encoded(large)])),
        ]
    )


@pytest.fixture(scope='module')
def clients(exported, requests):
    """Function that returns what a program of this generation, or of the other, was answered.

    Both start at once.
    """
    job = {'folders': exported, 'requests': list(requests.values())}
    pythons = [sys.executable]
    if os.path.exists(os.path.join(OTHER, 'ready')):
        pythons.append(os.path.join(OTHER, 'bin', 'python'))
    started = []
    for python in pythons:
        client = subprocess.Popen(
            [python, '-c', _CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(harness.script_environment(), TF_CPP_MIN_LOG_LEVEL='2'),
            universal_newlines=True,
        )
        client.stdin.write(json.dumps(job))
        client.stdin.close()
        client.stdin = None  # Or communicate() would flush it.
        started.append(client)
    ends = [client.communicate(timeout=harness.TIMEOUT) for client in started]

    def result(which):
        if which == len(started):
            pytest.skip('the other generation of TensorFlow is not in .venv')
        out, err = ends[which]
        assert started[which].returncode == 0, err
        return json.loads(out)

    return result


@pytest.fixture(params=['this generation', 'the other generation'])
def client(request, clients):
    result = clients(request.param == 'the other generation')
    own = result['version'][0] == tf.__version__[0]
    assert own == (request.param == 'this generation')
    return result


@pytest.fixture(params=[1, 10])
def views(request):
    return request.param


def answers_of(client, views, requests, what):
    """What was answered to a request, by way of loading."""
    found = client[str(views)]
    ways = ['session', 'function'] if client['version'].startswith('2') else ['session']
    return [found[way][list(requests).index(what)] for way in ways]


def assert_answer(answer, expected):
    """Classes and scores of these probabilities, most probable first."""
    order = np.argsort(-expected, axis=1)
    assert answer['shape'] == [len(expected), len(NAMES)]
    assert answer['classes'] == [[NAMES[i] for i in row] for row in order]
    np.testing.assert_allclose(answer['scores'], -np.sort(-expected, axis=1), atol=2e-5)


# --- What is served ----------------------------------------------------------


def test_signatures_are_as_documented(client, views):
    outputs = {'classes': ['string', [-1, 7]], 'scores': ['float32', [-1, 7]]}
    method = 'tensorflow/serving/predict'
    assert client[str(views)]['signatures'] == {
        'serving_default': [{'image_bytes': ['string', [-1]]}, outputs, method],
        'images': [{'images': ['uint8', [-1, 32, 32, 3]]}, outputs, method],
    }


@pytest.mark.parametrize('what', ['five pictures', 'five images'])
def test_served_probabilities_match_numpy(client, views, model, requests, what):
    for answer in answers_of(client, views, requests, what):
        assert_answer(answer, model.expected[views])


@pytest.mark.parametrize('what', ['one picture', 'one image'])
def test_single_picture_gets_the_same_answer(client, views, model, requests, what):
    for answer in answers_of(client, views, requests, what):
        assert_answer(answer, model.expected[views][3:4])


@pytest.mark.parametrize('what', ['no picture', 'no image'])
def test_empty_request(client, views, requests, what):
    empty = {'classes': [], 'scores': [], 'shape': [0, 7]}
    # The convolutions of 2.21 refuse what holds no image.
    possible = [empty, {'error': 'InvalidArgumentError'}]
    for answer in answers_of(client, views, requests, what):
        assert answer in (possible if client['version'].startswith('2') else [empty])


def test_pictures_of_several_sizes_in_one_request(client, views, model, requests):
    # What is three times as large, and each pixel nine, shrinks to nearly the same.
    for answer in answers_of(client, views, requests, 'other pictures'):
        expected = model.expected[views][[4, 1]]
        first = {key: answer[key][:2] for key in ('classes', 'scores')}
        assert_answer(dict(first, shape=[2, 7]), expected)
        assert answer['shape'] == [3, 7]
        third = dict(zip(answer['classes'][2], answer['scores'][2]))
        shrunk = [third[name] for name in NAMES]
        distances = [np.abs(row - shrunk).sum() for row in model.expected[views]]
        assert np.argmin(distances) == 2


@pytest.mark.parametrize('what', ['a broken picture', 'a bitmap'])
def test_unsupported_picture_makes_request_an_error(client, views, requests, what):
    for answer in answers_of(client, views, requests, what):
        assert answer == {'error': 'InvalidArgumentError'}


# --- What is written ---------------------------------------------------------


def contents_of(folder):
    """Dict of path -> bytes, None for a folder."""
    found = {}
    for parent, folders, files in os.walk(str(folder)):
        found.update({os.path.join(parent, name): None for name in folders})
        for name in files:
            with open(os.path.join(parent, name), 'rb') as file:
                found[os.path.join(parent, name)] = file.read()
    return found


def test_export_folder_holds_only_the_readable_model(exported):
    for folder in exported.values():
        assert os.listdir(os.path.dirname(folder)) == [str(STEP)]
        found = {os.path.relpath(path, folder) for path in contents_of(folder)}
        assert {'saved_model.pb', 'variables', 'variables/variables.index'} <= found
        mask = os.umask(0)
        os.umask(mask)
        assert os.stat(folder).st_mode & 0o777 == 0o777 & ~mask


def test_published_model_is_the_default(start, tmp_path):
    export = start(EXPORT, f'--export_dir={tmp_path}', f'--data_dir={tmp_path}/nowhere')
    assert export.wait() == 0, export.stderr
    assert export.lines == [
        f'Saved {tmp_path}/150000, the model {harness.FOLDER}/results/model.ckpt-150000.'
    ]
    assert os.listdir(str(tmp_path)) == ['150000']
    there = reference.read_checkpoint(f'{tmp_path}/150000/variables/variables')
    values = reference.read_checkpoint(f'{harness.FOLDER}/results/model.ckpt-150000')
    assert sorted(there) == sorted(reference.MODEL)
    for name in reference.MODEL:
        assert np.array_equal(there[name], values[name + reference.AVERAGE])


@pytest.mark.parametrize('what', ['model', 'empty folder', 'file'])
def test_existing_export_is_kept(start, model, tmp_path, what):
    if what == 'file':
        (tmp_path / str(STEP)).write_text('mine')
    else:
        (tmp_path / str(STEP)).mkdir()
    if what == 'model':
        (tmp_path / str(STEP) / 'saved_model.pb').write_text('mine')
    before = contents_of(tmp_path)
    export = start(EXPORT, f'--checkpoint_dir={model.folder}', f'--export_dir={tmp_path}')
    assert export.wait() == 1
    assert export.stdout == ''
    assert len(export.errors) == 1
    assert f'{tmp_path}/{STEP}' in export.errors[0]
    assert contents_of(tmp_path) == before


# Ends the process, or fails, when all is written but the name.
_INTERRUPT = '''
import os
import tensorflow.compat.v1 as tf
save = tf.saved_model.Builder.save
def interrupted(self, *args, **kwargs):
    save(self, *args, **kwargs)
    %s
tf.saved_model.Builder.save = interrupted
'''


@pytest.mark.parametrize(
    'how, status',
    [
        ('raise OSError(28, "No space left on device")', 1),
        ('os.kill(os.getpid(), 9)', -signal.SIGKILL),
    ],
    ids=['failed', 'killed'],
)
def test_interrupted_export_is_never_served(start, model, tmp_path, how, status):
    flags = [f'--checkpoint_dir={model.folder}', f'--export_dir={tmp_path}', '--views=1']
    export = start(EXPORT, *flags, before=_INTERRUPT % how)
    assert export.wait() == status
    assert export.stdout == ''
    assert [name for name in os.listdir(str(tmp_path)) if name.isdigit()] == []
    if status == 1:
        assert os.listdir(str(tmp_path)) == []
        return
    again = start(EXPORT, *flags)
    assert again.wait() == 0, again.stderr
    assert os.path.exists(f'{tmp_path}/{STEP}/saved_model.pb')


def test_unusable_checkpoint_writes_nothing(start, model, tmp_path):
    path = reference.write_checkpoint(
        tmp_path / 'ten', 3, reference.read_checkpoint(f'{model.folder}/model.ckpt-{STEP}')
    )
    none, ten = (
        start(EXPORT, f'--checkpoint_dir={tmp_path}/{name}', f'--export_dir={tmp_path}/{name}-out')
        for name in ('none', 'ten')
    )
    assert none.wait() == ten.wait() == 1
    assert [len(none.errors), len(ten.errors)] == [1, 1]
    assert f'--checkpoint_dir={tmp_path}/none' in none.errors[0]
    assert path in ten.errors[0] and 'batches.meta.txt' in ten.errors[0]
    for name in 'none-out', 'ten-out':
        assert not os.path.exists(f'{tmp_path}/{name}') or os.listdir(f'{tmp_path}/{name}') == []
