"""Tests of support/script.py, compat.py and the flags: how every script starts and ends."""

import contextlib
import errno
import fcntl
import os
import platform
import re
import subprocess
import sys
import threading
from unittest import mock

from absl import flags
import pytest

import cifar10_convert
import cifar10_distributed_train
import cifar10_eval
import cifar10_export
import cifar10_multi_gpu_train
import cifar10_train
from results import record
from support import script
from support.compat import tf
from tests import clusters, harness
from tests.test_make import project  # noqa: F401 -- A fixture.
from tools import environment

FLAGS = flags.FLAGS


def test_help_describes_the_flags_of_a_script(start):
    for module, own in (cifar10_multi_gpu_train, 'num_gpus max_steps'), (cifar10_eval, 'views'):
        found = {flag.name: flag for flag in FLAGS.get_key_flags_for_module(module)}
        assert set(found) >= {'batch_size', 'data_dir', 'use_fp16', *own.split()}
        for flag in found.values():
            assert re.match(r'(<\S+>: )?[A-Z]\w+ .*\.$', flag.help), flag.name
    # Before that, the imports have restored Python's handler of Ctrl-C.
    before = 'import signal as s; assert s.getsignal(s.SIGINT) is s.default_int_handler'
    help_ = start('cifar10_predict.py', '--help', before=before)
    help_.wait()
    assert 'python cifar10_predict.py cat.jpg' in help_.stdout and help_.stderr == ''
    assert re.search(r"--views: [^-]*\(default: '10'\)", help_.stdout)


def test_wrong_argument_ends_a_script_before_any_work(start, tmp_path):
    folder = f'--train_dir={tmp_path}/train'
    started = {word: start(harness.TRAIN, folder, word) for word in ('--max_steps=x', 'stray')}
    for word, trainer in started.items():
        assert trainer.wait() == 1 and trainer.stdout == ''
        assert word.strip('-=x') in trainer.stderr and 'Traceback' not in trainer.stderr
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize(
    'wrong',
    'batch_size=0 batch_size=x max_steps=0 log_frequency=0 save_checkpoint_secs=0 max_to_keep=-1 '
    'num_gpus=0 eval_interval_secs=0 num_examples=0 eval_data=train views=2'.split(),
)
def test_flag_rejects_meaningless_values(wrong):
    flag, value = wrong.split('=')
    with pytest.raises(flags.IllegalFlagValueError, match=f'--{wrong}'):
        FLAGS[flag].parse(value)


# --- Folders -------------------------------------------------------------------


@pytest.mark.parametrize('place', ['file', 'gs://bucket/run', 'run[1]', 'run//', '', 'read-only'])
def test_unwritable_folder_is_an_error_that_names_the_flag(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    (tmp_path / 'read-only').mkdir()
    FLAGS.train_dir = place
    with contextlib.ExitStack() as stack:
        if place == 'read-only':
            stack.enter_context(harness.read_only(tmp_path / 'read-only'))
        with pytest.raises(script.UserError, match=f'^--train_dir.*{re.escape(place)}'):
            script.output_folder('train_dir')
    assert sorted(os.listdir(str(tmp_path))) == ['file', 'read-only']


@pytest.mark.parametrize(
    'module, flag, place',
    [
        (cifar10_train, 'train_dir', 'file/below'),
        (cifar10_train, 'data_dir', 'hdfs://host/data'),
        (cifar10_multi_gpu_train, 'train_dir', 'file/below'),
        (cifar10_distributed_train, 'train_dir', 'file/below'),
        (cifar10_eval, 'eval_dir', 'file/below'),
        (cifar10_eval, 'checkpoint_dir', 'hdfs://host/run'),
        (cifar10_convert, 'data_dir', 'file/below'),
        (cifar10_export, 'export_dir', 'file/below'),
        (record, 'record_dir', 'file/below'),
        (record, 'train_dir', 'hdfs://host/run'),
    ],
)
def test_each_folder_flag_rejects_what_it_cannot_use(
    module, flag, place, data_dir, tmp_path, monkeypatch, capsys
):
    config = clusters.config_of({'chief': ['127.0.0.1:1'], 'worker': ['127.0.0.1:2']}, 'chief')
    monkeypatch.setenv('TF_CONFIG', config)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    names = ['train_dir', 'eval_dir', 'checkpoint_dir', 'export_dir', 'record_dir']
    harness.set_flags(**dict.fromkeys(names, str(tmp_path)), data_dir=data_dir, run_once=True)
    setattr(FLAGS, flag, place)
    with pytest.raises(script.UserError, match=f'--{flag}={place}: '):
        module.main([module.__name__, str(tmp_path)])
    assert 'precision' not in capsys.readouterr().out
    assert {'file', '.lock'} >= set(os.listdir(str(tmp_path)))


# --- Errors --------------------------------------------------------------------


def test_error_of_a_programmer_keeps_its_traceback(start, data_dir, tmp_path):
    flags = f'--data_dir={data_dir}', f'--train_dir={tmp_path}'
    before = 'import cifar10; cifar10.inference = lambda images: {}["forgotten"]'
    ended = start(harness.TRAIN, *flags, before=before)
    assert ended.wait() == 1 and ended.stderr.count('Traceback (most recent call last)') == 1
    assert 'in main' in ended.stderr and ended.errors[-1] == "KeyError: 'forgotten'"


def test_error_of_a_user_is_one_line_escaped_for_terminal_and_encoding(start):
    ended = start('tests/programs/print_names.py')
    assert ended.wait() == 1
    assert ended.stdout == r'\u043a\u043e\u0442' + '\n'
    assert ended.errors == [r'print_names.py: \u043d\u0435\u0442 \x1b[31m\u043f\u0441\u0430']


def test_failed_import_prints_what_tensorflow_printed():
    broken = os.path.join(harness.FOLDER, 'tests', 'programs', 'broken')
    result = subprocess.run(
        [sys.executable, '-c', 'import support.compat'],
        cwd=harness.FOLDER,
        env=dict(harness.script_environment(), PYTHONPATH=broken),
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith('GLIBC is too old\n')
    assert 'ImportError: cannot load the library' in result.stderr


@pytest.mark.skipif(
    tf.__version__.startswith('1.') or platform.machine() != 'x86_64',
    reason='1.15 has no oneDNN, and on other CPUs TensorFlow decides',
)
def test_onednn_is_on_unless_switched_off():
    code = 'import support.compat; from tensorflow.python.util import _pywrap_util_port as port'
    for setting, is_on in ({}, 'True'), ({'TF_ENABLE_ONEDNN_OPTS': '0'}, 'False'):
        printed = subprocess.check_output(
            [sys.executable, '-c', code + '; print(port.IsMklEnabled())'],
            cwd=harness.FOLDER,
            env=dict(harness.script_environment(), **setting),
            universal_newlines=True,
        )
        assert printed == is_on + '\n'


# --- Locks ---------------------------------------------------------------------


def test_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, 'flock', mock.Mock(side_effect=OSError(errno.ENOLCK, 'no locks')))
    with script.locked(str(tmp_path), 'busy') as lock:
        lock.check()
    assert re.search(f'{tmp_path}.*no locks', capsys.readouterr().err)


def test_error_under_a_lock_is_not_mistaken_for_a_lock(tmp_path, capsys):
    for error in BlockingIOError('mine'), OSError('mine'):
        with pytest.raises(OSError, match='mine'):
            with script.locked(str(tmp_path), 'busy'):
                raise error
    assert capsys.readouterr().err == ''


def wait_for_lock():
    with script.locked('.', 'busy', wait=True):
        pass


@pytest.mark.parametrize(
    'wait, lock, line',
    [
        (wait_for_lock, '.lock', 'Still waiting after '),
        (lambda: environment.prepare('tf2'), '.venv/tf2.lock', 'Waiting for another process'),
    ],
)
@pytest.mark.usefixtures('project')
def test_waiting_for_a_lock_is_shown_again_and_again(monkeypatch, capsys, wait, lock, line):
    monkeypatch.setattr(environment, 'SECONDS_BETWEEN_LINES', 0.1)
    monkeypatch.setattr(script, 'PROGRESS_SECS', 0.1)
    os.mkdir('.venv')
    second, shown = threading.Thread(target=wait), []

    def count_lines():
        shown.extend(capsys.readouterr())
        return ''.join(shown).count(line)

    with open(lock, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second.start()
        assert harness.until(lambda: count_lines() >= 2)
    second.join()
