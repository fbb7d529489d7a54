"""Tests of cifar10_export.py. Plain TensorFlow of both generations loads what it writes."""

import base64
import io
import json
import os
import signal
import subprocess
import sys

from absl import flags
import numpy as np
from PIL import Image
import pytest

import cifar10_export
from support import script
from support.compat import tf
from tests import harness
from tests import reference

FLAGS = flags.FLAGS
EXPORT = 'cifar10_export.py'
OTHER = os.path.join(harness.FOLDER, '.venv', 'tf2' if tf.__version__.startswith('1.') else 'tf1')


def export(folder, checkpoint_dir, views='1', **values):
    """Exports in this process, with the default values of the script."""
    values.update(export_dir=str(folder), checkpoint_dir=checkpoint_dir, views=views)
    for name, value in values.items():
        setattr(FLAGS, name, value)
    cifar10_export.main([EXPORT])


# --- A served model --------------------------------------------------------------


def encode(image, kind='PNG', **options):
    contents = io.BytesIO()
    image.save(contents, kind, **options)
    return contents.getvalue()


@pytest.fixture(scope='module')
def images():
    return reference.rectangle_images(5)


@pytest.fixture(scope='module')
def requests(images):
    """Dict of name -> (signature, inputs)."""
    pngs = [encode(Image.fromarray(image)) for image in images]
    large = Image.fromarray(images[2]).resize((96, 96), Image.NEAREST)
    jpeg = encode(Image.fromarray(images[1]), 'JPEG', quality=100, subsampling=0)
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
    found.update(
        {
            'pictures': ('serving_default', pngs),
            'images': ('images', images.tolist()),
            'one picture': ('serving_default', pngs[3:4]),
            'one image': ('images', images[3:4].tolist()),
            'no picture': ('serving_default', []),
            'no image': ('images', []),
            'mixed pictures': ('serving_default', [pngs[4], encode(large), jpeg]),
        }
    )
    return found


@pytest.fixture(scope='module')
def exported(seven_classes, tmp_path_factory):
    """Dict of views -> folder of the exported model."""
    folders = {}
    for views in '1', '10':
        parent = tmp_path_factory.mktemp('exported') / 'new' / 'models'
        with tf.Graph().as_default():
            export(parent, seven_classes.folder, views)
        assert os.listdir(str(parent)) == ['1000']
        folders[views] = str(parent / '1000')
    return folders


@pytest.fixture(scope='module')
def answers(exported, requests):
    """Function that returns what a client of this or the other generation gets. See the client."""
    job = json.dumps(
        {'folders': exported, 'requests': requests},
        default=lambda contents: base64.b64encode(contents).decode(),
    )
    pythons = [sys.executable]
    if os.path.exists(os.path.join(OTHER, 'bin', 'python')):
        pythons.append(os.path.join(OTHER, 'bin', 'python'))
    env = dict(harness.script_environment(), TF_CPP_MIN_LOG_LEVEL='2')
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    path = os.path.join(harness.FOLDER, 'tests', 'programs', 'serving_client.py')
    started = [subprocess.Popen([python, path], env=env, **pipes) for python in pythons]
    for client in started:
        client.stdin.write(job.encode())
        client.stdin.close()
        client.stdin = None  # Or communicate() would flush it.
    ends = [client.communicate(timeout=harness.TIMEOUT) for client in started]

    def result(number):
        if number == len(started):
            pytest.skip('the other generation of TensorFlow is not installed')
        assert started[number].returncode == 0, ends[number][1].decode()
        return json.loads(ends[number][0].decode())

    return result


@pytest.fixture(params=['this generation', 'other generation'])
def client(request, answers):
    found = answers(['this generation', 'other generation'].index(request.param))
    is_own = found['version'][0] == tf.__version__[0]
    assert is_own == (request.param == 'this generation')
    return found


@pytest.fixture(params=['1', '10'])
def views(request):
    return request.param


def answers_to(client, views, name):
    """The answers to a request, one for each way to load a model."""
    ways = ['session', 'function'] if client['version'].startswith('2') else ['session']
    return [client[views][way][name] for way in ways]


def assert_answer(answer, names, expected):
    """Classes and scores of these probabilities, most probable first."""
    order = np.argsort(-expected, axis=1)
    assert answer['shape'] == [len(expected), len(names)]
    assert answer['classes'] == [[names[i] for i in row] for row in order]
    np.testing.assert_allclose(answer['scores'], -np.sort(-expected, axis=1), atol=2e-5)


def test_signatures_have_documented_names_types_and_shapes(client, views):
    outputs = {'classes': ['string', [-1, 7]], 'scores': ['float32', [-1, 7]]}
    method = 'tensorflow/serving/predict'
    assert client[views]['signatures'] == {
        'serving_default': [{'image_bytes': ['string', [-1]]}, outputs, method],
        'images': [{'images': ['uint8', [-1, 32, 32, 3]]}, outputs, method],
    }


def test_answers_are_the_probabilities_of_numpy(client, views, seven_classes, images):
    expected = reference.probabilities(seven_classes.averages, images, int(views))
    assert len(set(expected.argmax(axis=1))) > 1
    for name, rows in (
        ('picture', [3]),
        ('image', [3]),
        ('pictures', range(5)),
        ('images', range(5)),
    ):
        for answer in answers_to(client, views, 'one ' + name if len(rows) == 1 else name):
            assert_answer(answer, seven_classes.names, expected[rows])


def test_pictures_of_several_kinds_and_sizes_fit_into_one_request(
    client, views, seven_classes, images
):
    expected = reference.probabilities(seven_classes.averages, images, int(views))
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
    [
        ('text', 'image_bytes[1]'),
        ('empty', 'image_bytes[1]'),
        ('PNG signature', 'image_bytes[1]'),
        ('GIF', 'image_bytes[1]'),
        ('BMP', 'image_bytes[1]'),
        ('huge PNG', 'image_bytes[1]'),
        ('huge PNG', '64000000 pixels'),
        ('huge JPEG', 'image_bytes[1]'),
        ('truncated PNG', 'PNG'),
        ('truncated JPEG', 'JPEG'),
    ],
)
def test_bad_picture_is_an_error_that_names_it(client, views, name, part):
    for answer in answers_to(client, views, name):
        assert answer['error'] == 'InvalidArgumentError'
        assert part in answer['message']


# --- The files -------------------------------------------------------------------


def contents_of(folder):
    """Dict of path -> bytes, or None for a folder."""
    return {path: None if path.is_dir() else path.read_bytes() for path in folder.rglob('*')}


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


@pytest.mark.parametrize('kind', ['model', 'empty folder', 'file', 'broken link'])
def test_existing_model_is_left_alone(seven_classes, tmp_path, kind):
    target = tmp_path / '1000'
    if kind == 'file':
        target.write_text('mine')
    elif kind == 'broken link':
        target.symlink_to('nowhere')
    else:
        target.mkdir()
        if kind == 'model':
            (target / 'saved_model.pb').write_text('mine')
    before = sorted(os.listdir(str(tmp_path)))
    with pytest.raises(script.UserError, match=str(target)):
        export(tmp_path, seven_classes.folder)
    assert sorted(os.listdir(str(tmp_path))) == before
    assert kind != 'model' or (target / 'saved_model.pb').read_text() == 'mine'


@pytest.mark.parametrize('place', ['file', 'file/below', 'gs://bucket'])
def test_unusable_export_dir_is_rejected(seven_classes, tmp_path, place):
    (tmp_path / 'file').write_text('')
    place = place if '://' in place else str(tmp_path / place)
    with pytest.raises(script.UserError, match=f'--export_dir={place}'):
        export(place, seven_classes.folder)


def test_use_fp16_is_rejected(seven_classes, tmp_path):
    with pytest.raises(script.UserError, match='--use_fp16'):
        export(tmp_path, seven_classes.folder, use_fp16=True)


def test_missing_checkpoint_and_wrong_class_names_are_errors(seven_classes, tmp_path):
    values = reference.read_checkpoint(seven_classes.folder + '/model.ckpt-5')
    reference.write_checkpoint(tmp_path / 'unnamed', 5, values)
    for name in 'none', 'unnamed':
        with pytest.raises(script.UserError, match=str(tmp_path / name)):
            export(tmp_path / 'exported', str(tmp_path / name))
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
    kill = '''
import os
from support.compat import tf
save = tf.saved_model.Builder.save
def killed(self):
    save(self)
    os.kill(os.getpid(), 9)
tf.saved_model.Builder.save = killed
'''
    arguments = [f'--checkpoint_dir={seven_classes.folder}', f'--export_dir={tmp_path}']
    assert start(EXPORT, *arguments, before=kill).wait() == -signal.SIGKILL
    assert [name for name in os.listdir(str(tmp_path)) if name[0] != '.'] == []
    export(tmp_path, seven_classes.folder)
    assert (tmp_path / '1000' / 'saved_model.pb').exists()
