"""Runs the scripts as processes and watches them: shared by all that does so."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

TRAIN = 'cifar10_train.py'
MULTI_GPU = 'cifar10_multi_gpu_train.py'
EVAL = 'cifar10_eval.py'

# What TensorFlow 2 says when it is imported.
_AT_IMPORT = re.compile(
    r'WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR$|'
    r'[IWE]0000 .*(port|cudart_stub|cpu_feature_guard|cuda_\w+)\.cc:\d+\] '
)

TIMEOUT = 120  # Seconds for whatever has to happen some time.
AT_ONCE = 10  # Seconds for what has to happen at once, on a busy machine.


# --- Scripts: how they are started --------------------------------------------
#
# Python and TensorFlow need seconds to start. Where a test isn't about that, a
# launcher that has them imported forks the process in which the script then runs,
# from its first line to the interpreter's end. `fresh=True` starts a new Python.

_LAUNCHER = r'''
import json, os, runpy, signal, sys

sys.path.insert(0, sys.argv[1])
import cifar10_input

def note(path, number):
    with open(path + '.tmp', 'w') as file:
        file.write(str(number))
    os.rename(path + '.tmp', path)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in iter(sys.stdin.readline, ''):
    job = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        note(job['base'] + '.pid', pid)
        status = os.waitpid(pid, 0)[1]
        note(job['base'] + '.status',
             os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status))
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(job['stdout'], os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(job['stderr'], os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = open(1, 'w', closefd=False)  # The old one takes a pipe for a file.
    sys.argv = job['argv']
    exec(job['before'], {})
    runpy.run_path(sys.argv[0], run_name='__main__')
    sys.exit()
'''

# Holds the records back, where they are [n, 32, 32, 3] images, for so many seconds.
# The input threads wait for a token; they block no thread of TensorFlow's.
_SLOW_INPUT = '''
import cifar10_input, time
import tensorflow.compat.v1 as tf
function, seconds = %r
quick = getattr(cifar10_input, function)
def slow(images, *others):
    tokens = tf.FIFOQueue(1000, tf.int32, [[]])
    def wait(zeros):
        time.sleep(seconds)
        return zeros
    enqueue = tokens.enqueue_many([tf.reshape(
        tf.py_func(wait, [tf.zeros([1000], tf.int32)], tf.int32), [1000])])
    if seconds:
        tf.train.add_queue_runner(tf.train.QueueRunner(tokens, [enqueue]))
    with tf.control_dependencies([tokens.dequeue()]):
        return quick(tf.identity(images), *others)
setattr(cifar10_input, function, slow)
'''


def slow_input(function, seconds):
    """Code that makes the input slow; with `seconds` 0 it stands still."""
    return _SLOW_INPUT % ((function, seconds),)


def script_environment():
    """As in a shell where nobody has imported cifar10_input; no GPU."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(('TF_', 'PYTHONUNBUFFERED'))
    }
    env['CUDA_VISIBLE_DEVICES'] = ''
    return env


def until(condition, timeout=TIMEOUT):
    """The first true result of condition(), or None when the time is over."""
    end = time.time() + timeout
    while time.time() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    return condition() or None


def read(path):
    if not os.path.exists(path):
        return ''
    with open(path) as file:
        return file.read()


def saved_steps(folder):
    """The steps of the checkpoints in a folder, in order; of complete ones."""
    names = os.listdir(str(folder))
    steps = [int(name[11:-6]) for name in names if re.match(r'model\.ckpt-\d+\.index$', name)]
    return sorted(step for step in steps if f'model.ckpt-{step}.data-00000-of-00001' in names)


class Script:
    """A script at work. Its output goes to files, as under nohup."""

    def __init__(self, base, popen=None):
        self._base, self._popen, self._pid = base, popen, popen and popen.pid
        self.out = base + '.out'

    @property
    def stdout(self):
        return read(self.out)

    @property
    def stderr(self):
        return read(self._base + '.err')

    @property
    def lines(self):
        return self.stdout.splitlines()

    @property
    def errors(self):
        """The lines of stderr but for those of TensorFlow 2 at import."""
        return [line for line in self.stderr.splitlines() if not _AT_IMPORT.match(line)]

    @property
    def pid(self):
        if not self._pid:
            self._pid = int(until(lambda: read(self._base + '.pid')))
        return self._pid

    def status(self):
        """The exit status, negative for a deadly signal, or None: it runs."""
        if self._popen:
            return self._popen.poll()
        text = read(self._base + '.status')
        return int(text) if text else None

    def wait(self, timeout=TIMEOUT):
        """Waits for the end. Returns the exit status."""
        until(lambda: self.status() is not None, timeout)
        status = self.status()
        if status is None:
            self.kill()
            pytest.fail(f'no end after {timeout} s; it said\n{self.stdout}{self.stderr}')
        return status

    def wait_for(self, pattern):
        """Waits for a line of output that matches the pattern. Returns the match."""

        def look():
            return re.search(pattern, self.stdout, re.MULTILINE)

        until(lambda: look() or self.status() is not None)
        match = look()
        assert match, f'no {pattern!r} in\n{self.stdout}{self.stderr}'
        return match

    def send(self, number):
        os.kill(self.pid, number)

    def kill(self):
        if self.status() is None:
            self.send(signal.SIGKILL)
            until(lambda: self.status() is not None)


def _argv(name, flags):
    return [os.path.join(FOLDER, name)] + [str(flag) for flag in flags]


def start_script(base, name, flags, env):
    """Starts a script in a new Python. Its output goes to files whose names begin with `base`."""
    command = [sys.executable] + _argv(name, flags)
    with open(base + '.out', 'w') as out, open(base + '.err', 'w') as err:
        return Script(
            base,
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env),
        )


class Starter:
    """Starts scripts: start(SCRIPT, 'flag', ..., before='...', fresh=False) returns a Script."""

    def __init__(self, folder):
        self._folder, self._started = str(folder), []
        self._launcher = subprocess.Popen(
            [sys.executable, '-c', _LAUNCHER, FOLDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=script_environment(),
            universal_newlines=True,
        )

    def __call__(self, name, *flags, before='', fresh=False):
        base = os.path.join(self._folder, str(len(self._started)))
        if fresh:
            script = start_script(base, name, flags, script_environment())
        else:
            job = {
                'base': base,
                'argv': _argv(name, flags),
                'before': before,
                'stdout': base + '.out',
                'stderr': base + '.err',
            }
            self._launcher.stdin.write(json.dumps(job) + '\n')
            self._launcher.stdin.flush()
            script = Script(base)
        self._started.append(script)
        return script

    def end(self):
        """Kills what still runs."""
        for script in self._started:
            script.kill()
        self._launcher.stdin.close()
        self._launcher.wait()
