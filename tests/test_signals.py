"""Tests of what signals do to the scripts, and when."""

import os
import signal
import threading

import pytest

from support import script
from tests import harness


def test_signal_to_another_thread_is_noted_and_handlers_are_left_alone_there():
    def use():
        with script.StopSignals() as signals:
            numbers.append(signals.number)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    numbers = []
    with script.StopSignals() as signals:
        thread = threading.Thread(target=use)
        thread.start()
        assert harness.until(lambda: signals.number, harness.AT_ONCE) == signal.SIGTERM
        thread.join()
    assert numbers == [None]


def test_ignored_sigint_stays_ignored():
    """A shell without job control starts a command with `&` so that it ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with script.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert harness.until(lambda: signals.number, harness.AT_ONCE) == signal.SIGUSR1
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def filling(train, tmp_path):
    """A trainer whose queue gets no images until the file `gate` exists."""
    before = f'import tests.programs.blocked_input as b; b.GATE = {str(tmp_path / "gate")!r}'
    trainer = train(before=before)
    assert harness.until(lambda: (tmp_path / 'graph.pbtxt').exists())
    return trainer


def test_signal_while_the_queue_fills_stops_after_the_first_step(filling, tmp_path):
    filling.send(signal.SIGTERM)
    filling.send(signal.SIGTERM)  # `timeout` sends a signal twice; that counts as one.
    (tmp_path / 'gate').touch()
    assert filling.wait() == 128 + signal.SIGTERM
    assert harness.saved_steps(tmp_path)[-1] in (1, 2)
    assert 'SIGTERM' in filling.lines[-1] and filling.stderr == ''


def test_second_signal_ends_a_step_that_never_ends(filling, tmp_path):
    filling.send(signal.SIGINT)
    assert not harness.until(lambda: filling.status() is not None, 0.5), 'it waits for the step'
    filling.send(signal.SIGINT)
    assert filling.wait(harness.AT_ONCE) == 128 + signal.SIGINT
    assert filling.stderr == '' and harness.saved_steps(tmp_path) == [0]


def test_ctrl_c_ends_the_evaluator_which_shows_again_and_again_that_it_waits(
    start, data_dir, tmp_path
):
    flags = f'--data_dir={data_dir}', f'--checkpoint_dir={tmp_path}/typo', f'--eval_dir={tmp_path}'
    fast = 'from support import checkpoints as c; c.FIRST_REPORT_SECS, c.POLL_SECS = 0.5, 1'
    evaluator = start(harness.EVAL, *flags, before=fast)
    evaluator.wait_for(rf'(No checkpoint after \d+ s. Is {tmp_path}/typo .*\n(.*\n)*){{2}}')
    evaluator.send(signal.SIGINT)
    assert evaluator.wait(harness.AT_ONCE) == -signal.SIGINT and evaluator.stderr == ''


def test_ctrl_c_during_imports_ends_a_script_silently(tmp_path):
    """All scripts import NumPy, of which this is another one."""
    stub = 'import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n'
    (tmp_path / 'numpy.py').write_text(stub)
    env = dict(harness.script_environment(), PYTHONPATH=f'{tmp_path}:{harness.FOLDER}')
    names = [
        'train',
        'multi_gpu_train',
        'distributed_train',
        'eval',
        'predict',
        'export',
        'convert',
    ]
    paths = [f'cifar10_{name}.py' for name in names] + ['results/record.py', 'results/pictures.py']
    scripts = [
        harness.start_script(str(tmp_path / str(i)), path, [], env) for i, path in enumerate(paths)
    ]
    for path, ended in zip(paths, scripts):
        assert ended.wait() == -signal.SIGINT and ended.stdout == ended.stderr == '', path


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_signal_ends_gpu_check_and_its_trainer(start, tmp_path, number):
    pid_file = str(tmp_path / 'pid')  # Of a program that sleeps, instead of the trainer.
    sleeper = f'import os, time; open({pid_file!r}, "w").write(str(os.getpid())); time.sleep(100)'
    before = f'''
import subprocess, sys
popen = subprocess.Popen
subprocess.Popen = lambda _, **kwargs: popen([sys.executable, "-c", {sleeper!r}], **kwargs)
'''
    check = start('tests/programs/run_module.py', 'tools.gpu_check', before=before)
    assert harness.until(lambda: harness.read(pid_file))
    check.send(number)
    status = 128 + number if number == signal.SIGTERM else -number
    assert check.wait(harness.AT_ONCE) == status and check.stderr == ''
    assert harness.until(lambda: not harness.is_running(harness.read(pid_file)))
