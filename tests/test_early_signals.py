"""Signals at unusual moments: during imports, and to the check of a GPU."""

import signal
import subprocess
import sys

import pytest

from tests import harness

CTRL_C = 'import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n'


def python(*arguments, path=harness.FOLDER):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=harness.FOLDER,
        env=dict(harness.script_environment(), PYTHONPATH=str(path)),
        capture_output=True,
        timeout=harness.TIMEOUT,
    )


@pytest.mark.parametrize(
    'name',
    ['train', 'multi_gpu_train', 'distributed_train', 'eval', 'predict', 'export', 'convert'],
)
def test_ctrl_c_during_imports_ends_a_script_silently(tmp_path, name):
    (tmp_path / 'numpy.py').write_text(CTRL_C)
    ended = python(f'cifar10_{name}.py', path=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b'', b'')


@pytest.mark.parametrize('name', ['record', 'pictures'])
def test_ctrl_c_during_imports_ends_a_script_of_results_silently(tmp_path, name):
    (tmp_path / 'numpy.py').write_text(CTRL_C)
    ended = python(f'results/{name}.py', path=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b'', b'')


def test_import_restores_pythons_handler_of_ctrl_c():
    code = 'import support.compat, signal as s; assert s.getsignal(2) is s.default_int_handler'
    assert python('-c', code).returncode == 0


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_ends_gpu_check_and_its_trainer(tmp_path, number):
    """The trainer is a program that sleeps; `runpy` is what `python -m` does."""
    sleeper = f'import os, time; open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))'
    code = f'''
import runpy, sys
import tools.gpu_check
sys.argv = ['gpu_check']
(lambda popen: setattr(tools.gpu_check.subprocess, 'Popen', lambda command, **kwargs: popen(
    [sys.executable, '-c', {sleeper + "; time.sleep(100)"!r}], **kwargs)))(
        tools.gpu_check.subprocess.Popen)
del sys.modules['tools.gpu_check']
runpy.run_module('tools.gpu_check', run_name='__main__')
'''
    env = dict(harness.script_environment(), TMPDIR=str(tmp_path))
    check = subprocess.Popen(
        [sys.executable, '-c', code], cwd=harness.FOLDER, env=env, stderr=subprocess.PIPE
    )
    assert harness.until(lambda: harness.read(str(tmp_path / 'pid')))
    check.send_signal(number)
    _, errors = check.communicate(timeout=harness.AT_ONCE)
    assert check.returncode == (128 + number if number != signal.SIGKILL else -number)
    assert errors == b''
    pid = harness.read(str(tmp_path / 'pid'))
    assert harness.until(lambda: 'sleep(100)' not in harness.read(f'/proc/{pid}/cmdline'))
