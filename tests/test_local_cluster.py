"""Tests of support/local_cluster.py, which starts a cluster on one machine."""

import os
import re
import signal

import pytest

from tests import clusters, harness

LAUNCHER = 'tests/programs/run_module.py', 'support.local_cluster', '--workers=1'
ACTOR = f'{harness.FOLDER}/tests/programs/actor.py'


@pytest.fixture
def launch(start, tmp_path):
    """Function that starts a launcher with actors and waits until they run."""

    def start_actors(*flags):
        launcher = start(*LAUNCHER, ACTOR, tmp_path / 'lose', *flags)
        launcher.wait_for(r'^worker 0 \| pid')
        launcher.chief = int(launcher.wait_for(r'^chief    \| pid (\d+)').group(1))
        return launcher

    return start_actors


def assert_ended(launcher, status):
    assert launcher.wait() == status
    pids = re.findall(r'pid (\d+)', launcher.stdout)
    assert harness.until(lambda: not any(map(harness.is_running, pids)))


@pytest.mark.parametrize('number, passed_on', [('INT', 2), ('HUP', 15), ('USR1', 10)])
def test_launcher_stops_the_chief_by_signal(launch, number, passed_on):
    launcher = launch()
    launcher.send(signal.Signals['SIG' + number])
    assert_ended(launcher, 128 + passed_on)
    assert f'chief    | received {passed_on}' in launcher.lines


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_ended_launcher_leaves_no_processes(launch, number, status):
    launcher = launch('stuck')
    if number == signal.SIGTERM:
        launcher.send(number)
        assert not harness.until(lambda: launcher.status() is not None, 0.5)
    launcher.send(number)
    assert_ended(launcher, status)


def test_launcher_restarts_after_a_loss(launch, tmp_path):
    launcher = launch()
    (tmp_path / 'lose').touch()
    assert harness.until(lambda: not (tmp_path / 'lose').exists())
    os.kill(launcher.chief, signal.SIGKILL)
    launcher.wait_for(r'lost.*\n(.*\n)*chief    \| pid')
    launcher.send(signal.SIGINT)
    assert_ended(launcher, 130)


def test_launcher_runs_the_trainer(start, data_dir, tmp_path):
    flags = f'--data_dir={data_dir}', f'--train_dir={tmp_path}', '--batch_size=8', '--max_steps=2'
    launcher = start(*LAUNCHER, f'{harness.FOLDER}/{clusters.DISTRIBUTED}', *flags)
    assert launcher.wait() == 0, launcher.stdout
    for line in 'chief    | Finished at step 2', 'worker 0 | The chief has finished':
        assert line in launcher.stdout
