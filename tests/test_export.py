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

EXPORT = 'cifar10_export.py'
OTHER = os.path.join(harness.FOLDER, '.venv', 'tf2' if tf.__version__.startswith('1.') else 'tf1')


def export(folder, checkpoint_dir, views='1', **values):
    """Exports in this process, with the default values of the script."""
    harness.set_flags(export_dir=str(folder), checkpoint_dir=checkpoint_dir, views=views, **values)
    cifar10_export.main([EXPORT])


def encode(image, kind='PNG', **options):
    contents = io.BytesIO()
    image.save(contents, kind, **options)
    return contents.getvalue()


IMAGES = reference.rectangle_images(5)


def requests():
    """Dict of name -> (signature, inputs)."""
    pngs = [encode(Image.fromarray(image)) for image in IMAGES]
    large = Image.fromarray(IMAGES[2]).resize((96, 96), Image.NEAREST)
    jpeg = encode(Image.fromarray(IMAGES[1]), 'JPEG', quality=100, subsampling=0)
    huge = Image.new('1', (9000, 9000))
    faults = {
        'text': b'Not a picture.',
        'empty': b'',
        'PNG signature': pngs[0][:12],
        'GIF': encode(large, 'GIF'),
        'BMP': encode(large, 'BMP'),
        'huge PNG': encode(huge),
        'huge JPEG': encode(huge, 'JPEG'),
        'truncated PNG': pngs[0][:-30],
        'truncated JPEG': jpeg[:100],
    }
    found = {name: ('serving_default', [pngs[0], each, pngs[1]]) for name, each in faults.items()}
    found['pictures'] = 'serving_default', pngs
    found['images'] = 'images', IMAGES.tolist()
    found['one picture'] = 'serving_default', pngs[3:4]
    found['one image'] = 'images', IMAGES[3:4].tolist()
    found['no picture'] = 'serving_default', []
    found['no image'] = 'images', []
    found['mixed pictures'] = 'serving_default', [pngs[4], encode(large), jpeg]
    return found


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
def answers(exported, tmp_path_factory):
    """What a client of this generation gets, and one of the other, if it is installed."""
    folder = tmp_path_factory.mktemp('answers')
    job = json.dumps(
        {'folders': exported, 'requests': requests()},
        default=lambda contents: base64.b64encode(contents).decode(),
    )
    (folder / 'job').write_text(job)
    env = dict(harness.script_environment(), TF_CPP_MIN_LOG_LEVEL='2')
    path = os.path.join(harness.FOLDER, 'tests', 'programs', 'serving_client.py')
    pythons = sys.executable, os.path.join(OTHER, 'bin', 'python')
    started = [
        subprocess.Popen(
            [python, path], env=env, stdin=(folder / 'job').open(), stdout=subprocess.PIPE
        )
        for python in pythons
        if os.path.exists(python)
    ]
    return [json.loads(client.communicate()[0].decode()) for client in started]


@pytest.fixture(params=[0, 1], ids=['this generation', 'other generation'])
def client(request, answers):
    if request.param == len(answers):
        pytest.skip('the other generation of TensorFlow is not installed')
    is_own = answers[request.param]['version'][0] == tf.__version__[0]
    assert is_own == (request.param == 0)
    return answers[request.param]


@pytest.fixture(params=['1', '10'])
def views(request):
    return request.param


def answers_to(client, views, name):
    """The answers to a request, one for each way to load a model."""
    ways = ['session', 'function'] if client['version'].startswith('2') else ['session']
    return [client[views][way][name] for way in ways]


def test_signatures_have_documented_names_types_and_shapes(client, views):
    outputs = {'classes': ['string', [-1, 7]], 'scores': ['float32', [-1, 7]]}
    method = 'tensorflow/serving/predict'
    assert client[views]['signatures'] == {
        'serving_default': [{'image_bytes': ['string', [-1]]}, outputs, method],
        'images': [{'images': ['uint8', [-1, 32, 32, 3]]}, outputs, method],
    }


@pytest.mark.parametrize(
    'name, rows',
    [('one picture', [3]), ('one image', [3]), ('pictures', range(5)), ('images', range(5))],
)
def test_answers_are_the_probabilities_of_numpy(client, views, seven_classes, name, rows):
    expected = reference.probabilities(seven_classes.averages, IMAGES, int(views))[rows]
    order = np.argsort(-expected, axis=1)
    for answer in answers_to(client, views, name):
        assert answer['shape'] == [len(rows), 7]
        assert answer['classes'] == [[seven_classes.names[i] for i in row] for row in order]
        np.testing.assert_allclose(answer['scores'], -np.sort(-expected, axis=1), atol=2e-5)


def test_pictures_of_several_kinds_and_sizes_fit_into_one_request(client, views, seven_classes):
    expected = reference.probabilities(seven_classes.averages, IMAGES, int(views))
    for answer in answers_to(client, views, 'mixed pictures'):
        assert answer['shape'] == [3, 7]
        for names, scores, row in zip(answer['classes'], answer['scores'], [4, 2, 1]):
            found = [dict(zip(names, scores))[name] for name in seven_classes.names]
            distances = np.abs(expected - found).sum(axis=1)
            assert distances.argmin() == row


@pytest.mark.parametrize('name', ['no picture', 'no image'])
def test_empty_request_gets_an_empty_answer_or_an_error(client, views, name):
    for answer in answers_to(client, views, name):
        empty = {'classes': [], 'scores': [], 'shape': [0, 7]}
        assert answer == empty or answer['error'] == 'InvalidArgumentError'


@pytest.mark.parametrize(
    'name, part',
    [(name, 'image_bytes[1]') for name in ('text', 'empty', 'PNG signature', 'GIF', 'BMP')]
    + [('huge PNG', '64000000 pixels'), ('huge JPEG', '64000000 pixels')]
    + [('truncated PNG', 'PNG'), ('truncated JPEG', 'JPEG')],
)
def test_bad_picture_is_an_error_that_names_it(client, views, name, part):
    for answer in answers_to(client, views, name):
        assert answer['error'] == 'InvalidArgumentError' and part in answer['message']
        assert 'image_bytes[1]' in answer['message'] or name.startswith('truncated')


def test_folder_is_readable_for_everybody(exported):
    mask = os.umask(0)
    os.umask(mask)
    for folder in exported.values():
        assert os.path.exists(folder + '/saved_model.pb')
        assert os.stat(folder).st_mode & 0o777 == 0o777 & ~mask


def test_published_model_is_the_default(start, tmp_path):
    exporter = start(EXPORT, f'--export_dir={tmp_path}', f'--data_dir={tmp_path}/nowhere')
    assert exporter.wait() == 0, exporter.stderr
    assert exporter.errors == []
    (line,) = exporter.lines
    assert f'{tmp_path}/150000' in line and f'{harness.FOLDER}/results/model.ckpt-150000' in line
    assert os.listdir(str(tmp_path)) == ['150000']
    saved = reference.read_checkpoint(f'{tmp_path}/150000/variables/variables')
    values = reference.read_checkpoint(f'{harness.FOLDER}/results/model.ckpt-150000')
    assert sorted(saved) == sorted(reference.MODEL)
    for name in reference.MODEL:
        assert np.array_equal(saved[name], values[name + reference.AVERAGE])


def test_single_checkpoint_can_be_exported(seven_classes, tmp_path):
    export(tmp_path, seven_classes.folder + '/model.ckpt-5')
    saved = reference.read_checkpoint(f'{tmp_path}/5/variables/variables')
    biases = reference.variables_of_seven_classes(3)['conv1/biases']
    assert np.array_equal(saved['conv1/biases'], biases)


@pytest.mark.parametrize('kind', ['model', 'broken link'])
def test_existing_model_is_left_alone(seven_classes, tmp_path, kind):
    target = tmp_path / '1000'
    if kind == 'broken link':
        target.symlink_to('nowhere')
    else:
        target.mkdir()
        (target / 'saved_model.pb').write_text('mine')
    before = harness.contents(tmp_path)
    with pytest.raises(script.UserError, match=str(target)):
        export(tmp_path, seven_classes.folder)
    assert harness.contents(tmp_path) == before and os.listdir(str(tmp_path)) == ['1000']


def test_use_fp16_is_rejected(seven_classes, tmp_path):
    with pytest.raises(script.UserError, match='--use_fp16'):
        export(tmp_path, seven_classes.folder, use_fp16=True)


def test_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(script.UserError, match=str(tmp_path / 'none')):
        export(tmp_path / 'exported', str(tmp_path / 'none'))
    assert os.listdir(str(tmp_path / 'exported')) == []


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), 'TensorFlow'])
def test_full_disk_leaves_nothing(seven_classes, tmp_path, monkeypatch, error):
    if error == 'TensorFlow':
        error = tf.errors.ResourceExhaustedError(None, None, 'No space left on device')
    save = tf.saved_model.Builder.save

    def fail(self):
        save(self)
        raise error

    monkeypatch.setattr(tf.saved_model.Builder, 'save', fail)
    with pytest.raises(script.UserError, match=f'{tmp_path}.*No space left'):
        export(tmp_path, seven_classes.folder)
    assert os.listdir(str(tmp_path)) == []


def test_killed_export_leaves_no_model(start, seven_classes, tmp_path):
    arguments = [f'--checkpoint_dir={seven_classes.folder}', f'--export_dir={tmp_path}']
    killed = start(EXPORT, *arguments, before='import tests.programs.killed_export')
    assert killed.wait() == -signal.SIGKILL
    assert [name for name in os.listdir(str(tmp_path)) if name[0] != '.'] == []
    export(tmp_path, seven_classes.folder)
    assert (tmp_path / '1000' / 'saved_model.pb').exists()
