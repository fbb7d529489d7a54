"""Tests of support/local_cluster.py, which starts a cluster on one machine."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests import clusters, harness


class Launcher:
    """support/local_cluster.py with a chief and a worker."""

    def __init__(self, folder, command):
        self._out = folder / 'out'
        with self._out.open('w') as out:
            self.popen = subprocess.Popen(
                [sys.executable, '-m', 'support.local_cluster', '--workers=1', *command],
                cwd=harness.FOLDER,
                env=harness.script_environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, pattern):
        assert harness.until(lambda: re.search(pattern, self._out.read_text(), re.MULTILINE)), (
            self._out.read_text()
        )

    def wait(self):
        """Returns the exit status, after all processes have ended."""
        status = self.popen.wait(harness.TIMEOUT)
        pids = re.findall(r'pid (\d+)', self._out.read_text())
        assert harness.until(lambda: not any(map(harness.is_running, pids)))
        return status


@pytest.fixture
def launch(tmp_path):
    """Function that starts a Launcher with actors and waits until both processes run."""

    def start(*flags):
        actor = os.path.join(harness.FOLDER, 'tests', 'programs', 'actor.py')
        launcher = Launcher(tmp_path, [actor, str(tmp_path / 'lose'), *flags])
        launcher.wait_for(r'^chief    \| pid')
        launcher.wait_for(r'^worker 0 \| pid')
        return launcher

    return start


@pytest.fixture(scope='module', autouse=True)
def trainers(data_dir, tmp_path_factory):
    """A Launcher with trainers, which run while the other tests run."""
    folder = tmp_path_factory.mktemp('trainers')
    flags = [f'--data_dir={data_dir}', f'--train_dir={folder}', '--batch_size=8', '--max_steps=2']
    launcher = Launcher(folder, [clusters.DISTRIBUTED, *flags])
    yield launcher
    launcher.popen.kill()


@pytest.mark.parametrize(
    'number, received',
    [(signal.SIGINT, 2), (signal.SIGTERM, 15), (signal.SIGHUP, 15), (signal.SIGUSR1, 10)],
)
def test_launcher_stops_the_chief_by_signal(launch, number, received):
    launcher = launch()
    launcher.popen.send_signal(number)
    assert launcher.wait() == 128 + received
    launcher.wait_for(rf'^chief    \| received {received}$')


def test_launcher_ends_on_a_second_signal(launch):
    launcher = launch('stuck')
    launcher.popen.send_signal(signal.SIGTERM)
    assert not harness.until(lambda: launcher.popen.poll() is not None, 0.5)
    launcher.popen.send_signal(signal.SIGTERM)
    assert launcher.wait() == 143


def test_killed_launcher_leaves_no_processes(launch):
    launcher = launch('stuck')
    launcher.popen.kill()
    assert launcher.wait() == -signal.SIGKILL


def test_launcher_restarts_after_a_loss(launch, tmp_path):
    launcher = launch()
    (tmp_path / 'lose').touch()
    launcher.wait_for(r'lost.*\n(.*\n)*chief    \| pid (.*\n)*')
    launcher.popen.send_signal(signal.SIGINT)
    assert launcher.wait() == 130


def test_launcher_runs_the_trainer(trainers):
    assert trainers.wait() == 0
    trainers.wait_for(r'^chief    \| Finished at step 2')
    trainers.wait_for(r'^worker 0 \| The chief has finished')
