"""What every script needs: flags, errors, folders, locks, signals."""

import builtins
import contextlib
import ctypes
import fcntl
import os
import re
import signal
import sys
import tempfile
import threading
import time

from absl import app

from support.flags import FLAGS

PROGRESS_SECS = 10  # Between two lines during a wait.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: `sbatch --signal=USR1`.


class UserError(Exception):
    """An error the user can fix; the message names the flag or file and says how."""


def run(main, takes_arguments=False):
    """Parses the flags, calls main(argv) and exits with the status that it returns.

    A UserError ends the script with one line on stderr and status 1. Every other exception keeps
    its traceback. Ctrl-C ends the script at once, without a traceback, unless main() handles it.

    Args:
      main: function of the list [script, argument ...] without the flags.
      takes_arguments: if false, arguments that are not flags are an error.
    """

    def parse(argv):
        arguments = app.parse_flags_with_usage(argv)
        if len(arguments) > 1 and not takes_arguments:
            raise UserError(f'unexpected argument: {arguments[1]}')
        return arguments

    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):  # Not in Python 3.6, nor in notebooks.
            stream.reconfigure(errors='backslashreplace', line_buffering=True)
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default and not hasattr(builtins, '__IPYTHON__'):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        app.run(main, flags_parser=parse)
    except UserError as error:
        sys.exit(f'{os.path.basename(sys.argv[0])}: {printable(str(error))}')


def printable(text):
    """Escapes what a terminal would not print but obey, such as color codes in a file name."""
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def reason(error):
    """The message of an exception in one line, without the number and the file of an OSError."""
    return getattr(error, 'strerror', None) or str(error).split('\n')[0] or type(error).__name__


def reject_flags(*names):
    """Raises a UserError for a flag that is defined, but would change nothing in this script."""
    for name in names:
        if not FLAGS[name].using_default_value:
            raise UserError(f'--{name} has no effect here. Leave it out.')


@contextlib.contextmanager
def progress(describe):
    """Prints what describe() returns and the time that has passed, every PROGRESS_SECS seconds."""
    started, done = time.monotonic(), threading.Event()

    def report():
        while not done.wait(PROGRESS_SECS):
            with contextlib.suppress(OSError):  # A file was renamed just now.
                print(f'{describe()} after {time.monotonic() - started:.0f} s')

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# --- Folders -------------------------------------------------------------------


def output_folder(flag):
    """Creates the folder that a flag names, if it does not exist, and tests that it is writable.

    Returns:
      The flag's value.

    Raises:
      UserError: no file can be created there.
    """
    path = local_path(flag)
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f'--{flag}={path}: cannot write there ({error.strerror}). Choose another folder.'
        )
    return path


def local_path(flag):
    """Returns the value of a flag that names a local path. Rejects what TensorFlow cannot use."""
    path = getattr(FLAGS, flag)
    if not path:
        raise UserError(f'--{flag} is empty. Name a folder.')
    if re.match(r'\w+://', path):
        raise UserError(f'--{flag}={path}: only local folders are supported')
    # TensorFlow treats the path of a checkpoint as a pattern, so it does not find one with these
    # characters. Data files have no such limit.
    if flag != 'data_dir' and re.search(r'[\[\\]|//$', path):
        raise UserError(f'--{flag}={path}: TensorFlow cannot use a path with [ or \\ or a final //')
    return path


class Lock:
    """A file lock on a folder. The OS releases it when the process ends."""

    def __init__(self, folder, file):
        self._folder, self._file = folder, file

    def check(self):
        """Raises a UserError if the lock file is gone: then another process could take the lock."""
        try:
            if os.path.samestat(os.stat(self._file.name), os.fstat(self._file.fileno())):
                return
        except OSError:
            pass
        raise UserError(f'{self._folder} was deleted or replaced during the run; nothing was saved')


@contextlib.contextmanager
def locked(folder, busy, wait=False):
    """Holds the lock of a folder.

    Args:
      folder: an existing folder.
      busy: the message when another process holds the lock.
      wait: wait for that process.

    Yields:
      A Lock.

    Raises:
      UserError: another process holds the lock, and `wait` is false.
    """
    with open(os.path.join(folder, '.lock'), 'a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(busy)
            print(busy, file=sys.stderr)
            with progress(lambda: 'Still waiting'):
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # Some file systems have no locks.
            print(f'Warning: cannot lock {folder}: {error.strerror}', file=sys.stderr)
        yield Lock(folder, file)


# --- Processes and signals -------------------------------------------------------------------


def die_with_parent():
    """For preexec_fn of subprocess.Popen: Linux kills the child when this process ends."""
    if sys.platform == 'linux':
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class StopSignals:
    """Notes the first signal of STOP_SIGNALS; the second one ends the process at once.

    A context manager, for the main thread; in other threads it does nothing. Python runs signal
    handlers in the main thread, and only between two of its instructions. A training step may wait
    inside TensorFlow for minutes. Python's wakeup file descriptor gets the number of the signal
    immediately, so a thread reads it there.
    """

    def __init__(self):
        self.number = None

    def __enter__(self):
        self._handlers = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_fd = signal.set_wakeup_fd(self._write)
        for number in STOP_SIGNALS:
            # `nohup` and `&` in a script make a process ignore signals, which it should respect.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, lambda number, frame: None)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        noted_at = None
        for byte in iter(lambda: os.read(self._read, 1), b''):
            number = byte[0]
            if number not in self._handlers:
                continue
            if self.number is None:
                self.number, noted_at = number, time.monotonic()
            # `timeout` sends its signal twice: to the script and to the script's process group.
            elif time.monotonic() > noted_at + 0.2:
                os._exit(128 + number)

    def __exit__(self, *exception):
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
