"""Start and end of every script: flags, errors, signals, locks."""

import concurrent.futures
import contextlib
import fcntl
import os
import signal
import sys
import time

from absl import app


class UserError(Exception):
    """What a user can mend; the text says what is wrong and the way out."""


def run(main, takes_arguments=False):
    """Parses the flags, calls main() and exits with the status that it returns.

    With `takes_arguments`, it is main(list of those that are no flags); otherwise there must
    be none.

    A UserError is told in one line, with status 1. Everything else that is raised keeps
    its traceback. Until hear_signals() is called, signals end the script at once.
    """

    def checked_main(argv):
        if len(argv) > 1 and not takes_arguments:
            raise app.UsageError('unexpected argument: ' + argv[1])
        try:
            return main(argv[1:]) if takes_arguments else main()
        except UserError as error:
            return f'{os.path.basename(argv[0])}: {error}'

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    app.run(checked_main)


def hear_signals(work):
    """Calls work(signals), which has to come to an end when a signal is in that list.

    Python hands a signal to its main thread, and only between two of its instructions,
    whereas a step of training may wait inside TensorFlow for minutes. So the work is done
    in another thread, and the main one just listens.

    Args:
      work: function of the list to which the number of the first SIGINT or SIGTERM is
        added. The second one ends the process at once, and so does any after the work.

    Returns:
      What work() returns.
    """
    signals, first_at = [], None

    def handle(number, frame):
        nonlocal first_at
        if result.done():
            os._exit(128 + number)
        if not signals:
            signals.append(number)
            first_at = time.monotonic()
        # `timeout` sends its signal twice, to the script and to the script's process group.
        elif time.monotonic() > first_at + 0.2:
            os._exit(128 + number)

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        result = executor.submit(work, signals)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handle)
        # Not for ever: the system may hand the signal to another of the process's threads, which
        # leaves it to the main one, but does not wake that up.
        while not concurrent.futures.wait([result], timeout=1).done:
            pass
        return result.result()


@contextlib.contextmanager
def locked(folder, busy, wait=False):
    """Holds the lock of a folder, which goes with the process, however that ends.

    Args:
      folder: has to exist.
      busy: what to say when another process holds the lock.
      wait: wait for that process.

    Raises:
      UserError: another process holds the lock, and `wait` is false.
    """
    with open(os.path.join(folder, '.lock'), 'a') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(busy)
            print(busy, file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # Not every file system has locks.
            print(f'Warning: cannot lock {folder}: {error.strerror}', file=sys.stderr, flush=True)
        yield
