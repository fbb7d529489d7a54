"""A TensorFlow that cannot be imported. Put the folder above it first on the path."""

import os

os.write(2, b'GLIBC is too old\n')
raise ImportError('cannot load the library')
