"""Start and end of every script: flags, errors, signals."""

import contextlib
import os
import re
import select
import signal
import sys
import tempfile
import threading
import time

from support import dataset

import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS


class UserError(Exception):
    """What a user can mend; the text says what is wrong and the way out."""


# Of TensorFlow's errors those of files, and of memory. Others are for whoever changes the code.
USER_OP_ERRORS = (tf.errors.NotFoundError, tf.errors.PermissionDeniedError,
                  tf.errors.DataLossError, tf.errors.ResourceExhaustedError)

# `timeout` sends its signal twice, to the script and to the script's process group.
SAME_SIGNAL_SECS = 0.2


def brief(error):
    """One line of an error's text, which may hold a whole stack trace."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # TensorFlow's errors with files read 'PATH; REASON', in 2.x somewhere in the middle.
    return next((line for line in lines if re.match(r'\S.*; ', line)), lines[0])


def refuse_unreadable_folders(*flags):
    """Has the flags refuse paths under which TensorFlow does not find again what it has written."""
    for flag in flags:
        tf.flags.register_validator(
            flag, lambda folder: not re.search(r'[\[\\]|://', folder),
            message='TensorFlow cannot read checkpoints in a folder with "[", "\\" or "://" in its '
                    'path; choose another')


def make_folder(flag):
    """Makes the folder that a flag names, if need be.

    Raises:
      tf.flags.IllegalFlagValueError: that, or writing to it, is not possible.
    """
    folder = FLAGS[flag].value
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise tf.flags.IllegalFlagValueError(
            'flag --%s=%s: cannot write there: %s' % (flag, folder, error.strerror))


def on_signal(first):
    """Has SIGINT, SIGTERM and SIGHUP heard even while the main thread waits inside TensorFlow.

    Args:
      first: called with the first signal's number, in a thread of its own. The
        second signal ends the process at once with status 128 + number; what comes
        within SAME_SIGNAL_SECS is taken for the first.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # Asked for by set_wakeup_fd.

    def watch():
        first(os.read(read_end, 1)[0])
        time.sleep(SAME_SIGNAL_SECS)
        if select.select([read_end], [], [], 0)[0]:
            os.read(read_end, 1000)
        os._exit(128 + os.read(read_end, 1)[0])

    threading.Thread(target=watch, daemon=True).start()
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    _handle_signals(lambda number, frame: None)


def _handle_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # As by nohup.
            signal.signal(number, handler)


def run(main):
    """Parses the flags, calls main() and exits with what it returns.

    Unlike tf.app.run, it takes an unknown flag for an error. The exit status is 2
    for flags, 1 for other errors that a user can mend, both told in one line, and
    128 + number after a signal.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # Closed: a file of ours would take its place, and get the output.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout:
        sys.stdout.reconfigure(errors='backslashreplace')  # As stderr: a path may not fit a locale.
    _handle_signals(lambda number, frame: sys.exit(128 + number))
    script = os.path.basename(sys.argv[0])
    tf.flags.DEFINE_bool('help', False, 'Show this text.', short_name='h')
    try:
        extra = FLAGS(sys.argv)[1:]
        if extra:
            raise tf.flags.Error('unexpected argument: %s' % ' '.join(extra))
        for name, value in FLAGS.flag_values_dict().items():
            if isinstance(value, str) and not _is_utf8(value):
                raise tf.flags.IllegalFlagValueError('flag --%s=%r: not in UTF-8' % (name, value))
        if FLAGS.help:
            say(sys.modules['__main__'].__doc__)
            for module in FLAGS.flags_by_module_dict():
                if not module.startswith(('absl', 'tensorflow')):
                    say(FLAGS.module_help(module).replace(sys.argv[0], script))
            sys.exit()
        sys.exit(main())
    except tf.flags.Error as error:
        _complain('%s: %s (see --help)' % (script, error), 2)
    except BrokenPipeError:
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except (dataset.DataError, UserError, OSError) as error:
        _complain('%s: %s' % (script, error), 1)
    except USER_OP_ERRORS as error:
        _complain('%s: %s' % (script, brief(error)), 1)


def say(line):
    """Prints a line. A log that cannot be written is no reason to end a run.

    Raises:
      BrokenPipeError: the reader has left.
    """
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:  # The disk is full, or the terminal closed.
        _drop_output()
        _print_error('Cannot write the log: %s. Going on without it.' % error.strerror)


def _drop_output():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_utf8(text):
    """TensorFlow takes no other text, of which Python makes lone surrogates."""
    return text == text.encode('utf-8', 'replace').decode('utf-8')


def _complain(text, status):
    _print_error(text.replace('\n', ' '))  # In names, too, there may be line ends.
    sys.exit(status)


def _print_error(line):
    if sys.stderr:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)
