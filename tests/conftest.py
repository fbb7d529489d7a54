"""Fixtures: graphs and flags, scripts, a data set, a model, and a run with all that can happen."""

import re
import resource
import signal
import sys
import types

from absl import flags
from absl.testing import flagsaver
import numpy as np
import pytest

from support.compat import tf
from tests import events, harness, reference

flags.FLAGS(sys.argv[:1])


def pytest_collection_modifyitems(items):
    """For pytest-xdist: the tests of a file run in one process, those of interrupted_run too."""
    for item in items:
        shared = 'interrupted_run' if 'interrupted_run' in item.fixturenames else item.fspath
        item.add_marker(pytest.mark.xdist_group(str(shared)))


@pytest.fixture(autouse=True)
def fresh_graph_and_flags():
    """Gives each test a new graph and restores the flags that it sets."""
    with flagsaver.flagsaver(), tf.Graph().as_default():
        yield


@pytest.fixture(scope='session', autouse=True)
def default_signals():
    """A background job ignores SIGINT and `nohup` SIGHUP, and so would the scripts started here."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope='session')
def start(tmp_path_factory):
    """A harness.Starter."""
    starter = harness.Starter(tmp_path_factory.mktemp('scripts'))
    yield starter
    starter.end()


@pytest.fixture(scope='session')
def known_precision(tmp_path_factory):
    """A data set, and variables with which NumPy classifies 23 of its 40 test images correctly.

    And 120 of its 300 training images. `labels` are those of the test images. `zeros` of them are
    0, the prediction where all logits are equal.
    """
    images = reference.rectangle_images(40)
    variables = reference.random_variables(1, local3=3, local4=3)
    logits = reference.evaluation_logits(variables, images)
    second, first = np.sort(logits, axis=1)[:, -2:].T
    assert min(first - second) > 1e-3, 'too close for float32'
    predicted = logits.argmax(axis=1)
    assert len(set(predicted)) > 3, 'too few classes'
    order = np.append(np.arange(40), np.tile(np.arange(30), 10))
    labels = predicted[order]
    for wrong in slice(23, 40), slice(160, 340):
        labels[wrong] = labels[wrong] == 0  # 1 for 0, and 0 for anything else.
    zeros = np.count_nonzero(labels[:40] == 0)
    assert 0 < zeros < 23
    folder = tmp_path_factory.mktemp('data')
    reference.write_data(folder, images[order], labels, test_images=40)
    return types.SimpleNamespace(
        data_dir=str(folder), labels=labels[:40], variables=variables, zeros=zeros
    )


@pytest.fixture(scope='session')
def data_dir(known_precision):
    """A --data_dir: five files of 60 records and one of 40."""
    return known_precision.data_dir


@pytest.fixture(scope='session')
def seven_classes(tmp_path_factory):
    """A folder with three checkpoints of a model with seven named classes.

    `averages` and `raw` are the variables of the newest checkpoint, number 1000.
    """
    folder = tmp_path_factory.mktemp('seven_classes')
    names = ['Bär', 'fire engine', 'apple', 'x', 'no. 5', 'ship', 'zebra']
    (folder / 'batches.meta.txt').write_text('\n'.join(names), encoding='utf-8')
    for step, seed in (5, 3), (900, 4), (1000, 1):  # Sorted as text, 1000 would be the first.
        averages, raw = [reference.variables_of_seven_classes(i) for i in (seed, seed + 10)]
        values = reference.checkpoint_values(step, raw, averages)
        reference.write_checkpoint(folder, step, values)
    return types.SimpleNamespace(folder=str(folder), names=names, averages=averages, raw=raw)


@pytest.fixture
def train(start, data_dir, tmp_path):
    """Function that starts a trainer in tmp_path, or in a folder there, for this test only."""
    started = []

    def start_trainer(*flags, name=harness.TRAIN, folder='', **kwargs):
        common = [f'--data_dir={data_dir}', f'--train_dir={tmp_path / folder}', '--batch_size=8']
        started.append(start(name, *common, '--log_frequency=1', *flags, **kwargs))
        return started[-1]

    yield start_trainer
    for script in started:
        script.kill()


@pytest.fixture
def file_size_limit():
    """Function that makes larger files fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope='session')
def interrupted_run(start, data_dir, tmp_path_factory):
    """A run that was stopped by Ctrl-C, resumed, killed, resumed, and finished by two towers.

    An evaluator waited for it, watched it and ended by itself. Summaries are written at each step.
    """
    run = types.SimpleNamespace()
    folder = tmp_path_factory.mktemp('interrupted_run')
    run.train_dir, run.eval_dir = str(folder / 'made' / 'by trainer'), str(folder / 'eval')
    common = ['--data_dir=' + data_dir, '--batch_size=8']
    folders = ['--checkpoint_dir=' + run.train_dir, '--eval_dir=' + run.eval_dir]

    def train(name, *flags):
        flags = [f'--train_dir={run.train_dir}', '--save_checkpoint_secs=1000', *flags]
        return start(name, *common, '--log_frequency=2', *flags, before=events.AT_EVERY_STEP)

    def newest_event():
        return max((event.step for event in events.by_file(run.train_dir)[-1]), default=0)

    run.evaluator = start(harness.EVAL, *common, *folders, '--eval_interval_secs=1')
    run.evaluator.wait_for('^Waiting')
    run.stopped = train(harness.TRAIN)
    run.evaluator.wait_for('precision')
    run.stopped.wait_for('step 4,')
    run.stopped.send(signal.SIGINT)
    assert run.stopped.wait() == 130, run.stopped.stderr
    run.stopped_at = int(re.search(r'at step (\d+)', run.stopped.lines[-1]).group(1))
    run.killed = train(harness.TRAIN)
    run.evaluator.wait_for(rf'model.ckpt-{run.stopped_at} .*\n.*precision')
    run.killed.wait_for(f'step {run.stopped_at + run.stopped_at % 2},')
    assert harness.until(lambda: newest_event() > run.stopped_at + 6)
    run.killed.kill()
    run.finished_at = run.stopped_at + 4  # The killed trainer had come further.
    run.finished = train(harness.MULTI_GPU, '--num_gpus=2', f'--max_steps={run.finished_at}')
    assert run.finished.wait() == 0, run.finished.stderr
    run.evaluator.wait()
    return run
