"""Tests of support/script.py, compat.py and the flags: how every script starts and ends."""

import contextlib
import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading

from absl import flags
import pytest

import cifar10_convert
import cifar10_eval
import cifar10_export
import cifar10_multi_gpu_train
import cifar10_train
from results import record
from support import script
from tests import harness, reference

FLAGS = cifar10_train.FLAGS

COMMON = 'batch_size=128 data_dir=/tmp/cifar10_data use_fp16=false '
TRAINER = COMMON + (
    'train_dir=/tmp/cifar10_train max_steps=1000000 log_device_placement=false log_frequency=10 '
    'save_checkpoint_secs=120 max_to_keep=5 '
)
EVALUATOR = COMMON + (
    'eval_dir=/tmp/cifar10_eval eval_data=test checkpoint_dir=/tmp/cifar10_train '
    'eval_interval_secs=300 num_examples=10000 run_once=false use_moving_averages=true views=1'
)
MODEL = f'checkpoint_dir={harness.FOLDER}/results use_moving_averages=true views=10 '
DEFAULTS = {
    harness.TRAIN: TRAINER,
    harness.MULTI_GPU: TRAINER + 'num_gpus=1',
    harness.EVAL: EVALUATOR,
    'cifar10_predict.py': MODEL + 'top_k=3 json=false batch_size=128 use_fp16=false',
    'cifar10_export.py': MODEL + 'export_dir=/tmp/cifar10_export',
}


def test_help_describes_every_flag_with_its_default(start):
    helps = {name: start(name, '--help') for name in DEFAULTS}
    for name, help_ in helps.items():
        help_.wait()
        pattern = r'^ +--(?:\[no\])?(\w+): (.*(?:\n {4,}.*)*)'
        defaults = []
        for flag, text in re.findall(pattern, help_.stdout, re.MULTILINE):
            assert re.match(r'(<\S+>: )?[A-Z]\w+ ', text), f'{flag} is not described'
            default = re.search(r"\(default:\s+'?(.*?)'?\)", text)
            defaults += [f'{flag}={default.group(1)}'] if default else []
        assert sorted(defaults) == sorted(DEFAULTS[name].split())
        assert f'python {name}' in help_.stdout, 'how to call it'
        assert help_.stderr == ''


def test_wrong_argument_is_reported_before_any_work(start, tmp_path):
    folder = f'--train_dir={tmp_path}/train'
    started = {
        word: start(harness.TRAIN, folder, word)
        for word in ('--run_once', '--max_steps=x', 'stray')
    }
    for word, trainer in started.items():
        assert trainer.wait() == 1
        assert word.strip('-=x') in trainer.stderr and 'Traceback' not in trainer.stderr
        assert trainer.stdout == ''
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
def test_flag_rejects_meaningless_values(flag, good, bad):
    flags.FLAGS[flag].parse(good)
    for value in bad.split():
        with pytest.raises(flags.IllegalFlagValueError, match=f'--{flag}={value}'):
            flags.FLAGS[flag].parse(value)


@pytest.mark.parametrize(
    'place', ['file', 'file/below', 'gs://bucket/run', 'run[1]', '', 'read-only']
)
def test_unwritable_folder_is_an_error_that_names_the_flag(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('')
    (tmp_path / 'read-only').mkdir()
    FLAGS.train_dir = place
    with contextlib.ExitStack() as stack:
        if place == 'read-only':
            stack.enter_context(harness.read_only(tmp_path / 'read-only'))
        with pytest.raises(script.UserError) as error:
            script.output_folder('train_dir')
    assert str(error.value).startswith('--train_dir') and place in str(error.value)
    assert sorted(os.listdir(str(tmp_path))) == ['file', 'read-only']


@pytest.mark.parametrize('place', ['hdfs://host/folder', 'file/below'])
@pytest.mark.parametrize(
    'module, flag',
    [
        (cifar10_train, 'train_dir'),
        (cifar10_train, 'data_dir'),
        (cifar10_multi_gpu_train, 'train_dir'),
        (cifar10_eval, 'eval_dir'),
        (cifar10_eval, 'checkpoint_dir'),
        (cifar10_convert, 'data_dir'),
        (cifar10_export, 'export_dir'),
        (record, 'record_dir'),
    ],
    ids=lambda value: getattr(value, '__name__', value),
)
def test_each_folder_flag_rejects_what_it_cannot_use(
    module, flag, place, data_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('')
    names = ['train_dir', 'eval_dir', 'checkpoint_dir', 'export_dir', 'record_dir']
    harness.set_flags(**dict.fromkeys(names, str(tmp_path)), data_dir=data_dir, run_once=True)
    setattr(FLAGS, flag, place)
    with pytest.raises(script.UserError, match=f'--{flag}={place}: '):
        module.main([module.__name__, str(tmp_path)])
    assert 'precision' not in capsys.readouterr().out
    assert {'file', '.lock'} >= set(os.listdir(str(tmp_path)))


def test_error_of_a_programmer_keeps_its_traceback(start, data_dir, tmp_path):
    flags = f'--data_dir={data_dir}', f'--train_dir={tmp_path}'
    ended = start(harness.TRAIN, *flags, before='import tests.programs.forgotten_key')
    assert ended.wait() == 1
    assert ended.stderr.count('Traceback (most recent call last)') == 1
    assert 'in main' in ended.stderr and 'in forgetful' in ended.stderr
    assert ended.errors[-1] == "KeyError: 'forgotten'"


def test_error_of_a_user_is_one_line(start, tmp_path):
    (tmp_path / 'file').write_text('')
    ended = start(harness.TRAIN, f'--train_dir={tmp_path}/file')
    assert ended.wait() == 1
    assert len(ended.errors) == 1 and ended.errors[0].startswith(f'{harness.TRAIN}: --train_dir=')
    assert ended.stdout == ''


def test_text_is_escaped_for_terminal_and_encoding(start):
    ended = start('tests/programs/print_names.py')
    assert ended.wait() == 1
    assert ended.stdout == r'\u043a\u043e\u0442' + '\n'
    assert '\x1b' not in ended.stderr and r'\x1b[31m' in ended.stderr


def test_failed_import_prints_what_tensorflow_printed():
    broken = os.path.join(harness.FOLDER, 'tests', 'programs', 'broken')
    result = subprocess.run(
        [sys.executable, '-c', 'import support.compat'],
        cwd=harness.FOLDER,
        env=dict(harness.script_environment(), PYTHONPATH=broken),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith('GLIBC is too old\n')
    assert 'ImportError: cannot load the library' in result.stderr


def test_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, 'flock', no_locks)
    with script.locked(str(tmp_path), 'busy') as lock:
        lock.check()
    warning = capsys.readouterr().err
    assert str(tmp_path) in warning and os.strerror(errno.ENOLCK) in warning


def test_error_under_a_lock_is_not_mistaken_for_a_lock(tmp_path, capsys):
    for error in BlockingIOError('mine'), OSError('mine'):
        with pytest.raises(OSError, match='mine'):
            with script.locked(str(tmp_path), 'busy'):
                raise error
    assert capsys.readouterr().err == ''


def test_signal_to_another_thread_is_noted():
    with script.StopSignals() as signals:
        sender = threading.Thread(
            target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        )
        sender.start()
        assert harness.until(lambda: signals.number, harness.AT_ONCE) == signal.SIGTERM
        sender.join()


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


def test_signals_are_left_alone_in_other_threads():
    def use():
        with script.StopSignals() as signals:
            numbers.append(signals.number)

    numbers = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert numbers == [None]


def test_signal_while_the_queue_fills_stops_after_the_first_step(train, tmp_path):
    """`timeout` sends a signal twice at almost the same time; that counts as one."""
    gate = tmp_path / 'gate'
    filling = train(before=harness.blocked_input(gate))
    assert harness.until(lambda: (tmp_path / 'graph.pbtxt').exists())
    filling.send(signal.SIGTERM)
    filling.send(signal.SIGTERM)
    gate.write_text('')
    assert filling.wait() == 128 + signal.SIGTERM
    assert harness.saved_steps(tmp_path)[-1] in (1, 2)
    assert 'SIGTERM' in filling.lines[-1] and filling.stderr == ''


def test_second_signal_ends_a_step_that_never_ends(train, tmp_path):
    first = train(before=harness.blocked_input(tmp_path / 'never'))
    assert harness.until(lambda: (tmp_path / 'graph.pbtxt').exists())
    first.send(signal.SIGINT)
    assert not harness.until(lambda: first.status() is not None, 0.5), 'it waits for the step'
    first.send(signal.SIGINT)
    assert first.wait(harness.AT_ONCE) == 128 + signal.SIGINT
    assert first.stderr == '' and harness.saved_steps(tmp_path) == [0]


def test_signal_during_download_ends_a_script_at_once(start, tmp_path):
    before = 'import tests.programs.stalled_download'
    trainer = start(harness.TRAIN, f'--train_dir={tmp_path}', before=before)
    evaluator = start(harness.EVAL, f'--eval_dir={tmp_path}', before=before)
    for stalled, number in (trainer, signal.SIGINT), (evaluator, signal.SIGTERM):
        stalled.wait_for('stalled')
        stalled.send(number)
        assert stalled.wait(harness.AT_ONCE) == -number
        assert stalled.stderr == ''


def test_ctrl_c_while_tensorflow_loads_ends_a_script(train, tmp_path):
    loading = train('--max_steps=1', fresh=True)
    assert harness.until(lambda: 'tensorflow' in harness.read(f'/proc/{loading.pid}/maps'))
    loading.send(signal.SIGINT)
    assert loading.wait(harness.AT_ONCE) == -signal.SIGINT
    assert loading.stdout == loading.stderr == '' and os.listdir(str(tmp_path)) == []


def test_signal_ends_the_evaluator_at_once(start, data_dir, tmp_path):
    variables = reference.random_variables()
    reference.write_checkpoint(tmp_path, 1, reference.checkpoint_values(1, {}, variables))
    common = [f'--data_dir={data_dir}', f'--eval_dir={tmp_path}/eval']
    waiting = start(harness.EVAL, *common, f'--checkpoint_dir={tmp_path}/none')
    working = start(
        harness.EVAL,
        *common,
        f'--checkpoint_dir={tmp_path}',
        '--run_once',
        before=harness.blocked_input(tmp_path / 'never'),
    )
    waiting.wait_for(f'^Waiting .*{tmp_path}/none')
    working.wait_for(r'^Evaluating .*model\.ckpt-1\b')
    for evaluator, number in (waiting, signal.SIGINT), (working, signal.SIGTERM):
        evaluator.send(number)
        assert evaluator.wait(harness.AT_ONCE) == -number
        assert evaluator.stderr == ''
