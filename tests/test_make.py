"""Tests of the Makefile and of tools/: what `make` builds, chooses and passes on."""

import fcntl
import glob
import json
import os
import re
import signal
import subprocess
import sys
import threading
from unittest import mock

import pytest

from tests import harness
from tools import environment, gpu_check, open_tensorboard

# Only pretends to install. Runs pip.sh, if there is one, and run.sh when called to `run`.
FAKE_PYTHON = '''#!/bin/sh
case "$*" in
  *platform*) echo 3.99.0 ;;
  "-m venv --clear"*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  "-m pip"*) echo "$@" >>pip.txt; if [ -e pip.sh ]; then . ./pip.sh; fi ;;
  "run"*) shift; . ./run.sh ;;
esac
'''


def write_command(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with requirements.txt, and a PATH with FAKE_PYTHON as Python 3.99."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:/usr/bin:/bin')
    monkeypatch.setenv('PYENV_ROOT', str(tmp_path / 'pyenv'))
    monkeypatch.setattr(environment, 'PYTHONS', {'tf2': ['3.99']})
    write_command(tmp_path / 'bin/python3.99', FAKE_PYTHON)
    (tmp_path / 'requirements.txt').write_text('tensorflow\n')
    return tmp_path


def installed(project):
    """The arguments of the fake `pip install` since the last call."""
    path = project / 'pip.txt'
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text('')
    return [line.split('--disable-pip-version-check ')[1] for line in lines]


# --- The choice ------------------------------------------------------------------


@pytest.mark.parametrize(
    'asked, platform, python, capability, generation, reason',
    [
        ('', 'Linux x86_64', '3.7', None, '1', 'TF=2'),
        ('', 'Linux x86_64', '3.7', 7.5, '1', 'CUDA 10.0'),
        ('', 'Linux x86_64', '3.7', 0.0, '1', 'CUDA 10.0'),
        ('', 'Linux x86_64', '3.7', 8.6, '2', '8.6'),
        ('', 'Linux x86_64', None, None, '2', '3.7'),
        ('', 'Linux aarch64', '3.7', None, '2', 'aarch64'),
        ('', 'Darwin arm64', '3.7', None, '2', 'Darwin'),
        ('1', 'Linux x86_64', '3.7', 9.0, '1', 'asked'),
        ('2', 'Linux x86_64', '3.7', None, '2', 'asked'),
    ],
)
def test_generation_fits_the_machine(
    monkeypatch, asked, platform, python, capability, generation, reason
):
    monkeypatch.setattr(environment.platform, 'system', lambda: platform.split()[0])
    monkeypatch.setattr(environment.platform, 'machine', lambda: platform.split()[1])
    monkeypatch.setattr(environment, 'find_python', lambda versions: python)
    chosen, why = environment.choose(asked, capability)
    assert chosen == generation and reason in why
    with pytest.raises(SystemExit, match='TF=3'):
        environment.choose('3', None)


@pytest.mark.parametrize(
    'script, capability',
    [
        ('echo 7.5; echo 8.0', 8.0),
        ('[ "$1" = -L ]', 0.0),  # An old driver does not know the other query.
        ('exit 9', None),
        (None, None),
    ],
)
def test_compute_capability_is_the_newest_card(project, script, capability):
    if script:
        write_command(project / 'bin/nvidia-smi', f'#!/bin/sh\n{script}\n')
    assert environment.compute_capability() == capability


def test_python_is_found_on_path_in_pyenv_and_in_uv(project):
    on_path = str(project / 'bin/python3.99')
    assert environment.find_python(['3.98', '3.99']) == on_path
    write_command(project / 'bin/python3.99', '#!/bin/sh\nexit 127\n')  # A shim of pyenv.
    assert environment.find_python(['3.99']) is None
    from_uv = write_command(project / 'uv/python', FAKE_PYTHON)
    write_command(project / 'bin/uv', f'#!/bin/sh\necho {from_uv}\n')
    assert environment.find_python(['3.99']) == from_uv
    in_pyenv = [project / f'pyenv/versions/3.99{end}/bin/python' for end in ('.9', '.16', '-dev')]
    for path in in_pyenv:
        write_command(path, FAKE_PYTHON)
    assert environment.find_python(['3.99']) == str(in_pyenv[1])


# --- Building --------------------------------------------------------------------


def test_environment_is_built_once_and_rebuilt_when_out_of_date(project):
    build = ['pip>=20.3', '-r requirements.txt']
    requirements = project / 'requirements.txt'
    for extras, expected, change in [
        ([], build, lambda: None),
        (['pictures'], ['matplotlib>=3.5'], requirements.touch),
        (['pictures'], [], lambda: requirements.write_text('tensorflow>2\n')),
        (['pictures'], build + ['matplotlib>=3.5'], (project / '.venv/tf2/bin/python').unlink),
        (['pictures'], build + ['matplotlib>=3.5'], (project / 'bin/python3.99').unlink),
    ]:
        assert environment.prepare('tf2', extras) == '.venv/tf2/bin/python'
        assert installed(project) == expected
        change()
    requirements.write_text('tensorflow>3\n')
    with pytest.raises(SystemExit, match='3.99'):
        environment.prepare('tf2')


def test_failed_build_is_not_mistaken_for_complete(project, capsys):
    (project / 'pip.sh').write_text('echo no space left; exit 2')
    for _ in range(2):
        with pytest.raises(SystemExit, match=r'no space left\n[\s\S]*\.venv/tf2\.log'):
            environment.prepare('tf2')


def test_long_build_prints_progress(project, monkeypatch, capsys):
    monkeypatch.setattr(environment, 'SECONDS_BETWEEN_LINES', 0.1)
    (project / 'pip.sh').write_text('echo Downloading tensorflow; sleep 0.5')
    environment.prepare('tf2')
    assert 's: Downloading tensorflow' in capsys.readouterr().err


def test_two_builds_take_turns(project, capsys):
    (project / '.venv').mkdir()
    second = threading.Thread(target=environment.prepare, args=['tf2'])
    with open('.venv/tf2.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        assert harness.until(lambda: 'Waiting' in capsys.readouterr().err)
        assert installed(project) == []
    second.join()
    assert len(installed(project)) == 2


def start_environment(*arguments, **kwargs):
    program = 'import sys; from tools import environment; environment.PYTHONS = {"tf2": ["3.99"]}; '
    return subprocess.Popen(
        [sys.executable, '-c', program + 'environment.main(sys.argv[1:])', *arguments],
        env=dict(os.environ, PYTHONPATH=harness.FOLDER),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        **kwargs,
    )


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signal_ends_the_build_and_its_children(project, number):
    (project / 'pip.sh').write_text('echo $$ >pid; exec sleep 60')
    build = start_environment('--tensorflow=2')
    assert harness.until(lambda: harness.read('pid').strip())
    build.send_signal(number)
    _, errors = build.communicate(timeout=10)
    assert build.returncode == 128 + number and 'Traceback' not in errors
    assert not os.path.exists(f'/proc/{harness.read("pid").strip()}')
    assert not (project / '.venv/tf2/ready').exists()


def test_script_gets_its_arguments_and_signals(project):
    """The script replaces the process. Signals that a shell has ignored stay ignored."""
    (project / 'run.sh').write_text(
        'for word; do echo "<$word>"; done; grep SigIgn /proc/self/status; kill -TERM $$'
    )
    arguments = ['a b', '', '--', "'$x", '--tensorflow=1']
    ignore_sigint = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    script = start_environment('--tensorflow=2', '--', 'run', *arguments, preexec_fn=ignore_sigint)
    *lines, ignored = script.communicate(timeout=10)[0].splitlines()
    assert lines == [f'<{argument}>' for argument in arguments]
    assert int(ignored.split()[1], 16) & 1 << (signal.SIGINT - 1)
    assert script.returncode == -signal.SIGTERM


# --- The Makefile ----------------------------------------------------------------


def make(*arguments, **environ):
    return subprocess.run(
        ['make', '--no-print-directory', *arguments],
        cwd=harness.FOLDER,
        env=dict(os.environ, **environ),
        capture_output=True,
        text=True,
    )


PRINT_ARGUMENTS = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"


@pytest.mark.parametrize('target', ['train', 'eval', 'multi-gpu', 'cluster', 'tensorboard'])
def test_make_passes_folders_unchanged(target):
    folder = """/it's a,b/"c"/$HOME/$(d)/`e`/#f/g=h:i"""
    made = make(target, f'TRAIN_DIR={folder}', f'ENVIRONMENT={PRINT_ARGUMENTS}')
    flag = '--checkpoint_dir=' if target == 'eval' else '--train_dir='
    assert flag + folder in json.loads(made.stdout)


def test_make_passes_arguments_as_the_shell_reads_them():
    arguments = f'ENVIRONMENT={PRINT_ARGUMENTS}', 'ARGS=--a=\'b c\' "--d=$$"'
    *_, folder, first, second = json.loads(make('train', *arguments, TRAIN_DIR='/a b').stdout)
    assert (folder, first) == ('--train_dir=/a b', '--a=b c') and re.match(r'--d=\d+', second)


@pytest.mark.parametrize(
    'target, argument, parts',
    [
        ('exercise', 'NAME=sotfmax', ['softmax', 'sotfmax']),
        ('solution', 'NAME=sotfmax', ['softmax', 'sotfmax']),
        ('convert', 'ARGS=/pictures', ['DATA_DIR=']),
    ],
)
def test_make_reports_a_wrong_argument_before_it_installs(target, argument, parts):
    made = make(target, argument, 'ENVIRONMENT=false')
    assert made.returncode == 2 and '__init__' not in made.stderr
    assert all(part in made.stderr for part in parts)


def test_documents_mention_only_targets_that_exist():
    targets = re.findall(r'^  make (\S+)', make('help').stdout, re.MULTILINE)
    assert targets[:4] == ['help', 'train', 'eval', 'tensorboard']
    # The Makefile has one rule for all soak-%.
    soak = glob.glob(os.path.join(harness.FOLDER, 'tests', 'soak', '*.py'))
    targets += ['soak-' + os.path.basename(path)[: -len('.py')] for path in soak]
    for pattern in '*.md', 'docs/*.md', 'results/*.md', '*.py', '.ci/run':
        for path in glob.glob(os.path.join(harness.FOLDER, pattern)):
            found = re.findall(r'(?:`|^ *|or: )make ([a-z-]+)', harness.read(path), re.MULTILINE)
            assert set(found) <= set(targets), path


# --- Tools -----------------------------------------------------------------------


def test_tensorboard_shows_both_folders_by_name(monkeypatch, tmp_path, capsys):
    server = mock.Mock()
    monkeypatch.setattr(open_tensorboard.program, 'TensorBoard', lambda plugins: server)
    train_dir = tmp_path / 'a,b'
    train_dir.mkdir()
    open_tensorboard.main([f'--train_dir={train_dir}', '--', '--port=7000'])
    argv = server.configure.call_args[0][0]
    links = argv[1].replace('--logdir=', '')
    assert argv[-1] == '--port=7000' and server.main.called
    assert os.readlink(f'{links}/train') == str(train_dir)
    assert os.readlink(f'{links}/eval') == f'{train_dir}_eval'
    assert f'{train_dir}_eval' in capsys.readouterr().out  # It does not exist yet.


@pytest.mark.parametrize(
    'device, loss, row, status',
    [
        ('the CPU (no GPU found)', 0, '| CPU | none | 2.21.0 | 1000 |', 0),
        ('GPU:0', 0, '| Card A, Card A | 550.1 | 2.21.0 | 1000 |', 0),
        ('GPU:0', 3, 'no: one device, two towers, --use_fp16 |', 1),
    ],
)
def test_gpu_check_prints_a_row(monkeypatch, project, capsys, device, loss, row, status):
    def run(script, *flags):
        if script == 'cifar10_eval.py':
            return f'now: precision @ 1 = {sum(gpu_check.BANDS["accuracy"]) / 2:.3f}\n'
        name = [name for name in gpu_check.FIRST_STEP if f'/{name}' in flags[1]][0]
        expected = sum(gpu_check.BANDS[name]) / 2 + loss
        line = 'now: step {}, loss = {:.2f} ({}.0 examples/sec; 0.1 sec/batch)\n'
        first = gpu_check.FIRST_STEP[name]
        head = f'Running on {device} with TensorFlow 2.21.0 in float32.\n'
        return head + line.format(0, 99, 1) + line.format(first, expected, 1000)

    monkeypatch.setattr(gpu_check, 'run', run)
    write_command(project / 'bin/nvidia-smi', '#!/bin/sh\necho Card A, 550.1; echo Card A, 550.1\n')
    assert gpu_check.main([]) == status
    assert row in capsys.readouterr().out
