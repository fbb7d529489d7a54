"""TensorFlow 1 in both generations: `from support.compat import tf`.

Every module of this project imports TensorFlow from here, so that in TensorFlow 2 the behaviour of
version 2 is off and the console is quiet, whichever module is imported first.
"""

import ctypes
import contextlib
import os
import signal
import sys
import tempfile
import threading

# '0' or '1' in the environment asks for TensorFlow's messages; '2' shows only errors.
_is_quiet = os.environ.get('TF_CPP_MIN_LOG_LEVEL', '2') not in ('0', '1')
if _is_quiet:
    try:
        ctypes.CDLL('libcuda.so.1')
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
    except OSError:  # Without an NVIDIA driver, the missing driver is no error either.
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'


@contextlib.contextmanager
def _captured_stderr():
    """Keeps stderr in a file, C++ output included, and prints it only if there is an error."""
    try:
        captured = tempfile.TemporaryFile()
    except OSError:  # A full disk; the script will report that.
        yield
        return
    with captured:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except BaseException:
            captured.seek(0)
            os.write(stderr, captured.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextlib.contextmanager
def _default_sigint():
    """Lets Ctrl-C end the process at once: TensorFlow 1.15 loses KeyboardInterrupt in its imports.

    Also saves the user 30 lines of traceback.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


with _default_sigint():
    if _is_quiet and 'tensorflow' not in sys.modules:
        with _captured_stderr():
            import tensorflow.compat.v1 as tf
    else:
        import tensorflow.compat.v1 as tf

tf.logging.set_verbosity(tf.logging.ERROR)
tf.disable_v2_behavior()
