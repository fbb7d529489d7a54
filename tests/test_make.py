"""Tests of the Makefile and of tools/: what `make` builds, chooses and passes on."""

import fcntl
import glob
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading

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
    'asked, system, machine, python, capability, generation, reason',
    [
        ('', 'Linux', 'x86_64', '3.7', None, '1', 'TF=2'),
        ('', 'Linux', 'x86_64', '3.7', 7.5, '1', 'CUDA 10.0'),
        ('', 'Linux', 'x86_64', '3.7', 0.0, '1', 'CUDA 10.0'),
        ('', 'Linux', 'x86_64', '3.7', 8.6, '2', '8.6'),
        ('', 'Linux', 'x86_64', None, None, '2', '3.7'),
        ('', 'Linux', 'aarch64', '3.7', None, '2', 'aarch64'),
        ('', 'Darwin', 'arm64', '3.7', None, '2', 'Darwin'),
        ('1', 'Linux', 'x86_64', '3.7', 9.0, '1', 'asked'),
        ('2', 'Linux', 'x86_64', '3.7', None, '2', 'asked'),
    ],
)
def test_generation_fits_the_machine(
    monkeypatch, asked, system, machine, python, capability, generation, reason
):
    monkeypatch.setattr(platform, 'system', lambda: system)
    monkeypatch.setattr(platform, 'machine', lambda: machine)
    monkeypatch.setattr(environment, 'find_python', lambda versions: python)
    chosen, why = environment.choose(asked, capability)
    assert chosen == generation and reason in why


def test_unknown_generation_is_rejected():
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


def test_environment_is_built_once(project):
    for extras in [], ['pictures'], ['pictures']:
        assert environment.prepare('tf2', extras) == '.venv/tf2/bin/python'
    assert installed(project) == ['pip>=20.3', '-r requirements.txt', 'matplotlib>=3.5']


@pytest.mark.parametrize('change', ['requirements', 'python', 'nothing'])
def test_environment_is_rebuilt_when_out_of_date(project, change):
    environment.prepare('tf2', ['pictures'])
    before = installed(project)
    if change == 'requirements':
        (project / 'requirements.txt').write_text('tensorflow>2\n')
    elif change == 'python':
        (project / '.venv/tf2/bin/python').unlink()
    else:
        (project / 'requirements.txt').touch()
    environment.prepare('tf2', ['pictures'])
    assert installed(project) == ([] if change == 'nothing' else before)


def test_failed_build_is_not_mistaken_for_complete(project, capsys):
    (project / 'pip.sh').write_text('echo no space left; exit 2')
    for _ in range(2):
        with pytest.raises(SystemExit, match=r'no space left\n[\s\S]*\.venv/tf2\.log'):
            environment.prepare('tf2')
    (project / 'pip.sh').unlink()
    installed(project)
    environment.prepare('tf2')
    assert installed(project) == ['pip>=20.3', '-r requirements.txt']


def test_missing_python_is_one_line(project):
    (project / 'bin/python3.99').unlink()
    with pytest.raises(SystemExit, match='3.99'):
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


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_the_build_and_its_children(project, number):
    (project / 'pip.sh').write_text('echo $$ >pid; exec sleep 60')
    build = start_environment('--tensorflow=2')
    assert harness.until(lambda: harness.read('pid').strip())
    build.send_signal(number)
    _, errors = build.communicate(timeout=10)
    assert build.returncode == 128 + number and 'Traceback' not in errors
    assert not os.path.exists(f'/proc/{harness.read("pid").strip()}')
    assert not (project / '.venv/tf2/ready').exists()


def test_arguments_reach_the_script_and_signals_do(project):
    (project / 'run.sh').write_text('for word; do echo "<$word>"; done; kill -TERM $$')
    arguments = ['a b', '', '--', "'$x", '--tensorflow=1']
    script = start_environment('--tensorflow=2', '--', 'run', *arguments)
    output, _ = script.communicate(timeout=10)
    assert output.splitlines() == [f'<{argument}>' for argument in arguments]
    assert script.returncode == -signal.SIGTERM  # The script has replaced the process.


def test_ignored_signals_stay_ignored(project):
    (project / 'run.sh').write_text('grep SigIgn /proc/self/status')
    script = start_environment(
        *('--tensorflow=2', '--', 'run'),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    output, _ = script.communicate(timeout=10)
    assert int(output.split()[1], 16) & 1 << (signal.SIGINT - 1)


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
    made = make('train', '''ARGS=--a='b c' "--d=$$"''', f'ENVIRONMENT={PRINT_ARGUMENTS}')
    *_, first, second = json.loads(made.stdout)
    assert first == '--a=b c' and re.match(r'--d=\d+', second)


def test_make_takes_folders_from_the_environment():
    made = make('data', f'ENVIRONMENT={PRINT_ARGUMENTS}', DATA_DIR='/a b')
    assert json.loads(made.stdout)[-1] == '--data_dir=/a b'


@pytest.mark.parametrize('target', ['exercise', 'solution'])
def test_make_lists_the_exercises_when_the_name_is_wrong(target):
    made = make(target, 'NAME=sotfmax', 'ENVIRONMENT=false')
    assert made.returncode == 2 and 'softmax' in made.stderr and 'sotfmax' in made.stderr
    assert '__init__' not in made.stderr


def test_make_convert_asks_for_a_folder():
    made = make('convert', 'ARGS=/pictures', 'ENVIRONMENT=false')
    assert made.returncode == 2 and 'DATA_DIR=' in made.stderr


def test_documents_mention_only_targets_that_exist():
    targets = re.findall(r'^  make (\S+)', make('help').stdout, re.MULTILINE)
    assert targets[:4] == ['help', 'train', 'eval', 'tensorboard']
    for pattern in '*.md', 'docs/*.md', 'results/*.md', '*.py', '.ci/run':
        for path in glob.glob(os.path.join(harness.FOLDER, pattern)):
            found = re.findall(r'(?:`|^ *|or: )make ([a-z-]+)', harness.read(path), re.MULTILINE)
            assert set(found) <= set(targets), path


# --- Tools -----------------------------------------------------------------------


def test_tensorboard_shows_both_folders_by_name(monkeypatch, tmp_path, capsys):
    class FakeTensorBoard:
        def __init__(self, plugins):
            pass

        def configure(self, argv):
            self.argv = argv

        def main(self):
            return self.argv

    monkeypatch.setattr(open_tensorboard.program, 'TensorBoard', FakeTensorBoard)
    train_dir = tmp_path / 'a,b'
    train_dir.mkdir()
    argv = open_tensorboard.main([f'--train_dir={train_dir}', '--', '--port=7000'])
    links = argv[1].replace('--logdir=', '')
    assert argv[-1] == '--port=7000'
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
