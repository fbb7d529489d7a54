"""Tests of what TensorBoard shows of a run, read from the event files."""

import collections
import io
import re

import numpy as np
from PIL import Image
import pytest
from tensorboard.backend.event_processing import event_accumulator

from support import events as support_events
from support import script
from support.compat import tf
from tests import events, reference

LOSSES = ['total_loss', 'cross_entropy', 'local3/weight_loss', 'local4/weight_loss']
LOSS_TAGS = ['losses/' + loss + suffix for loss in LOSSES for suffix in ('', '_raw')]
SPARSITY_TAGS = [layer + '/sparsity' for layer in reference.LAYERS]

# What both trainer and evaluator show.
SHARED_TAGS = {f'images/image/{i}': 'image' for i in range(3)}
SHARED_TAGS.update((tag, 'simple_value') for tag in SPARSITY_TAGS)
SHARED_TAGS.update((layer + '/activations', 'histo') for layer in reference.LAYERS)

RAW = 'losses/total_loss_raw'

# The file of which trainer: the second one was killed.
ONE_TOWER, TWO_TOWERS = 0, 2
both = pytest.mark.parametrize('file', [ONE_TOWER, TWO_TOWERS], ids=['one tower', 'two towers'])


@pytest.fixture(scope='module')
def training(interrupted_run):
    """For each of the three trainers its events."""
    files = events.by_file(interrupted_run.train_dir)
    assert len(files) == 3
    return files


@pytest.fixture(scope='module')
def evaluation(interrupted_run):
    """The events of the evaluator."""
    (file,) = events.by_file(interrupted_run.eval_dir)
    return file


@both
def test_trainer_shows_exactly_these_tags(training, file):
    expected = dict(SHARED_TAGS, learning_rate='simple_value')
    expected.update((tag, 'simple_value') for tag in LOSS_TAGS)
    for name in reference.MODEL:
        expected[name + '/values'] = expected[name + '/gradients'] = 'histo'
    kinds = events.kinds(training[file])
    queues = [tag for tag in kinds if tag.startswith('input/')]
    assert {tag: kinds[tag] for tag in kinds if tag not in queues} == expected
    assert sorted(tag.split('/')[1] for tag in queues) == ['input_producer', 'shuffle_batch']
    for tag in queues:
        assert all(0 <= value <= 1 for _, value in events.curve(training[file], tag)), tag
    rates = [rate for _, rate in events.curve(training[file], 'learning_rate')]
    assert rates == pytest.approx([0.1] * len(rates))


def test_evaluator_shows_exactly_these_tags(evaluation):
    expected = dict(SHARED_TAGS, **{'Precision @ 1': 'simple_value'})
    assert events.kinds(evaluation) == expected


def test_graph_is_written_once_and_shows_layers(training, evaluation):
    """TensorBoard warns about a second graph in a folder."""
    for files in training, [evaluation]:
        (graph,) = [event.graph_def for file in files for event in file if event.graph_def]
        scopes = {node.name.split('/')[0] for node in tf.GraphDef.FromString(graph).node}
        assert scopes >= {'input', 'pool1', 'norm1', 'norm2', 'pool2', *reference.LAYERS}


def test_images_are_png_files_of_24_by_24_pixels(training, evaluation):
    for file in training[ONE_TOWER], evaluation:
        pngs = [events.values(file, f'images/image/{i}')[0][1].image for i in range(3)]
        for png in pngs:
            pixels = np.asarray(Image.open(io.BytesIO(png.encoded_image_string)))
            assert pixels.shape == (24, 24, 3) and len(np.unique(pixels)) > 10


def test_raw_loss_is_that_of_the_console_one_step_later(interrupted_run, training):
    """The console counts the steps done before this one, TensorBoard this one too."""
    trainers = interrupted_run.stopped, interrupted_run.killed, interrupted_run.finished
    for trainer, file in zip(trainers, training):
        lines = re.findall(r': step (\d+), loss = (\S+) ', trainer.stdout)
        logged = {int(step) + 1: loss for step, loss in lines}
        shown = {step: f'{loss:.2f}' for step, loss in events.curve(file, RAW)}
        common = set(logged) & set(shown)  # The killed trainer may have written one of the two.
        assert len(common) >= max(2, len(logged) - 1)
        assert all(shown[step] == logged[step] for step in common)


def test_averaged_loss_forgets_a_tenth_per_step(training):
    for file in training:
        for loss in LOSSES:
            expected, total = [], 0
            for i, (_, raw) in enumerate(events.curve(file, f'losses/{loss}_raw'), 1):
                total = 0.9 * total + 0.1 * raw
                expected.append(total / (1 - 0.9**i))
            shown = [value for _, value in events.curve(file, 'losses/' + loss)]
            assert len(shown) >= 4
            assert shown == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('suffix', ['', '_raw'])
def test_total_loss_is_the_sum_of_its_terms(training, suffix):
    for file in training:
        total, *terms = (
            [value for _, value in events.curve(file, f'losses/{loss}{suffix}')] for loss in LOSSES
        )
        assert total == pytest.approx(np.sum(terms, axis=0), rel=1e-5)


def test_sparsity_is_the_fraction_of_zeros_among_the_activations(training, evaluation):
    for file in [*training, evaluation]:
        for layer in reference.LAYERS:
            histograms = events.values(file, layer + '/activations')
            shown = dict(events.curve(file, layer + '/sparsity'))
            assert len(histograms) == len(shown) >= 3
            for step, value in histograms:
                histogram = value.histo
                buckets = zip(histogram.bucket_limit, histogram.bucket)
                zeros = sum(count for limit, count in buckets if 0 < limit < 2e-12)
                assert shown[step] == pytest.approx(zeros / histogram.num, abs=1e-6)


def test_histograms_show_the_variable_and_its_gradient(interrupted_run, training):
    run = interrupted_run
    saved = reference.read_checkpoint(f'{run.train_dir}/model.ckpt-{run.stopped_at}')
    for name in reference.MODEL:
        step, values = events.values(training[ONE_TOWER], name + '/values')[-1]
        _, gradients = events.values(training[ONE_TOWER], name + '/gradients')[-1]
        assert step == run.stopped_at
        assert values.histo.num == gradients.histo.num == saved[name].size
        # The summary may show the values before or after the update of this step.
        assert values.histo.max == pytest.approx(saved[name].max(), abs=0.1)
        assert values.histo.min == pytest.approx(saved[name].min(), abs=0.1)
        assert -10 < gradients.histo.min < 0 < gradients.histo.max < 10


def test_precision_is_at_the_step_of_its_checkpoint(interrupted_run, evaluation):
    shown = [(step, f'{value:.3f}') for step, value in events.curve(evaluation, 'Precision @ 1')]
    printed = re.findall(r'ckpt-(\d+) .*\n.*precision @ 1 = (.*)', interrupted_run.evaluator.stdout)
    assert shown == [(int(step), precision) for step, precision in printed]
    assert len(shown) == 3


def test_no_curve_runs_backwards_after_a_kill(interrupted_run, training):
    run = interrupted_run
    written = collections.Counter(step for file in training for step, _ in events.curve(file, RAW))
    twice = list(range(run.stopped_at + 1, run.finished_at + 1))
    assert [step for step in sorted(written) if written[step] == 2] == twice
    assert run.killed_at > run.finished_at

    accumulator = event_accumulator.EventAccumulator(
        run.train_dir, size_guidance={event_accumulator.SCALARS: 0}
    )
    tags = accumulator.Reload().Tags()['scalars']
    assert set(tags) >= {'learning_rate', *LOSS_TAGS, *SPARSITY_TAGS}
    for tag in tags:
        steps = [scalar.step for scalar in accumulator.Scalars(tag)]
        assert steps == list(range(1, run.finished_at + 1)), tag
    left = events.curve(training[ONE_TOWER] + training[TWO_TOWERS], RAW)
    assert [(scalar.step, scalar.value) for scalar in accumulator.Scalars(RAW)] == left


def test_event_that_cannot_be_written_is_an_error(tmp_path):
    folder = tmp_path / 'gone'
    writer = support_events.Writer(str(folder), tf.get_default_graph())
    with pytest.raises(script.UserError, match=str(folder)):
        writer.add_summary(tf.Summary().SerializeToString(), 1)
