"""What the scripts need and the tutorial does not teach.

Every script imports this first. Until TensorFlow is loaded, which takes seconds, Ctrl-C ends the
process at once: TensorFlow 1.15 loses KeyboardInterrupt in its imports, and the traceback of an
import has 30 lines. support/compat.py restores Python's handler.
"""

import builtins
import signal
import threading

if (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
    and threading.current_thread() is threading.main_thread()
    and not hasattr(builtins, '__IPYTHON__')
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    has_changed_sigint = True
else:
    has_changed_sigint = False
