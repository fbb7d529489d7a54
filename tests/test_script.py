"""Tests of support/script.py and of the flags: how every script starts and ends."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time

from absl import flags
import pytest
import tensorflow.compat.v1 as tf

import cifar10_eval  # noqa: F401 -- For its flags.
import cifar10_multi_gpu_train  # noqa: F401
from support import script
from tests import clusters
from tests import harness
from tests import reference

COMMON = {
    'batch_size': '128',
    'data_dir': '/tmp/cifar10_data',
    'data_url': 'http://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
    'use_fp16': 'false',
}
DEFAULTS = {
    harness.TRAIN: dict(
        COMMON,
        train_dir='/tmp/cifar10_train',
        max_steps='1000000',
        log_device_placement='false',
        log_frequency='10',
        save_checkpoint_secs='120',
        max_to_keep='5',
    ),
    harness.EVAL: dict(
        COMMON,
        eval_dir='/tmp/cifar10_eval',
        eval_data='test',
        checkpoint_dir='/tmp/cifar10_train',
        eval_interval_secs='300',
        num_examples='10000',
        run_once='false',
        use_moving_averages='true',
        views='1',
    ),
}
DEFAULTS[harness.MULTI_GPU] = dict(DEFAULTS[harness.TRAIN], num_gpus='1')
DEFAULTS[clusters.DISTRIBUTED] = dict(DEFAULTS[harness.MULTI_GPU], **DEFAULTS[harness.EVAL])
MODEL = {
    'checkpoint_dir': os.path.join(harness.FOLDER, 'results'),
    'use_moving_averages': 'true',
    'views': '10',
}
DEFAULTS['cifar10_predict.py'] = dict(MODEL, top_k='3', json='false', batch_size='128')
DEFAULTS['cifar10_export.py'] = dict(MODEL, export_dir='/tmp/cifar10_export')
DEFAULTS['cifar10_convert.py'] = {
    'data_dir': '/tmp/cifar10_data',
    'coarse': 'false',
    'keep_going': 'false',
}
SCRIPTS = [harness.TRAIN, harness.MULTI_GPU, harness.EVAL]

# --- Flags -------------------------------------------------------------------


@pytest.mark.parametrize('name', sorted(DEFAULTS))
def test_help_describes_every_flag_with_its_default(start, name):
    help_ = start(name, '--help')
    help_.wait()
    described = re.findall(r'^ +--(?:\[no\])?(\w+): (.*(?:\n {4,}.*)*)', help_.stdout, re.MULTILINE)
    defaults = {}
    for flag, text in described:
        assert re.match(r'(<\S+>: )?[A-Z]\w+ ', text), f'{flag} is not described'
        defaults[flag] = re.search(r"\(default:\s+'?(.*?)'?\)", text).group(1)
    assert defaults == DEFAULTS[name]
    assert f'python {name}' in help_.stdout, 'how to call it'
    assert help_.errors == []


@pytest.mark.parametrize(
    'name, unknown, bad',
    [
        (harness.TRAIN, 'num_gpus', 'max_steps=x'),
        (harness.MULTI_GPU, 'run_once', 'num_gpus=0'),
        (harness.EVAL, 'max_steps', 'eval_data=foo'),
    ],
)
def test_what_does_not_belong_on_the_command_line_is_named(
    start, data_dir, tmp_path, name, unknown, bad
):
    output = f'--{"eval" if name == harness.EVAL else "train"}_dir={tmp_path}/output'
    arguments = {f'--{unknown}=1': unknown, f'--{bad}': bad, 'stray': 'unexpected argument: stray'}
    for refused, named in [
        (start(name, f'--data_dir={data_dir}', output, argument), named)
        for argument, named in arguments.items()
    ]:
        assert refused.wait() == 1
        assert re.search(rf'\b{named}\b', '\n'.join(refused.errors))
        assert 'Traceback' not in refused.stderr
        assert refused.stdout == ''
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize(
    'flag, good, bad',
    [
        ('batch_size', '1', '0 -1 x'),
        ('max_steps', '1', '0'),
        ('log_frequency', '1', '0'),
        ('save_checkpoint_secs', '1', '0 1.5'),
        ('max_to_keep', '0', '-1'),
        ('num_gpus', '1', '0'),
        ('eval_interval_secs', '1', '0'),
        ('num_examples', '1', '0'),
        ('eval_data', 'train_eval', 'train'),
        ('run_once', 'true', 'perhaps'),
        ('views', '10', '0 2 11 x'),
    ],
)
def test_a_flag_takes_no_value_that_makes_no_sense(flag, good, bad):
    flags.FLAGS[flag].parse(good)
    for value in bad.split():
        with pytest.raises(flags.IllegalFlagValueError, match=f'--{flag}={value}'):
            flags.FLAGS[flag].parse(value)


# --- Errors ------------------------------------------------------------------

FORGOTTEN = '''
import cifar10
def forgetful(images, num_classes):
    return {}['forgotten']
cifar10.inference = forgetful
'''


def test_the_error_of_a_programmer_keeps_its_traceback(start, train, data_dir, tmp_path):
    evaluator = [f'--data_dir={data_dir}', f'--checkpoint_dir={tmp_path}', f'--eval_dir={tmp_path}']
    for ended in [
        train(before=FORGOTTEN),
        train(before=FORGOTTEN, name=harness.MULTI_GPU, folder='towers'),
        start(harness.EVAL, *evaluator, before=FORGOTTEN),
    ]:
        assert ended.wait() == 1
        assert ended.stderr.count('Traceback (most recent call last)') == 1
        assert 'in main' in ended.stderr and 'in forgetful' in ended.stderr
        assert ended.errors[-1] == "KeyError: 'forgotten'"


# --- Locks -------------------------------------------------------------------


def test_a_second_trainer_keeps_off_and_a_second_signal_ends_the_first_at_once(train, tmp_path):
    first = train(before=harness.slow_input('distort', 0))  # Its first step never ends.
    assert harness.until(lambda: (tmp_path / 'model.ckpt-0.index').exists())

    second = train(name=harness.MULTI_GPU)
    assert second.wait() == 1
    busy = f'{harness.MULTI_GPU}: another trainer is at work in {tmp_path}'
    assert len(second.errors) == 1 and second.errors[0].startswith(busy)
    assert second.stdout == ''

    first.send(signal.SIGINT)
    time.sleep(1)
    assert first.status() is None, 'the step is to be finished'
    first.send(signal.SIGINT)
    assert first.wait(harness.AT_ONCE) == 130
    assert first.errors == []
    assert harness.saved_steps(tmp_path) == [0]
    with script.locked(str(tmp_path), 'busy'):  # The lock has gone with the process.
        pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, 'flock', no_locks)
    worked = False
    with script.locked(str(tmp_path), 'busy'):
        worked = True
    assert worked
    warning = capsys.readouterr().err
    assert str(tmp_path) in warning and os.strerror(errno.ENOLCK) in warning


def test_what_goes_wrong_under_a_lock_is_not_mistaken_for_a_lock(tmp_path, capsys):
    for error in BlockingIOError('mine'), OSError('mine'):
        with pytest.raises(OSError, match='mine'):
            with script.locked(str(tmp_path), 'busy'):
                raise error
    assert capsys.readouterr().err == ''


# --- Signals -----------------------------------------------------------------


def test_a_signal_while_the_queue_fills_is_heard_after_the_first_step(train, tmp_path):
    filling = train(before=harness.slow_input('distort', 3))
    # This checkpoint is written when the session is there; the queue is empty then.
    assert harness.until(lambda: (tmp_path / 'model.ckpt-0.index').exists())
    filling.send(signal.SIGTERM)
    time.sleep(0.002)
    filling.send(signal.SIGTERM)  # As `timeout` does: it is one signal, sent twice.
    assert filling.wait() == 143
    stopped_at = harness.saved_steps(tmp_path)[-1]
    assert stopped_at <= 1
    assert filling.lines[-1].startswith(f'Stopped by SIGTERM at step {stopped_at}. Saved ')
    assert filling.errors == []


SIGNAL_IN_GRAPH = '''
import cifar10, os, signal, time
loss = cifar10.loss
def loss_with_signal(*args):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
    return loss(*args)
cifar10.loss = loss_with_signal
'''


def test_a_signal_that_the_system_gives_to_another_thread_is_heard():
    def work(signals):
        time.sleep(0.5)  # By now the main thread waits.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return harness.until(lambda: signals, harness.AT_ONCE)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert script.hear_signals(work) == [signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_after_the_work_ends_the_process_at_once():
    work = 'lambda signals: print("done", flush=True)'
    command = [
        sys.executable,
        '-c',
        f'import time; from support import script; script.hear_signals({work}); time.sleep(60)',
    ]
    with subprocess.Popen(command, cwd=harness.FOLDER, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'done\n'
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(harness.AT_ONCE) == 130


def test_a_signal_while_the_graph_is_built_ends_the_trainer_before_the_first_step(train, tmp_path):
    stopped = train(before=SIGNAL_IN_GRAPH)
    assert stopped.wait() == 130
    assert stopped.lines[2:] == [
        f'Stopped by SIGINT at step 0. Saved {tmp_path}/model.ckpt-0; the same command goes on '
        'from there.'
    ]
    assert stopped.errors == []


def test_a_background_job_does_not_hear_the_ctrl_c_of_the_foreground(train, tmp_path):
    # As a shell without job control starts a command with `&`.
    job = train(before='import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)')
    job.wait_for('step 1,')
    job.send(signal.SIGINT)
    time.sleep(0.3)  # Longer than what counts as the same signal, sent twice.
    step = len(job.lines)  # Two lines come before that of step 0: this step is still to come.
    job.wait_for(f'step {step},')
    job.send(signal.SIGTERM)
    assert job.wait() == 143
    assert job.lines[-1].startswith('Stopped by SIGTERM at step ')


STALLED_SOURCE = '''
import cifar10, time
def stalled():
    print('stalled', flush=True)
    time.sleep(1000)
cifar10.maybe_download_and_extract = stalled
'''


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['SIGINT', 'SIGTERM'])
def test_a_signal_before_the_training_ends_a_script_at_once(start, tmp_path, number):
    flags = [f'--train_dir={tmp_path}/train'], [f'--eval_dir={tmp_path}/eval']
    scripts = [start(name, *flags[name == harness.EVAL], before=STALLED_SOURCE) for name in SCRIPTS]
    for stalled in scripts:
        stalled.wait_for('stalled')
        stalled.send(number)
        assert stalled.wait(harness.AT_ONCE) in (-number, 128 + number)
        assert stalled.errors == []
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize(
    'number',
    [
        signal.SIGTERM,
        pytest.param(
            signal.SIGINT,
            marks=pytest.mark.xfail(
                tf.__version__.startswith('1.'),
                reason='TensorFlow 1.15 swallows KeyboardInterrupt in some parts of its import',
            ),
        ),
    ],
    ids=['SIGTERM', 'SIGINT'],
)
def test_a_signal_while_tensorflow_loads_ends_a_script(train, tmp_path, number):
    loading = train('--max_steps=1', fresh=True)
    assert harness.until(lambda: 'tensorflow' in harness.read(f'/proc/{loading.pid}/maps'))
    loading.send(number)
    harness.until(lambda: loading.stdout or loading.status() is not None, harness.AT_ONCE)
    ended = loading.status()
    loading.kill()
    assert ended and loading.stdout == ''
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['SIGINT', 'SIGTERM'])
def test_a_signal_ends_the_evaluator_at_once_while_it_waits_and_while_it_works(
    start, data_dir, tmp_path, number
):
    variables = reference.random_variables()
    reference.write_checkpoint(tmp_path, 1, reference.checkpoint_values(1, {}, variables))
    common = [f'--data_dir={data_dir}', f'--eval_dir={tmp_path}/eval']
    waiting = start(harness.EVAL, *common, f'--checkpoint_dir={tmp_path}/none')
    stalled = harness.slow_input('fixed_views', 0)
    flags = [f'--checkpoint_dir={tmp_path}', '--run_once']
    working = start(harness.EVAL, *common, *flags, before=stalled)
    waiting.wait_for('^Evaluating checkpoints in ')
    working.wait_for(r'^Evaluating .*model\.ckpt-1\b')
    time.sleep(0.5)  # So that it has begun.
    for evaluator in waiting, working:
        evaluator.send(number)
        assert evaluator.wait(harness.AT_ONCE) in (-number, 128 + number)
        assert evaluator.errors == []
        assert 'precision' not in evaluator.stdout
