"""Command-line flags: absl's, which a module may define again.

A notebook defines a script's flags with each `%run`, and a program that imports a script may have
a flag of the same name. absl would raise DuplicateFlagError; here the later definition counts.
"""

import builtins
import functools

from absl import flags

FLAGS = flags.FLAGS
adopt_module_key_flags = flags.adopt_module_key_flags
declare_key_flag = flags.declare_key_flag

DEFINE_bool = functools.partial(flags.DEFINE_bool, allow_override=True)
DEFINE_enum = functools.partial(flags.DEFINE_enum, allow_override=True)
DEFINE_integer = functools.partial(flags.DEFINE_integer, allow_override=True)
DEFINE_string = functools.partial(flags.DEFINE_string, allow_override=True)

if hasattr(builtins, '__IPYTHON__'):
    FLAGS.mark_as_parsed()  # The command line is the notebook server's.
