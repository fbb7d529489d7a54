"""From 48x48 pictures of three classes to a model in use: convert, train, evaluate, export ..."""

import contextlib
import io
import json
import re
import types

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
from results import record
from support import dataset
from support.compat import tf
from tests import harness, reference

CLASSES = ['blå', 'green', 'red']
SIZE, STEPS = 48, 40


def draw_pictures(folder, per_class, seed):
    """Writes FOLDER/CLASS/0.png ... Returns dict of path -> (label, image)."""
    random = np.random.RandomState(seed)
    drawn = {}
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            image = random.uniform(80, 110, [SIZE, SIZE, 3]) + 100 * (np.arange(3) == label)
            drawn[f'{folder}/{name}/{i}.png'] = label, image.astype(np.uint8)
    for path, (_, image) in drawn.items():
        Image.fromarray(image).save(path)
    return drawn


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """All files are below `folder`; `printed` has the output of each script."""
    folder = tmp_path_factory.mktemp('model')
    model = types.SimpleNamespace(folder=folder, printed={})
    model.drawn = draw_pictures(folder / 'pictures', 24, seed=0)
    model.new = draw_pictures(folder / 'new', 4, seed=1)

    def run(script, *argv, **flags):
        output = io.StringIO()
        with flagsaver.flagsaver(), tf.Graph().as_default(), contextlib.redirect_stdout(output):
            for name in 'data', 'train', 'eval', 'export', 'record':
                flags[f'{name}_dir'] = str(folder / name)
            harness.set_flags(checkpoint_dir=str(folder / 'train'), batch_size=16, **flags)
            assert script.main(['', *argv]) in (None, 0)
        model.printed[script] = output.getvalue()

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(cifar10, 'INITIAL_LEARNING_RATE', 0.02)  # 0.1 may kill a layer.
        patch.setattr(cifar10_input, 'RECORD_SIZE', SIZE)
        patch.setattr(cifar10_input, 'IMAGE_SIZE', SIZE * 3 // 4)
        patch.setattr(cifar10_input, 'RECORD_BYTES', 1 + 3 * SIZE * SIZE)
        run(cifar10_convert, str(folder / 'pictures'))
        run(cifar10_train, max_steps=STEPS)
        run(cifar10_eval, run_once=True, views='10')
        run(cifar10_predict, *model.new, json=True, views='10')
        run(cifar10_export, views='10')
        run(record)
    model.values = reference.read_checkpoint(folder / 'train' / f'model.ckpt-{STEPS}')
    return model


def test_data_set_and_model_have_the_names_and_sizes_of_the_pictures(model):
    target = model.folder / 'data' / reference.DATA_FOLDER
    for folder in target, model.folder / 'train', model.folder / 'record':
        assert dataset.class_names(str(folder)) == CLASSES
    found = b''.join((target / name).read_bytes() for name in reference.DATA_FILES)
    expected = [reference.records([image], [label]) for label, image in model.drawn.values()]
    parts = range(0, len(found), 1 + 3 * SIZE**2)
    assert sorted(found[i : i + parts.step] for i in parts) == sorted(expected)
    assert model.values['softmax_linear/weights'].shape == (192, len(CLASSES))
    assert model.values['local3/weights'].shape == ((SIZE * 3 // 16) ** 2 * 64, 384)
    assert ' 24 images ' in model.printed[cifar10_train]  # Not CIFAR images.


def test_answers_are_right_and_those_of_numpy(model):
    _, image = next(iter(model.new.values()))
    averages = {name: model.values[name + reference.AVERAGE] for name in reference.MODEL}
    expected = reference.probabilities(averages, image[np.newaxis], 10)
    lines = [json.loads(line) for line in model.printed[cifar10_predict].splitlines()]
    answers = [{one['class']: one['probability'] for one in line['classes']} for line in lines]
    contents = [open(path, 'rb').read() for path in model.new]
    with tf.Session() as session:
        loaded = tf.saved_model.loader.load(session, ['serve'], f'{model.folder}/export/{STEPS}')
        signature = loaded.signature_def['serving_default']
        (given,) = signature.inputs.values()
        outputs = [signature.outputs[name].name for name in ('classes', 'scores')]
        rows = zip(*session.run(outputs, {given.name: contents}))
    answers += [{name.decode(): score for name, score in zip(*row)} for row in rows]
    values = np.array([[answer[name] for name in CLASSES] for answer in answers])
    predicted, exported = np.split(values, 2)
    np.testing.assert_allclose(predicted[:1], expected, atol=1e-4)
    np.testing.assert_allclose(exported, predicted, atol=1e-4)
    assert np.mean(predicted.argmax(axis=1) == np.repeat(range(3), 4)) >= 0.9
    precision = re.search(r'precision @ 1 = (\S+) \(10 views\)', model.printed[cifar10_eval])
    assert float(precision.group(1)) >= 0.9
