"""The whole way with pictures of one's own: convert, train, evaluate, predict, export, record.

Of 3 classes and of 20, which the test draws: five hues, each plain and with three patterns.
Where NumPy or Pillow cannot tell what is right, the class that a picture was drawn of does.
"""

import collections
import csv
import io
import json
import os
import re
import shutil

import numpy as np
from PIL import Image
import pytest
import tensorflow.compat.v1 as tf

from tests import harness
from tests import reference

CONVERT = 'cifar10_convert.py'
PREDICT = 'cifar10_predict.py'
EXPORT = 'cifar10_export.py'
RECORD = os.path.join('results', 'record.py')
PICTURES = os.path.join('results', 'pictures.py')

PATTERNS = ['plain', 'rows', 'columns', 'checks']
HUES = ['red', 'yellow', 'green', 'blå', 'violet']
# In the order in which the scripts have to number them.
CLASSES = sorted(f'{pattern} {hue}' for pattern in PATTERNS for hue in HUES)
CLASSES_OF = {3: ['plain green', 'plain red', 'rows blå'], 20: CLASSES}

# With so few images the usual rate of 0.1 may kill a layer.
SLOW_LEARNER = 'import cifar10; cifar10.INITIAL_LEARNING_RATE = 0.02'


def draw(name, random, size=None):
    """A picture of a class, [height, width, 3] uint8: any size, its pattern once in 8 of 32."""
    pattern, hue = name.split()
    height, width = (size, size) if size else random.randint(32, 72, 2)
    y, x = np.mgrid[:height, :width] * 8 * np.pi / min(height, width)
    waves = {
        'plain': 0 * y,
        'rows': np.sin(y),
        'columns': np.sin(x),
        'checks': np.sin(y) * np.sin(x),
    }
    angle = 2 * np.pi * (HUES.index(hue) / len(HUES) + np.arange(3) / 3)
    image = 128 + 50 * np.cos(angle) + 45 * np.sign(waves[pattern])[..., np.newaxis]
    return (image + random.uniform(-15, 15, image.shape)).astype(np.uint8)


def draw_folders(folder, names, per_class, size=None):
    """FOLDER/CLASS/0.png, ... Returns dict of class -> its images."""
    random = np.random.RandomState(0)
    drawn = {name: [draw(name, random, size) for _ in range(per_class)] for name in names}
    for name, images in drawn.items():
        os.makedirs(f'{folder}/{name}')
        for i, image in enumerate(images):
            Image.fromarray(image).save(f'{folder}/{name}/{i}.png')
    return drawn


def draw_new(folder, names, per_class):
    """Pictures that were not trained on, in files of three kinds. Dict of path -> class."""
    random = np.random.RandomState(1)
    os.makedirs(folder)
    paths = {}
    for i, name in enumerate(names * per_class):
        path = f'{folder}/{i}.{("png", "bmp", "jpg")[i % 3]}'
        Image.fromarray(draw(name, random)).save(path)
        paths[path] = name
    return paths


def succeeded(script):
    assert script.wait() == 0, script.stdout + script.stderr
    assert script.errors == []
    return script


def contents_of(folder):
    """Dict of path -> bytes, of everything below a folder but locks."""
    return {
        os.path.join(parent, name): open(os.path.join(parent, name), 'rb').read()
        for parent, _, names in os.walk(str(folder))
        for name in names
        if name != '.lock'
    }


Own = collections.namedtuple('Own', 'classes folder data train new converter trainer followers')


@pytest.fixture(scope='module', params=[3, 20], ids='{} classes'.format)
def own(request, start, tmp_path_factory):
    """A data set and a model of one's own; `followers` are the scripts that make use of them."""
    classes = CLASSES_OF[request.param]
    folder = str(tmp_path_factory.mktemp('own'))
    data, train = f'--data_dir={folder}/data', f'{folder}/train'
    draw_folders(folder + '/pictures', classes, per_class=24)
    converter = succeeded(start(CONVERT, folder + '/pictures', data))
    trainer = start(
        harness.TRAIN,
        f'--train_dir={train}',
        data,
        '--batch_size=16' if request.param == 3 else '--batch_size=32',
        '--max_steps=60' if request.param == 3 else '--max_steps=150',
        before=SLOW_LEARNER,
    )
    succeeded(trainer)
    new = draw_new(folder + '/new', classes, per_class=4 if request.param == 3 else 1)
    model = f'--checkpoint_dir={train}'
    evaluate = [harness.EVAL, data, model, '--run_once']
    followers = {
        '1 view': start(*evaluate, '--views=1', f'--eval_dir={folder}/eval1'),
        '10 views': start(*evaluate, '--views=10', f'--eval_dir={folder}/eval10'),
        'lines': start(PREDICT, model, '--top_k=1', *new),
        'json': start(PREDICT, model, '--json', *new),
        'export': start(EXPORT, model, f'--export_dir={folder}/export'),
        'record': start(RECORD, data, f'--train_dir={train}', f'--record_dir={folder}/record'),
    }
    return Own(classes, folder, folder + '/data', train, new, converter, trainer, followers)


def finished(own, follower):
    return succeeded(own.followers[follower])


# --- The stages --------------------------------------------------------------


def test_the_pictures_become_a_data_set_of_named_classes(own):
    n = len(own.classes)
    target = f'{own.data}/{reference.DATA_FOLDER}'
    assert re.match(
        rf'Saved {target}: {20 * n} .*\b{4 * n} .*\b{n} classes.*\b0 unreadable',
        own.converter.lines[-1],
    )
    assert sorted(os.listdir(target)) == sorted(['batches.meta.txt', *reference.DATA_FILES])
    with open(target + '/batches.meta.txt', encoding='utf-8') as file:
        assert file.read().splitlines() == own.classes


def test_the_trainer_speaks_of_images_and_leaves_the_names_with_its_model(own):
    filling = [line for line in own.trainer.lines if line.startswith('Filling queue')]
    assert filling == [
        f'Filling queue with {8 * len(own.classes)} images before starting to train. '
        'This will take a few seconds.'
    ]
    assert 'CIFAR' not in own.trainer.stdout
    with open(own.train + '/batches.meta.txt', encoding='utf-8') as file:
        assert file.read().splitlines() == own.classes
    values = reference.read_checkpoint(tf.train.latest_checkpoint(own.train))
    assert values['softmax_linear/weights'].shape == (192, len(own.classes))


@pytest.mark.parametrize('views, remark', [('1 view', ''), ('10 views', ' (10 views)')])
def test_the_evaluator_finds_a_high_precision(own, views, remark):
    evaluating, precision = finished(own, views).lines[-2:]
    assert evaluating.endswith(f' on {4 * len(own.classes)} images.')
    figure = re.search(r': precision @ 1 = (\d\.\d{3})' + re.escape(remark) + '$', precision)
    assert float(figure.group(1)) >= 0.9


def right(own, named):
    """The part of new pictures for which dict `named`, path -> class, has the class drawn."""
    assert set(named) == set(own.new)
    return np.mean([named[path] == name for path, name in own.new.items()])


def test_new_pictures_are_called_by_their_names(own):
    lines = [line.rsplit(': ', 1) for line in finished(own, 'lines').lines]
    assert [path for path, _ in lines] == list(own.new)
    assert all(re.match(r'\w+ \w+ [01]\.\d\d$', said) for _, said in lines)
    assert right(own, {path: said.rsplit(' ', 1)[0] for path, said in lines}) >= 0.9


def predicted(own):
    """Dict of path -> dict of class -> probability, most probable first."""
    lines = [json.loads(line) for line in finished(own, 'json').lines]
    return {
        line['picture']: {each['class']: each['probability'] for each in line['classes']}
        for line in lines
    }


def test_in_json_every_class_has_its_probability(own):
    classes = predicted(own)
    for probabilities in classes.values():
        assert sorted(probabilities) == own.classes
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
    assert right(own, {path: next(iter(classes[path])) for path in classes}) >= 0.9


def test_the_exported_model_gives_the_names_and_probabilities_of_the_predictor(own):
    (step,) = os.listdir(own.folder + '/export') if finished(own, 'export') else ()
    assert step == tf.train.latest_checkpoint(own.train).rsplit('-', 1)[1]
    with tf.Session() as session:
        model = tf.saved_model.loader.load(session, ['serve'], f'{own.folder}/export/{step}')
        signature = model.signature_def['serving_default']
        pictures = []
        for path in own.new:
            contents = io.BytesIO()
            Image.open(path).convert('RGB').save(contents, 'PNG')  # The model reads no BMP.
            pictures.append(contents.getvalue())
        classes, scores = session.run(
            [signature.outputs['classes'].name, signature.outputs['scores'].name],
            {signature.inputs['image_bytes'].name: pictures},
        )
    served = [[name.decode() for name in row] for row in classes]
    assert right(own, {path: row[0] for path, row in zip(own.new, served)}) >= 0.9
    for path, names, row in zip(own.new, served, scores):
        expected = predicted(own)[path]
        assert sorted(names) == own.classes
        np.testing.assert_allclose(row, [expected[name] for name in names], atol=1e-4)


def test_the_record_of_the_run_has_the_precision_of_the_evaluator_and_the_names(own):
    finished(own, 'record')
    folder = own.folder + '/record'
    with open(folder + '/batches.meta.txt', encoding='utf-8') as file:
        assert file.read().splitlines() == own.classes
    with open(folder + '/checkpoints.csv', newline='') as file:
        recorded = list(csv.DictReader(file))[-1]['precision']
    printed = re.search(r'precision @ 1 = (\S+)', finished(own, '1 view').stdout).group(1)
    assert float(recorded) == pytest.approx(float(printed), abs=0.0006)


def test_the_record_is_drawn_whatever_the_number_of_classes(own, start):
    pytest.importorskip('matplotlib')
    finished(own, 'record')
    folder = own.folder + '/record'
    succeeded(start(PICTURES, f'--data_dir={own.data}', f'--record_dir={folder}', fresh=True))
    for name in 'confusion.png', 'errors.png':
        assert min(Image.open(f'{folder}/{name}').size) > 100


# --- Another data set, other sizes -------------------------------------------


def test_with_as_many_other_classes_an_old_train_dir_is_refused_and_left_alone(
    own, start, tmp_path
):
    data, train_dir = str(tmp_path / 'data'), str(tmp_path / 'train')
    shutil.copytree(own.data, data)
    names = tmp_path / 'data' / reference.DATA_FOLDER / 'batches.meta.txt'
    names.write_text('other\n' + names.read_text(encoding='utf-8'), encoding='utf-8')
    lines = names.read_text(encoding='utf-8').splitlines()[:-1]
    names.write_text('\n'.join(lines), encoding='utf-8')
    shutil.copytree(own.train, train_dir)
    before = contents_of(train_dir)
    trainer = start(harness.TRAIN, f'--data_dir={data}', f'--train_dir={train_dir}')
    assert trainer.wait() == 1
    (error,) = trainer.errors
    assert f'{train_dir} has ' in error and data in error and error.endswith('--data_dir.')
    assert contents_of(train_dir) == before


def test_with_another_number_of_classes_an_old_train_dir_is_refused_and_left_alone(
    own, start, tmp_path
):
    labels = np.arange(60) % 5
    reference.write_data(tmp_path / 'data', reference.random_images(60), labels, test_images=10)
    names = tmp_path / 'data' / reference.DATA_FOLDER / 'batches.meta.txt'
    names.write_text('one\ntwo\nthree\nfour\nfive\n')
    train_dir = str(tmp_path / 'train')
    shutil.copytree(own.train, train_dir)
    before = contents_of(train_dir)
    trainer = start(
        harness.TRAIN, f'--data_dir={tmp_path}/data', f'--train_dir={train_dir}', '--batch_size=8'
    )
    assert trainer.wait() == 1
    (error,) = trainer.errors
    assert f'{train_dir} has {len(own.classes)} classes' in error and error.endswith('--data_dir.')
    assert contents_of(train_dir) == before


def test_with_two_constants_changed_everything_works_on_images_of_another_size(
    tmp_path, monkeypatch
):
    copy = tmp_path / 'copy'
    copy.mkdir()
    for path in sorted(os.listdir(harness.FOLDER)):
        if re.match(r'cifar10.*\.py$', path):
            shutil.copy(os.path.join(harness.FOLDER, path), str(copy))
    for folder in 'support', 'results', 'tests/programs':
        shutil.copytree(os.path.join(harness.FOLDER, folder), str(copy / folder))
    text = (copy / 'cifar10_input.py').read_text()
    for old, new in [
        ('RECORD_SIZE = 32', 'RECORD_SIZE = 64'),
        ('IMAGE_SIZE = 24', 'IMAGE_SIZE = 48'),
    ]:
        assert len(re.findall(f'^{old}', text, re.MULTILINE)) == 1
        text = re.sub(f'^{old}', new, text, flags=re.MULTILINE)
    (copy / 'cifar10_input.py').write_text(text)
    monkeypatch.setattr(harness, 'FOLDER', str(copy))
    (tmp_path / 'output').mkdir()
    start = harness.Starter(tmp_path / 'output')
    try:
        go_the_whole_way_with_64_pixels(start, str(tmp_path))
    finally:
        start.end()


def go_the_whole_way_with_64_pixels(start, folder):
    classes = CLASSES_OF[3]
    drawn = draw_folders(folder + '/pictures', classes, per_class=12, size=64)
    data, model = f'--data_dir={folder}/data', f'--checkpoint_dir={folder}/train'
    batch = '--batch_size=8'
    succeeded(start(CONVERT, folder + '/pictures', data))
    found = b''
    for name in reference.DATA_FILES:
        path = f'{folder}/data/{reference.DATA_FOLDER}/{name}'
        found += open(path, 'rb').read()
    size = 1 + 3 * 64 * 64
    assert len(found) == 36 * size
    expected = [
        reference.records([image], [label])
        for label, name in enumerate(classes)
        for image in drawn[name]
    ]
    assert sorted(found[i : i + size] for i in range(0, len(found), size)) == sorted(expected)

    train = f'--train_dir={folder}/train'
    succeeded(start(harness.TRAIN, data, train, batch, '--max_steps=3'))
    values = reference.read_checkpoint(f'{folder}/train/model.ckpt-3')
    assert values['local3/weights'].shape == (12 * 12 * 64, 384)

    picture = folder + '/pictures/plain red/3.png'
    evaluate = [harness.EVAL, data, model, batch, '--run_once', f'--eval_dir={folder}/eval']
    followers = [
        start(PREDICT, model, '--json', picture),
        start(EXPORT, model, f'--export_dir={folder}/export'),
        start(*evaluate, '--views=10'),
        start(RECORD, data, train, f'--record_dir={folder}/record'),
    ]
    predictor, _, evaluator, _ = [succeeded(follower) for follower in followers]
    assert re.search(r'on 6 images\.\n.*precision @ 1 = \d.*\(10 views\)', evaluator.stdout)
    said = {each['class']: each['probability'] for each in json.loads(predictor.stdout)['classes']}
    image = drawn['plain red'][3]

    # Ten windows of 48x48, by hand; softmax of NumPy's network.
    windows = [image[y : y + 48, x : x + 48] for y in (0, 16) for x in (0, 16)]
    windows.append(image[8:56, 8:56])
    windows += [window[:, ::-1] for window in windows]
    averages = {name: values[name + reference.AVERAGE] for name in reference.MODEL}
    logits = reference.logits(averages, reference.standardize(np.stack(windows)))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose([said[name] for name in classes], shares.mean(axis=0), atol=1e-4)

    with tf.Session() as session:
        loaded = tf.saved_model.loader.load(session, ['serve'], folder + '/export/3')
        signature = loaded.signature_def['images']
        shape = [dim.size for dim in signature.inputs['images'].tensor_shape.dim]
        assert shape == [-1, 64, 64, 3]
        names, scores = session.run(
            [signature.outputs['classes'].name, signature.outputs['scores'].name],
            {signature.inputs['images'].name: [image, image]},
        )
    for row, probabilities in zip(names, scores):
        np.testing.assert_allclose(probabilities, [said[name.decode()] for name in row], atol=1e-4)
