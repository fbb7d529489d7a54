"""Tests of what TensorBoard shows of a run, read from the event files."""

import io
import re

import numpy as np
from PIL import Image
import pytest
from tensorboard.backend.event_processing import event_accumulator

from support.compat import tf
from tests import events, reference

LOSSES = ['total_loss', 'cross_entropy', 'local3/weight_loss', 'local4/weight_loss']
LOSS_TAGS = ['losses/' + loss + suffix for loss in LOSSES for suffix in ('', '_raw')]
RAW = 'losses/total_loss_raw'
SHARED_TAGS = {f'images/image/{i}': 'image' for i in range(3)}  # By trainer and evaluator.
SHARED_TAGS.update((layer + '/sparsity', 'simple_value') for layer in reference.LAYERS)
SHARED_TAGS.update((layer + '/activations', 'histo') for layer in reference.LAYERS)
ONE_TOWER, TWO_TOWERS, EVALUATOR = 0, 2, 3  # The trainer between the two was killed.


@pytest.fixture(scope='module')
def files(interrupted_run):
    """The events of each of the three trainers and of the evaluator."""
    return events.by_file(interrupted_run.train_dir) + events.by_file(interrupted_run.eval_dir)


@pytest.mark.parametrize('file', [ONE_TOWER, TWO_TOWERS])
def test_trainer_shows_exactly_these_tags(files, file):
    expected = dict(SHARED_TAGS, **dict.fromkeys(['learning_rate', *LOSS_TAGS], 'simple_value'))
    for name in reference.MODEL:
        expected[name + '/values'] = expected[name + '/gradients'] = 'histo'
    kinds = events.kinds(files[file])
    inputs = {tag for tag in kinds if tag.startswith('input/')}
    assert {tag: kinds[tag] for tag in kinds if tag not in inputs} == expected
    assert sorted(tag.split('/')[1] for tag in inputs) == ['input_producer', 'shuffle_batch']
    for tag in inputs:
        assert all(0 <= value <= 1 for _, value in events.curve(files[file], tag)), tag


def test_evaluator_shows_precision_at_the_step_of_the_checkpoint(interrupted_run, files):
    file = files[EVALUATOR]
    assert events.kinds(file) == dict(SHARED_TAGS, **{'Precision @ 1': 'simple_value'})
    shown = [(str(x), f'{y:.3f}') for x, y in events.curve(file, 'Precision @ 1')]
    output = interrupted_run.evaluator.stdout
    assert shown == re.findall(r'ckpt-(\d+) .*\n.*precision @ 1 = (.*)', output)


def test_graph_is_written_once_and_images_are_crops(files):
    """TensorBoard warns about a second graph in a folder."""
    for folder in files[:EVALUATOR], files[EVALUATOR:]:
        (graph,) = [event.graph_def for file in folder for event in file if event.graph_def]
        scopes = {node.name.split('/')[0] for node in tf.GraphDef.FromString(graph).node}
        assert scopes >= {'input', 'pool1', 'norm1', 'norm2', 'pool2', *reference.LAYERS}
        for i in range(3):
            png = events.values(folder[0], f'images/image/{i}')[0][1].image.encoded_image_string
            pixels = np.asarray(Image.open(io.BytesIO(png)))
            assert pixels.shape == (24, 24, 3) and len(np.unique(pixels)) > 10


def test_losses_are_those_of_the_console_with_their_terms_and_averages(interrupted_run, files):
    """The console counts the steps done before this one, TensorBoard this one too."""
    trainers = interrupted_run.stopped, interrupted_run.killed, interrupted_run.finished
    for trainer, file in zip(trainers, files):
        lines = re.findall(r': step (\d+), loss = (\S+) ', trainer.stdout)
        logged = {int(step) + 1: loss for step, loss in lines}
        shown = {step: f'{loss:.2f}' for step, loss in events.curve(file, RAW)}
        common = set(logged) & set(shown)  # The killed trainer may have written one of the two.
        assert len(common) >= max(2, len(logged) - 1)
        assert all(shown[step] == logged[step] for step in common)
        raw = np.array([events.curve(file, f'losses/{loss}_raw') for loss in LOSSES])[..., 1]
        averaged = np.array([events.curve(file, f'losses/{loss}') for loss in LOSSES])[..., 1]
        np.testing.assert_allclose(raw[0], raw[1:].sum(axis=0), rtol=1e-5)
        total = 0
        for i in range(raw.shape[1]):  # The average forgets a tenth per step.
            total = 0.9 * total + 0.1 * raw[:, i]
            np.testing.assert_allclose(averaged[:, i], total / (1 - 0.9 ** (i + 1)), rtol=1e-4)


def test_sparsity_is_the_fraction_of_zeros_among_the_activations(files):
    for file in files:
        for layer in reference.LAYERS:
            histograms = events.values(file, layer + '/activations')
            shown = dict(events.curve(file, layer + '/sparsity'))
            assert len(histograms) == len(shown) >= 3
            for step, value in histograms:
                buckets = zip(value.histo.bucket_limit, value.histo.bucket)
                zeros = sum(count for limit, count in buckets if 0 < limit < 2e-12)
                assert shown[step] == pytest.approx(zeros / value.histo.num, abs=1e-6)


def test_histograms_show_the_variable_and_its_gradient(interrupted_run, files):
    run, file = interrupted_run, files[ONE_TOWER]
    saved = reference.read_checkpoint(f'{run.train_dir}/model.ckpt-{run.stopped_at}')
    for name in reference.MODEL:
        step, values = events.values(file, name + '/values')[-1]
        _, gradients = events.values(file, name + '/gradients')[-1]
        assert step == run.stopped_at
        assert values.histo.num == gradients.histo.num == saved[name].size
        # The summary may show the values before or after the update of this step.
        assert values.histo.max == pytest.approx(saved[name].max(), abs=0.1)
        assert -10 < gradients.histo.min < 0 < gradients.histo.max < 10


def test_no_curve_runs_backwards_after_a_kill(interrupted_run, files):
    run = interrupted_run
    written = [step for file in files[:EVALUATOR] for step, _ in events.curve(file, RAW)]
    assert sum(written.count(step) == 2 for step in set(written)) == 4, 'done again after the kill'
    accumulator = event_accumulator.EventAccumulator(run.train_dir, {event_accumulator.SCALARS: 0})
    tags = accumulator.Reload().Tags()['scalars']
    assert set(tags) >= {'learning_rate', *LOSS_TAGS}
    for tag in tags:
        steps = [scalar.step for scalar in accumulator.Scalars(tag)]
        assert steps == list(range(1, run.finished_at + 1)), tag
    left = events.curve(files[ONE_TOWER] + files[TWO_TOWERS], RAW)
    assert [(scalar.step, scalar.value) for scalar in accumulator.Scalars(RAW)] == left
