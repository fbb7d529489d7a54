"""Tests of support/script.py, compat.py and the flags: how every script starts and ends."""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

from absl import flags
import pytest

import cifar10_eval  # noqa: F401 -- For its flags.
import cifar10_multi_gpu_train
import cifar10_train
from support import script
from tests import harness, reference

FLAGS = cifar10_train.FLAGS

COMMON = {'batch_size': '128', 'data_dir': '/tmp/cifar10_data', 'use_fp16': 'false'}
TRAINER = dict(
    COMMON,
    train_dir='/tmp/cifar10_train',
    max_steps='1000000',
    log_device_placement='false',
    log_frequency='10',
    save_checkpoint_secs='120',
    max_to_keep='5',
)
EVALUATOR = dict(
    COMMON,
    eval_dir='/tmp/cifar10_eval',
    eval_data='test',
    checkpoint_dir='/tmp/cifar10_train',
    eval_interval_secs='300',
    num_examples='10000',
    run_once='false',
    use_moving_averages='true',
    views='1',
)
MODEL = {
    'checkpoint_dir': os.path.join(harness.FOLDER, 'results'),
    'use_moving_averages': 'true',
    'views': '10',
}
DEFAULTS = {
    harness.TRAIN: TRAINER,
    harness.MULTI_GPU: dict(TRAINER, num_gpus='1'),
    harness.EVAL: EVALUATOR,
    'cifar10_predict.py': dict(MODEL, top_k='3', json='false', batch_size='128', use_fp16='false'),
    'cifar10_export.py': dict(MODEL, export_dir='/tmp/cifar10_export'),
}

# --- Flags ---------------------------------------------------------------------


@pytest.mark.parametrize('name', sorted(DEFAULTS))
def test_help_describes_every_flag_with_its_default(start, name):
    help_ = start(name, '--help')
    help_.wait()
    described = re.findall(r'^ +--(?:\[no\])?(\w+): (.*(?:\n {4,}.*)*)', help_.stdout, re.MULTILINE)
    defaults = {}
    for flag, text in described:
        assert re.match(r'(<\S+>: )?[A-Z]\w+ ', text), f'{flag} is not described'
        default = re.search(r"\(default:\s+'?(.*?)'?\)", text)
        if default:
            defaults[flag] = default.group(1)
    assert defaults == DEFAULTS[name]
    assert f'python {name}' in help_.stdout, 'how to call it'
    assert help_.stderr == ''


@pytest.mark.parametrize(
    'argument, named',
    [('--run_once', 'run_once'), ('--max_steps=x', 'max_steps'), ('stray', 'stray')],
)
def test_wrong_argument_is_reported_before_any_work(start, tmp_path, argument, named):
    trainer = start(harness.TRAIN, f'--train_dir={tmp_path}/train', argument)
    assert trainer.wait() == 1
    assert named in trainer.stderr and 'Traceback' not in trainer.stderr
    assert trainer.stdout == '' and os.listdir(str(tmp_path)) == []


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


# --- Folders -------------------------------------------------------------------


@pytest.fixture
def read_only_folder(tmp_path):
    folder = tmp_path / 'read-only'
    folder.mkdir()
    if not shutil.which('mount') or subprocess.call(
        ['mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', str(folder)], stderr=subprocess.DEVNULL
    ):
        pytest.skip('only root may mount a folder, and permissions do not stop root')
    yield str(folder)
    subprocess.check_call(['umount', '-l', str(folder)])


@pytest.fixture
def unwritable(request, tmp_path):
    """A path that cannot be an output folder."""
    (tmp_path / 'file').write_text('')
    if request.param == 'read-only':
        return request.getfixturevalue('read_only_folder')
    return {
        'a file': str(tmp_path / 'file'),
        'below a file': str(tmp_path / 'file' / 'folder'),
        'a URL': 'gs://bucket/run',
        'a bracket': str(tmp_path / 'run[1]'),
        'empty': '',
    }[request.param]


@pytest.mark.parametrize(
    'unwritable',
    ['a file', 'below a file', 'a URL', 'a bracket', 'empty', 'read-only'],
    indirect=True,
)
def test_unwritable_folder_is_an_error_that_names_the_flag(unwritable, tmp_path):
    FLAGS.train_dir = unwritable
    before = sorted(os.listdir(str(tmp_path)))
    with pytest.raises(script.UserError) as error:
        script.output_folder('train_dir')
    assert str(error.value).startswith('--train_dir') and unwritable in str(error.value)
    assert sorted(os.listdir(str(tmp_path))) == before and not os.path.exists('gs:')


def test_output_folder_is_created_and_left_empty(tmp_path):
    FLAGS.train_dir = f'{tmp_path}/a/b'
    assert script.output_folder('train_dir') == f'{tmp_path}/a/b'
    assert os.listdir(f'{tmp_path}/a/b') == []


@pytest.mark.parametrize(
    'module, flag',
    [
        (cifar10_train, 'train_dir'),
        (cifar10_multi_gpu_train, 'train_dir'),
        (cifar10_eval, 'eval_dir'),
        (cifar10_eval, 'checkpoint_dir'),
        (cifar10_train, 'data_dir'),
    ],
    ids=lambda value: getattr(value, '__name__', value),
)
def test_url_is_rejected_by_each_folder_flag(module, flag, data_dir, tmp_path, capsys):
    for name in 'train_dir', 'eval_dir', 'checkpoint_dir':
        setattr(FLAGS, name, str(tmp_path))
    FLAGS.data_dir = data_dir
    setattr(FLAGS, flag, 'hdfs://host/folder')
    with pytest.raises(script.UserError, match=f'--{flag}=hdfs://host/folder'):
        module.main()
    assert not os.path.exists('hdfs:')


# --- Errors --------------------------------------------------------------------


@pytest.mark.parametrize('name', [harness.TRAIN, harness.EVAL])
def test_error_of_a_programmer_keeps_its_traceback(start, data_dir, tmp_path, name):
    output = f'--{"eval" if name == harness.EVAL else "train"}_dir={tmp_path}'
    ended = start(
        name, f'--data_dir={data_dir}', output, before='import tests.programs.forgotten_key'
    )
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
    env = dict(
        harness.script_environment(),
        PYTHONPATH=os.path.join(harness.FOLDER, 'tests', 'programs', 'broken'),
    )
    result = subprocess.run(
        [sys.executable, '-c', 'import support.compat'],
        cwd=harness.FOLDER,
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith('GLIBC is too old\n')
    assert 'ImportError: cannot load the library' in result.stderr


# --- Locks ---------------------------------------------------------------------


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


# --- Signals -------------------------------------------------------------------


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
    second = train(name=harness.MULTI_GPU)
    assert second.wait() == 1
    assert len(second.errors) == 1 and str(tmp_path) in second.errors[0]

    first.send(signal.SIGINT)
    assert not harness.until(lambda: first.status() is not None, 0.5), 'it waits for the step'
    first.send(signal.SIGINT)
    assert first.wait(harness.AT_ONCE) == 128 + signal.SIGINT
    assert first.stderr == '' and harness.saved_steps(tmp_path) == [0]


@pytest.mark.parametrize(
    'name, number', [(harness.TRAIN, signal.SIGINT), (harness.EVAL, signal.SIGTERM)]
)
def test_signal_during_download_ends_a_script_at_once(start, tmp_path, name, number):
    output = f'--{"eval" if name == harness.EVAL else "train"}_dir={tmp_path}'
    stalled = start(name, output, before='import tests.programs.stalled_download')
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
