"""From pictures to a model in use: convert, train, evaluate, predict, export, record.

The tests draw the pictures: once of 3 classes, and the accuracy has to be high; once of 12 classes,
with the constants for the sizes of images doubled and a short training.
"""

import collections
import contextlib
import csv
import importlib.util
import io
import json
import os
import re

from absl.testing import flagsaver
import numpy as np
from PIL import Image
import pytest

import cifar10
import cifar10_convert
import cifar10_eval
import cifar10_export
import cifar10_input
import cifar10_predict
import cifar10_train
from results import pictures, record
from support.compat import tf
from tests import harness, reference

HUES = ['red', 'blå', 'green']  # Not sorted.
PATTERNS = ['rows', 'plain', 'columns', 'checks']


def draw(name, random, size):
    """A picture of a class, [size, size, 3] uint8."""
    pattern, hue = name.split()
    y, x = np.mgrid[:size, :size] * 8 * np.pi / size
    waves = {
        'plain': 0 * y,
        'rows': np.sin(y),
        'columns': np.sin(x),
        'checks': np.sin(y) * np.sin(x),
    }
    angle = 2 * np.pi * (HUES.index(hue) + np.arange(3)) / 3
    image = 128 + 50 * np.cos(angle) + 45 * np.sign(waves[pattern])[..., np.newaxis]
    return (image + random.uniform(-15, 15, image.shape)).astype(np.uint8)


def draw_pictures(folder, names, per_class, size, seed):
    """Writes FOLDER/CLASS/0.png ... Returns dict of path -> (class, image)."""
    random = np.random.RandomState(seed)
    drawn = {}
    for name in names:
        os.makedirs(f'{folder}/{name}')
        for i in range(per_class):
            path = f'{folder}/{name}/{i}.png'
            drawn[path] = name, draw(name, random, size)
            Image.fromarray(drawn[path][1]).save(path)
    return drawn


Model = collections.namedtuple('Model', 'folder classes size steps drawn new printed')


@pytest.fixture(
    scope='module', params=[(PATTERNS[:1], 32, 40), (PATTERNS, 64, 3)], ids=['32x32', '64x64']
)
def model(request, tmp_path_factory):
    """A Model: all files of it are below `folder`; `printed` is the output of each script."""
    patterns, size, steps = request.param
    folder = str(tmp_path_factory.mktemp('model'))
    classes = sorted(f'{pattern} {hue}' for pattern in patterns for hue in HUES)
    drawn = draw_pictures(folder + '/pictures', classes, 24 if size == 32 else 6, size, seed=0)
    new = draw_pictures(folder + '/new', classes, 4 if size == 32 else 1, size, seed=1)
    printed = {}

    def run(script, *argv, **flags):
        output = io.StringIO()
        with flagsaver.flagsaver(), tf.Graph().as_default(), contextlib.redirect_stdout(output):
            folders = {f'{name}_dir': f'{folder}/{name}' for name in ('data', 'train', 'eval')}
            harness.set_flags(checkpoint_dir=folder + '/train', **dict(folders, **flags))
            assert script.main([script.__name__, *argv]) in (None, 0)
        printed[script.__name__] = output.getvalue().splitlines()

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(cifar10, 'INITIAL_LEARNING_RATE', 0.02)  # 0.1 may kill a layer.
        patch.setattr(cifar10_input, 'RECORD_SIZE', size)
        patch.setattr(cifar10_input, 'IMAGE_SIZE', size * 3 // 4)
        patch.setattr(cifar10_input, 'RECORD_BYTES', 1 + 3 * size * size)
        run(cifar10_convert, folder + '/pictures')
        run(cifar10_train, max_steps=steps, batch_size=16)
        run(cifar10_eval, run_once=True, views='10', batch_size=16)
        run(cifar10_predict, *new, json=True, views='10')
        run(cifar10_export, export_dir=folder + '/export', views='10')
        run(record, record_dir=folder + '/record', batch_size=16)
        if importlib.util.find_spec('matplotlib'):
            run(pictures, record_dir=folder + '/record')
    return Model(folder, classes, size, steps, drawn, new, printed)


def names_in(folder):
    with open(folder + '/batches.meta.txt', encoding='utf-8') as file:
        return file.read().splitlines()


def predicted(model):
    """Dict of path -> dict of class -> probability, most probable first."""
    lines = [json.loads(line) for line in model.printed['cifar10_predict']]
    return {
        line['picture']: {each['class']: each['probability'] for each in line['classes']}
        for line in lines
    }


def assert_right(model, named):
    """After enough steps, `named`, path -> class, are the classes that were drawn."""
    right = np.mean([named[path] == name for path, (name, _) in model.new.items()])
    assert model.steps < 10 or right >= 0.9


def test_pictures_become_records_of_named_classes(model):
    target = f'{model.folder}/data/{reference.DATA_FOLDER}'
    assert names_in(target) == model.classes and target in model.printed['cifar10_convert'][-1]
    found = b''.join(harness.contents(target)[f'{target}/{name}'] for name in reference.DATA_FILES)
    size = 1 + 3 * model.size**2
    expected = [
        reference.records([image], [model.classes.index(name)])
        for name, image in model.drawn.values()
    ]
    assert sorted(found[i : i + size] for i in range(0, len(found), size)) == sorted(expected)


def test_trainer_does_not_call_them_cifar_images(model):
    lines = model.printed['cifar10_train']
    (filling,) = [line for line in lines if line.startswith('Filling queue with ')]
    assert int(re.search(r'\d+ images', filling).group().split()[0]) == 4 * len(model.drawn) // 12
    assert 'CIFAR' not in '\n'.join(lines)


def test_model_has_the_names_and_sizes_of_its_data(model):
    assert names_in(model.folder + '/train') == model.classes
    values = reference.read_checkpoint(f'{model.folder}/train/model.ckpt-{model.steps}')
    assert values['softmax_linear/weights'].shape == (192, len(model.classes))
    assert values['local3/weights'].shape == ((model.size * 3 // 16) ** 2 * 64, 384)


def test_predictions_are_right_and_those_of_numpy(model):
    classes = predicted(model)
    assert list(classes) == list(model.new)
    assert_right(model, {path: next(iter(classes[path])) for path in classes})
    path, (_, image) = next(iter(model.new.items()))
    values = reference.read_checkpoint(f'{model.folder}/train/model.ckpt-{model.steps}')
    averages = {name: values[name + reference.AVERAGE] for name in reference.MODEL}
    [expected] = reference.probabilities(averages, image[np.newaxis], 10)
    found = [classes[path][name] for name in model.classes]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('signature', ['serving_default', 'images'])
def test_exported_model_answers_as_the_predictor(model, signature):
    inputs = [image for _, image in model.new.values()]
    if signature == 'serving_default':
        inputs = [harness.contents(model.folder + '/new')[path] for path in model.new]
    with tf.Session() as session:
        export = f'{model.folder}/export/{model.steps}'
        loaded = tf.saved_model.loader.load(session, ['serve'], export).signature_def[signature]
        ((_, given),) = loaded.inputs.items()
        classes, scores = session.run(
            [loaded.outputs['classes'].name, loaded.outputs['scores'].name], {given.name: inputs}
        )
    for path, names, row in zip(model.new, classes, scores):
        expected = predicted(model)[path]
        np.testing.assert_allclose(row, [expected[name.decode()] for name in names], atol=1e-4)


def test_evaluation_and_record_have_a_high_accuracy(model):
    printed = re.search(r'precision @ 1 = (\S+) \(10 views\)', model.printed['cifar10_eval'][-1])
    with open(model.folder + '/record/checkpoints.csv', newline='') as file:
        recorded = list(csv.DictReader(file))[-1]['precision']
    assert model.steps < 10 or min(float(printed.group(1)), float(recorded)) >= 0.9
    assert names_in(model.folder + '/record') == model.classes
    for path in re.findall(r'\S+\.png', ' '.join(model.printed.get('results.pictures', []))):
        assert min(Image.open(path).size) > 100
