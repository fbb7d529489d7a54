"""Command-line flags: absl's, which a program may also define itself.

A program that imports a script may have a flag of the same name, defined before or after the
import. absl would raise DuplicateFlagError; here the program's own definition counts. In a notebook
each `%run` of a script defines its flags again, with their default values.
"""

import builtins

from absl import flags

from support.compat import tf

# Parses the command line when a flag is read before tf.app.run(), or in a program without it.
FLAGS = tf.flags.FLAGS
adopt_module_key_flags = flags.adopt_module_key_flags
declare_key_flag = flags.declare_key_flag

_IS_NOTEBOOK = hasattr(builtins, '__IPYTHON__')
if _IS_NOTEBOOK:
    FLAGS.mark_as_parsed()  # The command line is the notebook server's.

flags.disclaim_key_flags()  # Not this module defines the flags below, but the one that calls it.


def _unless_defined(define):
    def define_unless_defined(name, *args, **kwargs):
        if _IS_NOTEBOOK or name not in flags.FLAGS:
            define(name, *args, allow_override=True, **kwargs)

    return define_unless_defined


DEFINE_bool = _unless_defined(flags.DEFINE_bool)
DEFINE_enum = _unless_defined(flags.DEFINE_enum)
DEFINE_integer = _unless_defined(flags.DEFINE_integer)
DEFINE_string = _unless_defined(flags.DEFINE_string)
