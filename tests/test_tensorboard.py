"""Tests of what TensorBoard shows of a run, read from the event files."""

import collections
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
import tensorflow.compat.v1 as tf

from tests import events
from tests import reference

LOSSES = ['total_loss', 'cross_entropy', 'local3/decay', 'local4/decay']
LOSS_TAGS = ['losses/' + loss + suffix for loss in LOSSES for suffix in ('', '_raw')]
SPARSITY_TAGS = [layer + '/sparsity' for layer in reference.LAYERS]

# Which of the sessions of a life trained how many towers.
TOWERS = pytest.mark.parametrize('session', [0, 2], ids=['one tower', 'two towers'])


@pytest.fixture(scope='module')
def sessions(life):
    """For each trainer of a life its events: stopped, killed, finished by two towers."""
    result = events.sessions(life.train_dir)
    assert len(result) == len(life.trainers)
    return result


@pytest.fixture(scope='module')
def evaluation(life):
    """The events of the evaluator."""
    (session,) = events.sessions(life.eval_dir)
    return session


def shared_tags():
    """What trainer and evaluator show: dict of tag -> the kinds of its summaries."""
    tags = {f'images/image/{i}': {'image'} for i in range(3)}
    tags.update((tag, {'simple_value'}) for tag in SPARSITY_TAGS)
    tags.update((layer + '/activations', {'histo'}) for layer in reference.LAYERS)
    return tags


# --- What is shown -----------------------------------------------------------


@TOWERS
def test_a_trainer_shows_exactly_the_designed_tags(sessions, session):
    expected = shared_tags()
    expected['learning_rate'] = {'simple_value'}
    expected.update((tag, {'simple_value'}) for tag in LOSS_TAGS)
    for name in reference.MODEL:
        expected[name + '/values'] = expected[name + '/gradients'] = {'histo'}
    shown = events.kinds(sessions[session])
    assert {tag: shown[tag] for tag in shown if not tag.startswith('input/')} == expected


def test_the_evaluator_shows_exactly_the_designed_tags(evaluation):
    expected = shared_tags()
    expected['Precision @ 1'] = {'simple_value'}
    assert events.kinds(evaluation) == expected


@TOWERS
def test_how_full_the_input_queues_are_is_a_fraction(sessions, session):
    queues = [tag for tag in events.kinds(sessions[session]) if tag.startswith('input/')]
    expected = ['input_producer', 'shuffle_batch'] + ['batches'] * (session == 2)
    assert sorted(tag.split('/')[1] for tag in queues) == sorted(expected)
    for tag in queues:
        assert all(0 <= value <= 1 for _, value in events.curve(sessions[session], tag)), tag


def graph_scopes(session, depth):
    """The set of the first `depth` parts of the names of the ops, each as 'a/b'."""
    graph = next(event.graph_def for event in session if event.graph_def)
    names = [node.name for node in tf.GraphDef.FromString(graph).node]
    return {'/'.join(name.split('/')[:depth]) for name in names}


def test_the_graph_has_readable_scopes(sessions, evaluation):
    layers = reference.LAYERS + ['pool1', 'norm1', 'norm2', 'pool2']
    for session in sessions[0], evaluation:
        assert graph_scopes(session, 1) >= {'input', *layers}
    towers = {f'{tower}/{layer}' for tower in ('tower_0', 'tower_1') for layer in layers}
    assert graph_scopes(sessions[2], 2) >= towers
    assert 'tower_1/conv1/Conv2D' in graph_scopes(sessions[2], 3)


def test_the_images_are_png_files_of_24_by_24_pixels(sessions, evaluation):
    for session in sessions[0], evaluation:
        for i in range(3):
            _, value = events.values(session, f'images/image/{i}')[0]
            with tf.Session() as tf_session:
                png = tf.image.decode_png(value.image.encoded_image_string)
                pixels = tf_session.run(png)
            assert pixels.shape == (24, 24, 3)
            assert len(np.unique(pixels)) > 10


# --- The numbers -------------------------------------------------------------


def raw_losses(session):
    """Dict of step -> raw total loss."""
    return dict(events.curve(session, 'losses/total_loss_raw'))


def test_the_raw_loss_is_the_one_on_the_console_whose_step_is_done_then(life, sessions):
    for trainer, session in zip(life.trainers, sessions):
        lines = re.findall(r': step (\d+), loss = (\S+) ', trainer.stdout)
        logged = {int(step) + 1: loss for step, loss in lines}
        shown = raw_losses(session)
        common = set(logged) & set(shown)  # Either may lack the last step of one that was killed.
        assert len(common) >= max(4, len(logged) - 1)
        assert {step: f'{shown[step]:.2f}' for step in common} == {
            step: logged[step] for step in common
        }


def test_the_averaged_loss_begins_with_the_first_and_forgets_a_tenth_at_each_step(sessions):
    for session in sessions:
        for loss in LOSSES:
            expected, total = [], 0
            for i, (_, raw) in enumerate(events.curve(session, f'losses/{loss}_raw'), 1):
                total = 0.9 * total + 0.1 * raw
                expected.append(total / (1 - 0.9**i))
            shown = [value for _, value in events.curve(session, 'losses/' + loss)]
            assert len(shown) >= 4
            assert shown == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('suffix', ['', '_raw'])
def test_the_total_loss_is_the_sum_of_its_terms(sessions, suffix):
    for session in sessions:
        total, *terms = (
            [value for _, value in events.curve(session, f'losses/{loss}{suffix}')]
            for loss in LOSSES
        )
        assert total == pytest.approx(np.sum(terms, axis=0), rel=1e-5)


def test_the_learning_rate_is_a_tenth(sessions):
    for session in sessions:
        rates = events.curve(session, 'learning_rate')
        assert [rate for _, rate in rates] == pytest.approx([0.1] * len(rates))


def test_sparsity_is_the_fraction_of_zeros_in_the_histogram_of_the_activations(
    sessions, evaluation
):
    for session in sessions + [evaluation]:
        for layer in reference.LAYERS:
            histograms = events.values(session, layer + '/activations')
            shown = dict(events.curve(session, layer + '/sparsity'))
            assert len(histograms) == len(shown) >= 3
            for step, value in histograms:
                histogram = value.histo
                buckets = zip(histogram.bucket_limit, histogram.bucket)
                zeros = sum(count for limit, count in buckets if 0 < limit < 2e-12)
                assert shown[step] == pytest.approx(zeros / histogram.num, abs=1e-6)


@pytest.mark.parametrize('name', sorted(reference.MODEL))
def test_the_histograms_are_those_of_the_variable_and_its_gradient(life, sessions, name):
    saved = reference.read_checkpoint(f'{life.train_dir}/model.ckpt-{life.resumed_at}')[name]
    step, values = events.values(sessions[0], name + '/values')[-1]
    assert step == life.resumed_at
    assert values.histo.num == saved.size
    # Which may have been looked at before or after this step's update.
    assert values.histo.max == pytest.approx(saved.max(), abs=0.03)
    assert values.histo.min == pytest.approx(saved.min(), abs=0.03)
    _, gradients = events.values(sessions[0], name + '/gradients')[-1]
    assert gradients.histo.num == saved.size
    assert -10 < gradients.histo.min < 0 < gradients.histo.max < 10


def test_precision_stands_at_the_step_of_its_checkpoint(life, evaluation):
    shown = [(step, f'{value:.3f}') for step, value in events.curve(evaluation, 'Precision @ 1')]
    printed = re.findall(r'ckpt-(\d+) on .*\n.*precision @ 1 = (.*)', life.evaluator.stdout)
    assert shown == [(int(step), precision) for step, precision in printed]
    assert len(shown) == 3


# --- After a kill ------------------------------------------------------------


def test_after_a_kill_and_a_resume_no_curve_runs_back(life, sessions):
    written = collections.Counter(step for session in sessions for step in raw_losses(session))
    twice = range(life.resumed_at + 1, life.finished_at + 1)
    assert [step for step in sorted(written) if written[step] == 2] == list(twice)
    assert life.killed_at > life.finished_at

    accumulator = event_accumulator.EventAccumulator(
        life.train_dir, size_guidance={event_accumulator.SCALARS: 0}
    )
    tags = accumulator.Reload().Tags()['scalars']
    assert set(tags) >= {'learning_rate', *LOSS_TAGS, *SPARSITY_TAGS}
    for tag in tags:
        steps = [scalar.step for scalar in accumulator.Scalars(tag)]
        first = life.resumed_at + 1 if tag.startswith('input/batches/') else 1
        assert steps == list(range(first, life.finished_at + 1)), tag

    left = {**raw_losses(sessions[0]), **raw_losses(sessions[2])}
    curve = accumulator.Scalars('losses/total_loss_raw')
    assert {scalar.step: scalar.value for scalar in curve} == left
