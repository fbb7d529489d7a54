"""Tests of cifar10_export.py. Plain TensorFlow of both generations loads what it writes."""

import base64
import io
import json
import os
import signal
import subprocess
import sys

from absl.testing import flagsaver
import numpy as np
from PIL import Image
import pytest

import cifar10_export
from support import script
from support.compat import tf
from tests import harness, reference

OTHER = os.path.join(harness.FOLDER, '.venv', 'tf2' if tf.__version__.startswith('1.') else 'tf1')
IMAGES = reference.rectangle_images(5)


def export(folder, checkpoint_dir, views='1', **values):
    """Exports in this process, with the default values of the script."""
    harness.set_flags(export_dir=str(folder), checkpoint_dir=checkpoint_dir, views=views, **values)
    cifar10_export.main([''])


def encode(image, kind='PNG', **options):
    contents = io.BytesIO()
    image.save(contents, kind, **options)
    return contents.getvalue()


def requests():
    """Dict of name -> (signature, inputs)."""
    pngs = [encode(Image.fromarray(image)) for image in IMAGES]
    large = encode(Image.fromarray(IMAGES[2]).resize((96, 96), Image.NEAREST))
    jpeg = encode(Image.fromarray(IMAGES[1]), 'JPEG', quality=100, subsampling=0)
    huge = Image.new('1', (9000, 9000))
    faults = {
        'GIF': encode(Image.fromarray(IMAGES[0]), 'GIF'),
        'PNG signature': pngs[0][:12],
        'huge PNG': encode(huge),
        'huge JPEG': encode(huge, 'JPEG'),
        'truncated PNG': pngs[0][:-30],
        'truncated JPEG': jpeg[:100],
    }
    found = {name: ('serving_default', [pngs[0], each, pngs[1]]) for name, each in faults.items()}
    found.update(pictures=('serving_default', pngs), images=('images', IMAGES.tolist()))
    return dict(found, mixed=('serving_default', [pngs[4], large, jpeg]))


@pytest.fixture(scope='module')
def exported(seven_classes, tmp_path_factory):
    """Dict of views -> folder of the exported model."""
    folders = {}
    for views in '1', '10':
        parent = tmp_path_factory.mktemp('exported') / 'new' / 'models'
        with flagsaver.flagsaver(), tf.Graph().as_default():
            export(parent, seven_classes.folder, views)
        assert os.listdir(str(parent)) == ['1000']
        folders[views] = str(parent / '1000')
    return folders


@pytest.fixture(scope='module')
def clients(exported, tmp_path_factory):
    """The answers to a client of this generation, and to one of the other, if it is installed."""
    path = tmp_path_factory.mktemp('clients') / 'job'
    job = {'folders': exported, 'requests': requests()}
    path.write_text(json.dumps(job, default=lambda data: base64.b64encode(data).decode()))
    env = dict(harness.script_environment(), TF_CPP_MIN_LOG_LEVEL='2')
    program = os.path.join(harness.FOLDER, 'tests', 'programs', 'serving_client.py')
    started = [
        subprocess.Popen([python, program], env=env, stdin=path.open(), stdout=subprocess.PIPE)
        for python in (sys.executable, os.path.join(OTHER, 'bin', 'python'))
        if os.path.exists(python)
    ]
    return [json.loads(client.communicate()[0].decode()) for client in started]


@pytest.fixture(params=[0, 1], ids=['this generation', 'other generation'])
def client(request, clients):
    if request.param == len(clients):
        pytest.skip('the other generation of TensorFlow is not installed')
    client = clients[request.param]
    assert (client['version'][0] == tf.__version__[0]) == (request.param == 0)
    return client


def answers_to(client, name):
    """The number of views and the answer, for both models and each way to load a model."""
    for views in 1, 10:
        for way in ['session', 'function'] if client['version'][0] == '2' else ['session']:
            yield views, client[str(views)][way][name]


def test_signatures_have_documented_names_types_and_shapes(client):
    outputs = {'classes': ['string', [-1, 7]], 'scores': ['float32', [-1, 7]]}
    method = 'tensorflow/serving/predict'
    for views in '1', '10':
        assert client[views]['signatures'] == {
            'serving_default': [{'image_bytes': ['string', [-1]]}, outputs, method],
            'images': [{'images': ['uint8', [-1, 32, 32, 3]]}, outputs, method],
        }


def test_answers_are_the_probabilities_of_numpy(client, seven_classes):
    expected = {n: reference.probabilities(seven_classes.averages, IMAGES, n) for n in (1, 10)}
    for name in 'pictures', 'images':
        for views, answer in answers_to(client, name):
            order = np.argsort(-expected[views], axis=1)
            assert answer['classes'] == [[seven_classes.names[i] for i in row] for row in order]
            scores = -np.sort(-expected[views], axis=1)
            np.testing.assert_allclose(answer['scores'], scores, atol=2e-5)
    for views, answer in answers_to(client, 'mixed'):  # Kinds and sizes.
        for names, scores, row in zip(answer['classes'], answer['scores'], [4, 2, 1]):
            found = [dict(zip(names, scores))[name] for name in seven_classes.names]
            assert np.abs(expected[views] - found).sum(axis=1).argmin() == row
        assert answer['shape'] == [3, 7]


@pytest.mark.parametrize(
    'name, part',
    [('GIF', 'image_bytes[1]'), ('PNG signature', 'image_bytes[1]'), ('truncated PNG', 'PNG')]
    + [('truncated JPEG', 'JPEG'), ('huge PNG', '64000000'), ('huge JPEG', '64000000')],
)
def test_bad_picture_is_an_error_that_names_it(client, name, part):
    for _, answer in answers_to(client, name):
        assert answer['error'] == 'InvalidArgumentError' and part in answer['message']
        assert 'image_bytes[1]' in answer['message'] or name.startswith('truncated')


def test_averages_of_one_checkpoint_can_be_exported(seven_classes, tmp_path):
    export(tmp_path, seven_classes.folder + '/model.ckpt-5')
    saved = reference.read_checkpoint(f'{tmp_path}/5/variables/variables')
    expected = reference.variables_of_seven_classes(3)
    assert sorted(saved) == sorted(expected)
    assert all(np.array_equal(saved[name], expected[name]) for name in saved)


def test_errors_leave_the_folder_alone(seven_classes, tmp_path, file_size_limit):
    def expect_error(pattern, checkpoint_dir, **values):
        with pytest.raises(script.UserError, match=pattern):
            export(tmp_path, checkpoint_dir, **values)
        assert os.listdir(str(tmp_path)) == before

    before = []
    expect_error(f'{tmp_path}/none', f'{tmp_path}/none')
    file_size_limit(100000)
    expect_error(f'cannot write to {tmp_path}: .*File too large', seven_classes.folder)
    before = ['1000']
    (tmp_path / '1000').mkdir()
    expect_error(f'{tmp_path}/1000 exists', seven_classes.folder)
    expect_error('--use_fp16', seven_classes.folder, use_fp16=True)


def test_killed_export_leaves_no_model(start, seven_classes, tmp_path):
    flags = f'--checkpoint_dir={seven_classes.folder}', f'--export_dir={tmp_path}'
    die = 'import os, signal; os.rename = lambda *args: os.kill(os.getpid(), signal.SIGKILL)'
    assert start('cifar10_export.py', *flags, before=die).wait() == -signal.SIGKILL
    (unfinished,) = os.listdir(str(tmp_path))
    assert unfinished.startswith('.export-')
    export(tmp_path, seven_classes.folder)
    assert (tmp_path / '1000' / 'saved_model.pb').exists()
    (tmp_path / 'usual').mkdir()  # Not as private as a temporary folder.
    assert (tmp_path / '1000').stat().st_mode == (tmp_path / 'usual').stat().st_mode
