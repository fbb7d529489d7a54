"""Builds the Python environments in .venv/ and runs commands in them.

    python3 tools/environment.py [--tensorflow=1|2] [--with=EXTRA] [-- ARGUMENT ...]
    python3 tools/environment.py --torch

Chooses a generation of TensorFlow, prints the reason, and builds .venv/tf1 or .venv/tf2 if it is
missing or out of date. Then the Python of that environment replaces this process and gets the
arguments. `make` calls this from the root of the repository. It needs no packages and runs on every
Python from 3.6 on.
"""

import argparse
import contextlib
import fcntl
import functools
import glob
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

# The Pythons with wheels of TensorFlow 1.15 for Linux, of TensorFlow 2 and of PyTorch, best first.
PYTHONS = {
    'tf1': ['3.7'],
    'tf2': ['3.13', '3.12', '3.11', '3.10'],
    'torch': ['3.11', '3.12', '3.13', '3.10'],
}
REQUIREMENTS = {
    'tf1': 'requirements.txt',
    'tf2': 'requirements.txt',
    'torch': 'benchmarks/requirements.txt',
}
# Packages that only some targets need. pytest 7.4 is the last one for Python 3.7.
PICTURES = ['matplotlib>=3.5']
EXERCISES = ['scipy']
TESTS = [
    *('pytest>=7.4,<10', 'pytest-xdist>=3,<4', 'ruff>=0.14,<1', 'pyyaml>=5'),
    *('ipykernel>=6', 'jupyter_client>=7'),
    *(PICTURES + EXERCISES),
]
EXTRAS = {
    'cuda': ['-r', 'requirements.txt', 'tensorflow[and-cuda]'],
    'pictures': PICTURES,
    'exercises': EXERCISES,
    'tests': TESTS,
}
NEWEST_CAPABILITY = 7.5  # Of the GPUs that CUDA 10.0, and therefore TensorFlow 1.15, supports.
SECONDS_BETWEEN_LINES = 10
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


def say(line):
    print(line, file=sys.stderr, flush=True)


def output_of(*command):
    """Returns what a command prints to stdout, or None if it fails."""
    try:
        output = subprocess.check_output(command, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.decode().strip()


# --- Which Python, which TensorFlow ----------------------------------------------


def find_python(versions):
    """Returns the path of the first Python of these versions that can build an environment.

    Looks on PATH, in pyenv and in uv. Each candidate is tried: pyenv leaves commands on PATH that
    only print an error, and Debian's Python may lack venv. Returns None if there is none.
    """
    for version in versions:
        for path in candidates(version):
            if path and output_of(path, '-c', 'import ensurepip, venv') is not None:
                return path
    return None


def candidates(version):
    yield shutil.which('python' + version)
    pyenv = os.environ.get('PYENV_ROOT') or os.path.expanduser('~/.pyenv')
    found = glob.glob(f'{glob.escape(pyenv)}/versions/{version}.*[0-9]/bin/python')
    yield from sorted(found, key=lambda path: [int(n) for n in re.findall(r'\d+', path)])[::-1]
    yield output_of('uv', 'python', 'find', '--system', version)


def compute_capability():
    """Returns the highest compute capability of the GPUs, or None without an NVIDIA driver.

    Returns 0.0 if the driver is too old to report it.
    """
    if output_of('nvidia-smi', '-L') is None:
        return None
    reported = output_of('nvidia-smi', '--query-gpu=compute_cap', '--format=csv,noheader') or ''
    return max(map(float, re.findall(r'^\d+\.\d+$', reported, re.MULTILINE)), default=0.0)


def choose(asked, capability):
    """Returns the generation of TensorFlow, '1' or '2', and the reason.

    Args:
      asked: the user's choice, or ''.
      capability: from compute_capability().
    """
    system = f'{platform.system()} {platform.machine()}'
    if asked:
        if asked not in ('1', '2'):
            sys.exit(f'TF={asked}: choose TF=1 for TensorFlow 1.15 or TF=2 for 2.x')
        return asked, 'as you asked'
    if system != 'Linux x86_64':
        return '2', f'there is no 1.15 for {system}'
    if not find_python(PYTHONS['tf1']):
        return '2', '1.15 needs Python 3.7 with venv, which was not found'
    if capability is None:
        return '1', 'the reference (TF=2 is about twice as fast on a CPU)'
    if capability > NEWEST_CAPABILITY:
        return '2', (
            f'the GPU has compute capability {capability}; '
            f'the CUDA 10.0 of 1.15 supports GPUs up to {NEWEST_CAPABILITY}'
        )
    return '1', 'the reference (it needs CUDA 10.0 and cuDNN 7; TF=2 installs its own CUDA)'


# --- Environments ----------------------------------------------------------------


def prepare(name, extras=()):
    """Builds or completes the environment .venv/NAME and returns the path of its Python.

    Stamps in its folder record what is installed: a copy of the requirements, and a file for each
    of the extras. A stamp is written last, so an interrupted build is never mistaken for a complete
    one.
    """
    folder = os.path.join('.venv', name)
    python = os.path.join(folder, 'bin', 'python')
    with open(REQUIREMENTS[name]) as file:
        wanted = {'ready': file.read()}
    wanted.update((extra, '\n'.join(EXTRAS[extra])) for extra in extras)

    def is_missing(stamp):
        try:
            with open(os.path.join(folder, stamp)) as file:
                return file.read() != wanted[stamp] or output_of(python, '-V') is None
        except OSError:
            return True

    if not any(map(is_missing, wanted)):
        return python
    os.makedirs('.venv', exist_ok=True)
    with locked(folder + '.lock') as lock, open(folder + '.log', 'w') as log:
        run = functools.partial(run_logged, log=log, lock=lock)
        # `python -m pip`, because the script bin/pip breaks if the folder is moved.
        install = [python, '-m', 'pip', 'install', '--disable-pip-version-check']
        for stamp in filter(is_missing, wanted):
            if stamp == 'ready':
                create(folder, PYTHONS[name], run)
                run(install + ['pip>=20.3'])
                run(install + ['-r', REQUIREMENTS[name]])
            else:
                say(f'Installing the packages for {stamp} in {folder} ...')
                run(install + EXTRAS[stamp])
            with open(os.path.join(folder, stamp), 'w') as file:
                file.write(wanted[stamp])
    return python


@contextlib.contextmanager
def locked(path):
    """Holds a file lock, which the OS releases when this process and its child have ended."""
    with open(path, 'a') as file:
        start = time.monotonic()
        next_line = start
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= next_line:
                    say(
                        'Waiting for another process that is building this environment '
                        f'({time.monotonic() - start:.0f} s) ...'
                    )
                    next_line += SECONDS_BETWEEN_LINES
                time.sleep(0.2)
            except OSError as error:  # Some file systems have no locks.
                say(f'Warning: cannot lock {path}: {error.strerror}')
                break
        yield file


def create(folder, versions, run):
    python = find_python(versions)
    if not python:
        sys.exit(
            f'No Python for {folder}. Install Python {" or ".join(versions)} with its module venv, '
            'on PATH, with pyenv or with uv.'
        )
    version = output_of(python, '-c', 'import platform; print(platform.python_version())')
    say(f'Building {folder} with Python {version}. This takes a minute or more ...')
    if os.path.exists(os.path.join(folder, 'ready')):
        os.remove(os.path.join(folder, 'ready'))
    run([python, '-m', 'venv', '--clear', folder])


def run_logged(command, log, lock):
    """Runs a command with its output in a log, whose last line is printed every ten seconds.

    Exits with the end of the log if the command fails.
    """

    def end_of_log(lines):
        with open(log.name, errors='replace') as file:
            return '\n'.join(file.read().strip().split('\n')[-lines:])

    def unblock():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    start = time.monotonic()
    # A signal is handled before this command is started or in the `try`, which ends the command.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # So that the command's own children can be ended, too.
        preexec_fn=unblock,
        pass_fds=[lock.fileno()],  # Keeps the lock if this process is killed.
    )
    try:
        unblock()
        while process.poll() is None:
            try:
                process.wait(SECONDS_BETWEEN_LINES)
            except subprocess.TimeoutExpired:
                say(f'  {time.monotonic() - start:.0f} s: {end_of_log(1)[:100]}')
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # pip removes its temporary files.
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        sys.exit(f'{end_of_log(20)}\nCould not build the environment. The whole log: {log.name}')


def stop(number, frame):
    say('Stopped.')
    sys.exit(128 + number)


def main(argv):
    # argparse would also remove a second `--`, which belongs to the arguments.
    end = argv.index('--') if '--' in argv else len(argv)
    arguments = argv[end + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--tensorflow', metavar='1|2', default='')
    parser.add_argument('--with', dest='extra', choices=sorted(EXTRAS), help='more packages')
    parser.add_argument('--torch', action='store_true', help='only build .venv/torch')
    args = parser.parse_args(argv[:end])
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # As under `nohup`.
            signal.signal(number, stop)
    if args.torch:
        prepare('torch')
        return
    capability = compute_capability()
    generation, reason = choose(args.tensorflow, capability)
    name, version = {'1': ('tf1', '1.15'), '2': ('tf2', '2.x')}[generation]
    say(f'TensorFlow {version} in .venv/{name}: {reason}.')
    extras = ['cuda'] if generation == '2' and capability is not None else []
    python = prepare(name, extras + ([args.extra] if args.extra else []))
    if arguments:
        os.execv(python, [python] + arguments)
    say(f'To use it in this shell: . .venv/{name}/bin/activate')


if __name__ == '__main__':
    main(sys.argv[1:])
