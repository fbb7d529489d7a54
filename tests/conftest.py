"""What the tests share as fixtures: graphs, flags, scripts, data and checkpoints."""

import collections
import re
import signal
import sys

from absl import flags
from absl.testing import flagsaver
import numpy as np
import pytest

import cifar10_input  # noqa: F401 -- Before TensorFlow, which it keeps quiet.
import tensorflow.compat.v1 as tf

from tests import events
from tests import harness
from tests import reference

flags.FLAGS(sys.argv[:1])


@pytest.fixture(autouse=True)
def fresh_graph_and_flags():
    """A graph of its own for each test; the flags that it sets are set back."""
    with flagsaver.flagsaver(), tf.Graph().as_default():
        yield


@pytest.fixture(scope='session', autouse=True)
def ctrl_c_is_heard():
    """What is started here hears Ctrl-C, even where the tests run as a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope='session')
def start(tmp_path_factory):
    """A harness.Starter."""
    starter = harness.Starter(tmp_path_factory.mktemp('scripts'))
    yield starter
    starter.end()


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A --data_dir: five files of 60 records and one of 40, with random labels."""
    folder = tmp_path_factory.mktemp('data')
    labels = np.random.RandomState(8).randint(0, 10, 340)
    reference.write_data(folder, reference.rectangle_images(340), labels, test_images=40)
    return str(folder)


@pytest.fixture
def train(start, data_dir, tmp_path):
    """Function that starts a trainer in tmp_path, or in a folder there."""

    def start_trainer(*flags, name=harness.TRAIN, folder='', **kwargs):
        common = [f'--data_dir={data_dir}', f'--train_dir={tmp_path / folder}', '--batch_size=8']
        return start(name, *common, '--log_frequency=1', *flags, **kwargs)

    return start_trainer


Known = collections.namedtuple('Known', 'data_dir variables zeros')


@pytest.fixture(scope='session')
def known(tmp_path_factory):
    """Data and variables: NumPy finds 23 of the 40 test images right and 120 of the 300 others.

    `zeros` of the 40 labels are 0: what is predicted where all logits are equal.
    """
    images = reference.rectangle_images(40)
    variables = reference.random_variables(1, local3=3, local4=3)
    logits = reference.evaluation_logits(variables, images)
    ranked = np.sort(logits, axis=1)
    assert (ranked[:, -1] - ranked[:, -2] > 1e-3).all(), 'too close a race for float32'
    predicted = logits.argmax(axis=1)
    assert len(set(predicted)) > 3, 'too dull a network for a test'
    order = np.append(np.arange(40), np.tile(np.arange(30), 10))
    labels = predicted[order]
    for wrong in slice(23, 40), slice(160, 340):
        labels[wrong] = labels[wrong] == 0  # 1 for 0, and 0 for anything else.
    zeros = np.count_nonzero(labels[:40] == 0)
    assert 0 < zeros < 23
    folder = tmp_path_factory.mktemp('known')
    reference.write_data(folder, images[order], labels, test_images=40)
    return Known(str(folder), variables, zeros)


Life = collections.namedtuple(
    'Life', 'train_dir eval_dir trainers evaluator resumed_at killed_at finished_at'
)


@pytest.fixture(scope='session')
def life(start, data_dir, tmp_path_factory):
    """A training run that is stopped, resumed, killed, and finished by two towers.

    The evaluator waits for it, watches it and ends by itself. Summaries come at every step.
    """
    folder = tmp_path_factory.mktemp('life')
    train_dir, eval_dir = str(folder / 'train'), str(folder / 'eval')
    common = ['--data_dir=' + data_dir, '--batch_size=8']
    evaluator = start(
        harness.EVAL,
        *common,
        '--checkpoint_dir=' + train_dir,
        '--eval_dir=' + eval_dir,
        '--eval_interval_secs=1',
    )
    evaluator.wait_for('^Evaluating checkpoints')

    def train(name, *flags):
        flags = [*common, '--train_dir=' + train_dir, '--save_checkpoint_secs=1000', *flags]
        return start(name, '--log_frequency=1', *flags, before=events.EVERY_STEP)

    def written():
        return max((event.step for event in events.sessions(train_dir)[-1]), default=0)

    stopped = train(harness.TRAIN)
    stopped.wait_for('step 3,')
    evaluator.wait_for('precision')
    stopped.send(signal.SIGTERM)
    assert stopped.wait() == 143, stopped.stderr
    resumed_at = int(re.search(r'at step (\d+)', stopped.lines[-1]).group(1))
    evaluator.wait_for(rf'model.ckpt-{resumed_at} .*\n.*precision')
    killed = train(harness.TRAIN)
    killed.wait_for(f'step {resumed_at},')
    assert harness.until(lambda: written() > resumed_at + 6)
    killed.kill()
    killed_at = written()
    finished_at = resumed_at + 4  # The killed one had come further.
    finished = train(harness.MULTI_GPU, '--num_gpus=2', f'--max_steps={finished_at}')
    assert finished.wait() == 0, finished.stderr
    evaluator.wait()
    trainers = [stopped, killed, finished]
    return Life(train_dir, eval_dir, trainers, evaluator, resumed_at, killed_at, finished_at)
