"""Tests of support/local_cluster.py, which starts a cluster on one machine."""

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
        assert harness.until(lambda: not any(map(is_running, pids)))
        return status


def is_running(pid):
    return bool(re.search(r'^State:\s[^ZX]', harness.read(f'/proc/{pid}/status'), re.MULTILINE))


# As the trainer behaves for the launcher; `stuck` ignores what it is told.
ACTOR = '''
import json, os, signal, sys, time
job, told = json.loads(os.environ['TF_CONFIG'])['task']['type'], []
for number in signal.SIGINT, signal.SIGTERM:
    signal.signal(number, lambda number, frame: told.append(number))
print('pid', os.getpid(), flush=True)
while not told or 'stuck' in sys.argv:
    if job == 'worker' and os.path.exists(sys.argv[1]):
        os.remove(sys.argv[1])
        sys.exit(138)
    time.sleep(0.02)
print('told', told[0], flush=True)
sys.exit(128 + told[0] if job == 'chief' else 0)
'''


@pytest.fixture
def launch(tmp_path):
    """Function that starts a Launcher with ACTOR and waits until both processes run."""
    (tmp_path / 'actor.py').write_text(ACTOR)

    def start(*flags):
        launcher = Launcher(tmp_path, [str(tmp_path / 'actor.py'), str(tmp_path / 'lose'), *flags])
        launcher.wait_for(r'^chief    \| pid')
        launcher.wait_for(r'^worker 0 \| pid')
        return launcher

    return start


@pytest.mark.parametrize(
    'number, told', [(signal.SIGINT, 2), (signal.SIGTERM, 15), (signal.SIGHUP, 15)]
)
def test_launcher_stops_the_chief_by_signal(launch, number, told):
    launcher = launch()
    launcher.popen.send_signal(number)
    assert launcher.wait() == 128 + told
    launcher.wait_for(rf'^chief    \| told {told}$')


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


def test_launcher_runs_the_trainer(data_dir, tmp_path):
    flags = [f'--data_dir={data_dir}', f'--train_dir={tmp_path}', '--batch_size=8']
    launcher = Launcher(tmp_path, [clusters.DISTRIBUTED, *flags, '--max_steps=2'])
    assert launcher.wait() == 0
    launcher.wait_for(r'^chief    \| Finished at step 2')
    launcher.wait_for(r'^worker 0 \| The chief has finished')
