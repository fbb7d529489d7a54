"""Starts the scripts as processes and watches them."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from absl import flags
import pytest

FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

TRAIN = 'cifar10_train.py'
MULTI_GPU = 'cifar10_multi_gpu_train.py'
EVAL = 'cifar10_eval.py'

TIMEOUT = 120  # Seconds for anything that has to happen some time.
AT_ONCE = 10  # Seconds for anything that has to happen at once, on a busy machine.


def script_environment():
    """The environment of a new shell, without a GPU."""
    names = [name for name in os.environ if not name.startswith(('TF_', 'PYTHONUNBUFFERED'))]
    return dict({name: os.environ[name] for name in names}, CUDA_VISIBLE_DEVICES='')


def ascii_only():
    """The same in a locale that has only ASCII."""
    return dict(script_environment(), LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')


def until(condition, timeout=TIMEOUT):
    """Waits for a true result of condition(). Returns it, or None after the timeout."""
    end, result = time.monotonic() + timeout, condition()
    while not result and time.monotonic() < end:
        time.sleep(0.02)
        result = condition()
    return result or None


def read(path):
    """The text of a file; '' if there is none."""
    return pathlib.Path(path).read_text() if os.path.exists(path) else ''


def contents(folder):
    """Dict of path -> bytes, for the files below a folder except locks."""
    paths = [path for path in pathlib.Path(str(folder)).rglob('*') if path.name != '.lock']
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def cut_in_half(path):
    os.truncate(str(path), os.path.getsize(str(path)) // 2)


def change_bytes(path):
    """Inverts 20 bytes after the first third. In the middle of an index are unused bytes."""
    path = pathlib.Path(str(path))
    old, third = path.read_bytes(), os.path.getsize(str(path)) // 3
    new = bytes(byte ^ 255 for byte in old[third : third + 20])
    path.write_bytes(old[:third] + new + old[third + 20 :])


@contextlib.contextmanager
def read_only(folder):
    """Makes a folder read-only for everybody. Skips the test if this is not allowed."""
    mount = ['mount', '-o', 'bind,ro', str(folder), str(folder)]
    if not shutil.which('mount') or subprocess.call(mount, stderr=subprocess.DEVNULL):
        pytest.skip('only root may mount')
    try:
        yield
    finally:
        subprocess.check_call(['umount', '-l', str(folder)])


def set_flags(**values):
    """Sets flags for one test."""
    for name, value in values.items():
        setattr(flags.FLAGS, name, value)


def saved_steps(folder):
    """The sorted steps of the complete checkpoints in a folder."""
    names = os.listdir(str(folder))
    steps = [int(name[11:-6]) for name in names if re.match(r'model\.ckpt-\d+\.index$', name)]
    return sorted(step for step in steps if f'model.ckpt-{step}.data-00000-of-00001' in names)


def is_running(pid):
    return bool(re.search(r'^State:\s[^ZX]', read(f'/proc/{pid}/status'), re.MULTILINE))


class Script:
    """A running script. Its output goes to the files BASE.out and BASE.err."""

    def __init__(self, base, popen=None):
        """With the subprocess.Popen, or without one for a script that the launcher has started."""
        self._base, self._popen, self._pid = base, popen, popen and popen.pid

    stdout = property(lambda self: read(self._base + '.out'))
    stderr = property(lambda self: read(self._base + '.err'))
    lines = property(lambda self: self.stdout.splitlines())
    errors = property(lambda self: self.stderr.splitlines())

    @property
    def pid(self):
        if not self._pid:
            self._pid = int(until(lambda: read(self._base + '.pid')))
        return self._pid

    def status(self):
        """The exit status, negative for the signal that ended it, or None while it runs."""
        if self._popen:
            return self._popen.poll()
        text = read(self._base + '.status')
        return int(text) if text else None

    def wait(self, timeout=TIMEOUT):
        """Waits for the end. Returns the exit status."""
        if not until(lambda: self.status() is not None, timeout):
            self.kill()
            pytest.fail(f'still running after {timeout} s:\n{self.stdout}{self.stderr}')
        return self.status()

    def wait_for(self, pattern):
        """Waits for a line of output that matches the pattern. Returns the match."""

        until(lambda: re.search(pattern, self.stdout, re.M) or self.status() is not None)
        match = re.search(pattern, self.stdout, re.M)
        assert match, f'no {pattern!r} in\n{self.stdout}{self.stderr}'
        return match

    def send(self, number):
        os.kill(self.pid, number)

    def kill(self):
        if self.status() is None:
            self.send(signal.SIGKILL)
            until(lambda: self.status() is not None)


def start_script(base, name, flags, env):
    """Starts a script in a new Python. See Script for `base`."""
    command = [sys.executable, os.path.join(FOLDER, name), *map(str, flags)]
    with open(base + '.out', 'w') as out, open(base + '.err', 'w') as err:
        streams = dict(stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        return Script(base, subprocess.Popen(command, env=env, **streams))


class Starter:
    """Starts scripts: start(SCRIPT, 'flag', ..., before='...', fresh=False) returns a Script.

    Python and TensorFlow take seconds to start. Therefore a launcher process that has imported
    TensorFlow forks itself and runs the script in the fork. `before` is Python code that runs
    first. With `fresh`, the script gets a new Python instead.
    """

    def __init__(self, folder):
        self._folder, self._started = str(folder), []
        launcher = os.path.join(FOLDER, 'tests', 'programs', 'launcher.py')
        streams = dict.fromkeys(['stdout', 'stderr'], subprocess.DEVNULL)
        self._launcher = subprocess.Popen(
            [sys.executable, launcher], stdin=subprocess.PIPE, env=script_environment(), **streams
        )

    def __call__(self, name, *flags, before='', fresh=False):
        base = os.path.join(self._folder, str(len(self._started)))
        if fresh:
            script = start_script(base, name, flags, script_environment())
        else:
            argv = [os.path.join(FOLDER, name), *map(str, flags)]
            job = {'base': base, 'argv': argv, 'before': before}
            self._launcher.stdin.write(json.dumps(job).encode() + b'\n')
            self._launcher.stdin.flush()
            script = Script(base)
        self._started.append(script)
        return script

    def end(self):
        """Kills the scripts that still run."""
        for script in self._started:
            script.kill()
        self._launcher.stdin.close()
        self._launcher.wait()
