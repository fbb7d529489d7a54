"""Kills a script after it has written a model. Import it before the script runs."""

import os
import signal

from support.compat import tf

save = tf.saved_model.Builder.save


def save_and_die(builder):
    save(builder)
    os.kill(os.getpid(), signal.SIGKILL)


tf.saved_model.Builder.save = save_and_die
