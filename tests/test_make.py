"""Tests of the Makefile and of tools/: what `make` builds, chooses and passes on."""

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
    monkeypatch.setattr(environment, 'PYTHONS', {'tf1': ['3.7'], 'tf2': ['3.99']})
    write_command(tmp_path / 'bin/python3.99', FAKE_PYTHON)
    (tmp_path / 'requirements.txt').write_text('tensorflow\n')
    return tmp_path


def installed(project):
    """The arguments of the fake `pip install` since the last call."""
    lines = harness.read('pip.txt').splitlines()
    (project / 'pip.txt').write_text('')
    return [line.split('--disable-pip-version-check ')[1] for line in lines]


@pytest.mark.parametrize(
    'platform, python, nvidia_smi, generation, reason',
    [
        ('Linux x86_64', '3.7', 'exit 9', '1', 'TF=2'),
        ('Linux x86_64', '3.7', 'echo 6.1; echo 7.5', '1', 'CUDA 10.0'),
        ('Linux x86_64', '3.7', 'echo 7.5; echo 8.6', '2', '8.6'),
        ('Linux x86_64', '3.7', '[ "$1" = -L ]', '1', 'CUDA 10.0'),  # An old driver.
        ('Linux x86_64', None, 'exit 9', '2', '3.7'),
        ('Linux aarch64', '3.7', 'exit 9', '2', 'aarch64'),
    ],
)
def test_generation_fits_the_machine(
    monkeypatch, project, platform, python, nvidia_smi, generation, reason
):
    monkeypatch.setattr(environment.platform, 'system', lambda: platform.split()[0])
    monkeypatch.setattr(environment.platform, 'machine', lambda: platform.split()[1])
    monkeypatch.setattr(environment, 'find_python', lambda versions: python)
    write_command(project / 'bin/nvidia-smi', f'#!/bin/sh\n{nvidia_smi}\n')
    capability = environment.compute_capability()
    chosen, why = environment.choose('', capability)
    assert chosen == generation and reason in why
    assert environment.choose('1', capability)[0] == '1'
    with pytest.raises(SystemExit, match='TF=3'):
        environment.choose('3', capability)


def test_python_is_found_on_path_in_pyenv_and_in_uv(project):
    on_path = str(project / 'bin/python3.99')
    assert environment.find_python(['3.98', '3.99']) == on_path
    write_command(project / 'bin/python3.99', '#!/bin/sh\nexit 127\n')  # A shim of pyenv.
    assert environment.find_python(['3.99']) is None
    from_uv = write_command(project / 'uv/python', FAKE_PYTHON)
    write_command(project / 'bin/uv', f'#!/bin/sh\necho {from_uv}\n')
    assert environment.find_python(['3.99']) == from_uv
    for end in '.9', '.16', '-dev':
        write_command(project / f'pyenv/versions/3.99{end}/bin/python', FAKE_PYTHON)
    assert environment.find_python(['3.99']) == f'{project}/pyenv/versions/3.99.16/bin/python'


def test_environment_is_built_once_and_rebuilt_when_out_of_date(project):
    build, pictures = ['pip>=20.3', '-r requirements.txt'], ['matplotlib>=3.5']
    requirements = project / 'requirements.txt'
    for extras, expected, change in [
        ([], build, lambda: None),
        (['pictures'], pictures, requirements.touch),
        (['pictures'], [], lambda: requirements.write_text('tensorflow>2\n')),
        (['pictures'], build + pictures, (project / '.venv/tf2/bin/python').unlink),
        (['pictures'], build + pictures, lambda: None),
    ]:
        assert environment.prepare('tf2', extras) == '.venv/tf2/bin/python'
        assert installed(project) == expected
        change()


def test_failed_build_is_not_mistaken_for_complete(project, monkeypatch, capsys):
    monkeypatch.setattr(environment, 'SECONDS_BETWEEN_LINES', 0.1)
    (project / 'pip.sh').write_text('echo Downloading; sleep 0.5; echo no space left; exit 2')
    for _ in range(2):
        with pytest.raises(SystemExit, match=r'no space left\n[\s\S]*\.venv/tf2\.log'):
            environment.prepare('tf2')
        assert 's: Downloading' in capsys.readouterr().err


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


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_build_and_another_one_begins(project, capsys, number):
    (project / 'pip.sh').write_text('echo $$ >pid; exec sleep 60')
    build = start_environment('--tensorflow=2')
    pid = harness.until(lambda: harness.read('pid').strip())
    (project / 'pip.sh').unlink()
    second = threading.Thread(target=environment.prepare, args=['tf2'])
    second.start()
    assert harness.until(lambda: 'Waiting' in capsys.readouterr().err)
    assert len(installed(project)) == 1 and not (project / '.venv/tf2/ready').exists()
    build.send_signal(number)
    _, errors = build.communicate(timeout=10)
    assert build.returncode == 128 + number and 'Traceback' not in errors
    assert not harness.is_running(pid)
    second.join()
    assert len(installed(project)) == 2 and (project / '.venv/tf2/ready').exists()


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


def make(*arguments):
    """Runs `make` with a command that prints its arguments as the environment."""
    program = 'import json, sys; print(json.dumps(sys.argv[1:]))'
    return subprocess.run(
        [
            'make',
            '--no-print-directory',
            f"ENVIRONMENT={sys.executable} -c '{program}'",
            *arguments,
        ],
        cwd=harness.FOLDER,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )


def test_make_passes_folders_and_arguments_unchanged():
    folder = """/it's a,b/"c"/$HOME/$(d)/`e`/#f/g=h:i"""
    for target in 'train', 'eval', 'multi-gpu', 'cluster', 'tensorboard':
        made = make(target, f'TRAIN_DIR={folder}', 'ARGS=--a=\'b c\' "--d=$$"')
        *arguments, first, second = json.loads(made.stdout)
        assert ('--checkpoint_dir=' if target == 'eval' else '--train_dir=') + folder in arguments
        assert first == '--a=b c' and re.match(r'--d=\d+$', second)  # As a shell reads them.


def test_make_reports_a_wrong_argument_before_it_installs():
    for arguments, hint in [
        (('exercise', 'NAME=sotfmax'), 'softmax'),
        (('experiment',), 'faster'),
        (('convert',), 'DATA_DIR='),
    ]:
        made = make(*arguments)
        assert made.returncode == 2 and made.stdout == ''
        assert hint in made.stderr and '__init__' not in made.stderr


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


def test_tensorboard_shows_both_folders_by_name(monkeypatch, tmp_path):
    server = mock.Mock()
    monkeypatch.setattr(open_tensorboard.program, 'TensorBoard', lambda plugins: server)
    open_tensorboard.main([f'--train_dir={tmp_path}/a,b', '--', '--port=7000'])
    _, logdir, *_, port = server.configure.call_args[0][0]
    links = logdir.replace('--logdir=', '')
    assert port == '--port=7000' and server.main.called
    assert os.readlink(f'{links}/train') == f'{tmp_path}/a,b'
    assert os.readlink(f'{links}/eval') == f'{tmp_path}/a,b_eval'


def test_gpu_check_prints_a_row(monkeypatch, project, capsys):
    def run(script, *flags):
        if script == 'cifar10_eval.py':
            return f'now: precision @ 1 = {sum(gpu_check.BANDS["accuracy"]) / 2:.3f}\n'
        (name,) = [name for name in gpu_check.FIRST_STEP if f'/{name}' in flags[1]]
        expected = gpu_check.BANDS[name][1] + (0.1 if name == 'two towers' else -0.1)
        return (
            f'Running on GPU:0 with TensorFlow 2.21.0 in float32.\n'
            'now: step 0, loss = 99.0 (1.0 examples/sec; 0.1 sec/batch)\n'
            f'now: step 200, loss = {expected:.2f} (1000.0 examples/sec; 0.1 sec/batch)\n'
        )

    monkeypatch.setattr(gpu_check, 'run', run)
    write_command(project / 'bin/nvidia-smi', '#!/bin/sh\necho Card A, 550.1; echo Card A, 550.1\n')
    assert gpu_check.main([]) == 1
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith('| Card A, Card A | 550.1 | 2.21.0 | 1000 |')
    assert row.endswith('| no: two towers |')
