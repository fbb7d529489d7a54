"""Tests of the number of classes, their names, and the views of an image: one source for all."""

import os

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_input
from support import script
from tests import reference

FLAGS = tf.flags.FLAGS

CIFAR_10 = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


# --- Names -------------------------------------------------------------------


def test_without_a_file_the_classes_are_those_of_cifar_10(tmp_path):
    assert cifar10_input.class_names(str(tmp_path)) == CIFAR_10
    assert cifar10_input.class_names(str(tmp_path / 'missing')) == CIFAR_10


@pytest.mark.parametrize(
    'contents, names',
    [
        ('\n'.join(CIFAR_10) + '\n\n', CIFAR_10),  # As in the official archive.
        ('b\na\n', ['b', 'a']),
        ('b\r\na', ['b', 'a']),
        ('große Katze\n小鳥\n', ['große Katze', '小鳥']),
    ],
    ids=['official', 'order', 'from Windows', 'UTF-8'],
)
def test_the_names_stand_in_a_file_one_a_line_in_the_order_of_the_labels(tmp_path, contents, names):
    (tmp_path / 'batches.meta.txt').write_bytes(contents.encode())
    assert cifar10_input.class_names(str(tmp_path)) == names


def test_names_that_were_written_are_read_again(tmp_path):
    names = ['große Katze', '小鳥', 'a', 'B']
    cifar10_input.write_class_names(str(tmp_path), names)
    written = (tmp_path / 'batches.meta.txt').read_bytes()
    assert written == 'große Katze\n小鳥\na\nB\n'.encode()
    assert cifar10_input.class_names(str(tmp_path)) == names


def test_the_published_model_has_the_names_of_cifar_10():
    results = os.path.join(os.path.dirname(cifar10.__file__), 'results')
    assert os.path.exists(results + '/batches.meta.txt')
    assert cifar10_input.class_names(results) == CIFAR_10


# --- The check of a data set -------------------------------------------------


def write_data(folder, labels, names):
    """A data set of one's own, with names if there are any."""
    images = reference.random_images(len(labels))
    reference.write_data(folder, images, labels, test_images=len(labels) // 6)
    FLAGS.data_dir = str(folder)
    if names:
        path = folder / reference.DATA_FOLDER / 'batches.meta.txt'
        path.write_text(''.join(f'{name}\n' for name in names))


@pytest.mark.parametrize(
    'classes, largest, problem',
    [
        (20, 19, None),
        (20, 20, 'has the label 20, but labels go from 0 to 19'),
        (None, 9, None),
        (None, 10, 'has the label 10, but labels go from 0 to 9'),
        (2, 1, None),
        (2, 2, 'has the label 2, but labels go from 0 to 1'),
        (256, 255, None),
        (1, 0, 'names 1 classes; 2 to 256 are possible'),
        (257, 255, 'names 257 classes; 2 to 256 are possible'),
    ],
)
def test_the_names_decide_on_which_labels_there_may_be(tmp_path, classes, largest, problem):
    labels = np.zeros(12, int)
    labels[-1] = largest
    write_data(tmp_path, labels, [f'class {i}' for i in range(classes or 0)])
    if problem is None:
        cifar10.maybe_download_and_extract()
        assert len(cifar10.class_names()) == (classes or 10)
    else:
        with pytest.raises(script.UserError) as error:
            cifar10.maybe_download_and_extract()
        assert problem in str(error.value)
        assert str(tmp_path / reference.DATA_FOLDER) in str(error.value)
        assert (
            largest == 0 or classes == 257 or 'data_batch_5.bin: record 1 has' in str(error.value)
        )


@pytest.mark.parametrize('names, kind', [(None, 'CIFAR images'), (['a', 'b'], 'images')])
def test_the_trainer_fills_its_queue_with_cifar_images_or_just_images(
    tmp_path, capsys, names, kind
):
    write_data(tmp_path, np.arange(60) % 2, names)
    cifar10.distorted_inputs()
    filling = f'Filling queue with 20 {kind} before starting to train.'
    assert capsys.readouterr().out.startswith(filling)


# --- The network -------------------------------------------------------------


@pytest.mark.parametrize('arguments, classes', [([], 10), ([7], 7), ([2], 2), ([256], 256)])
def test_the_network_has_an_output_for_each_class(arguments, classes):
    logits = cifar10.inference(tf.zeros([3, 24, 24, 3]), *arguments)
    assert logits.shape.as_list() == [3, classes]
    shapes = {variable.op.name: variable.shape.as_list() for variable in tf.trainable_variables()}
    expected = {name: shape for name, (shape, _) in reference.MODEL.items()}
    expected['softmax_linear/weights'] = [192, classes]
    expected['softmax_linear/biases'] = [classes]
    assert shapes == expected


# --- Views -------------------------------------------------------------------


def windows(images):
    """The ten views of [n, 32, 32, 3] before they are standardized, [n, 10, 24, 24, 3]."""
    corners = [(4, 4), (0, 0), (0, 8), (8, 0), (8, 8)]
    plain = [np.stack([image[y : y + 24, x : x + 24] for image in images]) for y, x in corners]
    return np.stack(plain + [each[:, :, ::-1, :] for each in plain], axis=1)


def standardized(views):
    return reference.standardize(views.reshape([-1, 24, 24, 3])).reshape(views.shape)


@pytest.mark.parametrize('num_views', [1, 10])
def test_fixed_views_are_centre_corners_and_their_mirror_images_each_standardized(num_views):
    pixels = reference.rectangle_images(9)
    views = cifar10_input.fixed_views(tf.constant(pixels), num_views)
    assert (views.dtype, views.shape.as_list()) == (tf.float32, [9, num_views, 24, 24, 3])
    with tf.Session() as session:
        found = session.run(views)
    expected = standardized(windows(pixels)[:, :num_views])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found.mean(axis=(2, 3, 4)), 0, atol=1e-5)


def test_the_number_of_images_need_not_be_known():
    pixels = tf.placeholder(tf.uint8, [None, 32, 32, 3])
    views = cifar10_input.fixed_views(pixels, 10)
    assert views.shape.as_list() == [None, 10, 24, 24, 3]
    with tf.Session() as session:
        for n in 0, 2:
            found = session.run(views, {pixels: np.zeros([n, 32, 32, 3])})
            np.testing.assert_array_equal(found, np.zeros([n, 10, 24, 24, 3]))


@pytest.mark.parametrize('eval_data', [True, False], ids=['test set', 'training set'])
def test_the_input_gives_the_ten_views_of_each_record_once(tmp_path, eval_data):
    pixels = reference.random_images(90)
    reference.write_data(tmp_path, pixels, np.arange(90), test_images=40)
    folder = str(tmp_path / reference.DATA_FOLDER)
    images, labels = cifar10_input.inputs(eval_data, folder, 16, num_views=10)
    assert (images.dtype, images.shape.as_list()) == (tf.float32, [None, 10, 24, 24, 3])
    assert (labels.dtype, labels.shape.as_list()) == (tf.int32, [None])
    batches = []
    with tf.train.SingularMonitoredSession() as session:
        while not session.should_stop():
            batches.append(session.run([images, labels]))
    views, numbers = (np.concatenate(each) for each in zip(*batches))
    expected = range(40) if eval_data else range(40, 90)
    assert sorted(numbers) == list(expected)
    np.testing.assert_allclose(views, standardized(windows(pixels[numbers])), atol=1e-4)


@pytest.mark.parametrize('num_views, classes', [(1, 10), (10, 10), (10, 4)])
def test_probabilities_are_the_mean_over_the_views_of_numpys_softmax(num_views, classes):
    pixels = reference.rectangle_images(6)
    values = reference.random_variables(2, local3=3, local4=3)
    values['softmax_linear/weights'] = values['softmax_linear/weights'][:, :classes] * 30
    values['softmax_linear/biases'] = values['softmax_linear/biases'][:classes]
    views = standardized(windows(pixels)[:, :num_views])
    logits = reference.logits(values, views.reshape([-1, 24, 24, 3]))
    shares = np.exp(logits) / np.sum(np.exp(logits), axis=1, keepdims=True)
    per_view = shares.reshape([6, num_views, classes])
    expected = per_view.mean(axis=1)
    if num_views == 10:  # Else another way to average would pass.
        mean_logits = logits.reshape(per_view.shape).mean(axis=1)
        other = np.exp(mean_logits) / np.sum(np.exp(mean_logits), axis=1, keepdims=True)
        assert abs(other - expected).max() > 0.01

    batch = tf.placeholder(tf.float32, [None, num_views, 24, 24, 3])
    probabilities = cifar10.probabilities(batch, classes, num_views)
    assert probabilities.shape.as_list() == [None, classes]
    with tf.Session() as session:
        for variable in tf.trainable_variables():
            variable.load(values[variable.op.name], session)
        found = session.run(probabilities, {batch: views})
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_single_view_may_come_without_a_dimension_of_its_own():
    images = tf.placeholder(tf.float32, [None, 24, 24, 3])
    probabilities = cifar10.probabilities(images, 10, 1)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        found = session.run(
            probabilities,
            {images: reference.standardize(reference.rectangle_images(5))[:, 4:28, 4:28]},
        )
    assert found.shape == (5, 10)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
