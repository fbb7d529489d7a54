"""Solution: evaluation without moving averages."""

from support.compat import tf


def model_variables():
    # The names under which a checkpoint holds the last values.
    return {variable.op.name: variable for variable in tf.trainable_variables()}


def update_average(average, value, step):
    # Without the second number, the initial values would count for ten thousands of steps.
    decay = min(0.9999, (1 + step) / (10 + step))
    return decay * average + (1 - decay) * value
