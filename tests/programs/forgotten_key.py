"""Puts a programmer's error into the model. Import it before a script runs."""

import cifar10


def forgetful(images):
    return {}['forgotten']


cifar10.inference = forgetful
