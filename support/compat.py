"""TensorFlow 1 in both generations: `from support.compat import tf`.

Every module of this project imports TensorFlow from here, so that in TensorFlow 2 the behaviour of
version 2 is off and the console is quiet, whichever module is imported first.
"""

import ctypes
import contextlib
import os
import platform
import signal
import sys
import tempfile

import support

# '0' or '1' in the environment asks for TensorFlow's messages; '2' shows only errors.
_is_quiet = os.environ.get('TF_CPP_MIN_LOG_LEVEL', '2') not in ('0', '1')
if _is_quiet:
    try:
        ctypes.CDLL('libcuda.so.1')
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
    except OSError:  # Without an NVIDIA driver, the missing driver is no error either.
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'


# By default, TensorFlow 2 uses oneDNN only on CPUs with AVX-512 VNNI or newer instructions. On a
# CPU with AVX2 alone, oneDNN shortens a training step by a third.
if platform.machine() in ('x86_64', 'AMD64'):
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')


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


if _is_quiet and 'tensorflow' not in sys.modules:
    with _captured_stderr():
        import tensorflow.compat.v1 as tf
else:
    import tensorflow.compat.v1 as tf

if support.has_changed_sigint:
    signal.signal(signal.SIGINT, signal.default_int_handler)

tf.logging.set_verbosity(tf.logging.ERROR)
tf.disable_v2_behavior()
