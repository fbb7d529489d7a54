"""Exercise: evaluation without moving averages.

    "Employing averaged parameters may boost predictive performance by about 3% as measured by
    precision @ 1. Edit `cifar10_eval.py` to not employ the averaged parameters for the model and
    verify that the predictive performance drops."

Look at model_variables() in cifar10_eval.py and apply_gradients() in cifar10.py. A checkpoint of a
training run holds every variable twice, for example conv1/weights and
conv1/weights/ExponentialMovingAverage. Write model_variables() for the first of the two, and the
update that makes the second. The check trains a small model on noisy data and evaluates it with and
without averages. Run `python -m exercises.no_averages`. On a run of your own, cifar10_eval.py does
the same with --nouse_moving_averages.

Hints:
1. tf.trainable_variables() lists the variables of the model. variable.op.name is a name in the
   checkpoint; variable.name is not.
2. The documentation of tf.train.ExponentialMovingAverage has the formula, and a comment in
   apply_gradients() has the decay.
3. The published model in results/ holds only averages. It cannot be evaluated without them.
"""

import os
import tempfile

import numpy as np

import cifar10
from exercises import checking
from support.compat import tf


def model_variables():
    """Dict of name in the checkpoint -> tf.Variable: the last values instead of the averages."""
    raise checking.NotStartedError  # YOUR CODE HERE


def update_average(average, value, step):
    """The new moving average of a variable after an update, with the tutorial's decay.

    Args:
      average: the average before, a NumPy array.
      value: the variable after the update.
      step: the number of updates so far, this one included.
    """
    raise checking.NotStartedError  # YOUR CODE HERE


# --- The check -----------------------------------------------------------------

STEPS = 1000


def examples(n):
    """Ten classes of noisy points: [n, 10] float32, [n] int32."""
    labels = tf.random_uniform([n], maxval=10, dtype=tf.int32, seed=1)
    return 6 * (3 * tf.one_hot(labels, 10) + tf.random_normal([n, 10], seed=2)), labels


def inference(points):
    """[n, 10] -> [n, 10] logits of a linear model."""
    return cifar10.fully_connected(
        'softmax_linear', points, 10, stddev=0.01, bias=0.0, activation=tf.identity
    )


def train(path):
    """Trains with cifar10.train(), saves a checkpoint, and returns the weights at every step."""
    with tf.Graph().as_default(), tf.Session() as session:
        points, labels = examples(16)
        global_step = tf.train.get_or_create_global_step()
        step = cifar10.train(cifar10.loss(inference(points), labels), global_step)
        session.run(tf.global_variables_initializer())
        weights = tf.trainable_variables()[0]
        history = [session.run(weights)]
        for _ in range(STEPS):
            session.run(step)
            history.append(session.run(weights))
        tf.train.Saver().save(session, path)
        return history


def evaluate(path, model_variables):
    """The accuracy on 5,000 examples with the variables from a checkpoint."""
    with tf.Graph().as_default(), tf.Session() as session:
        points, labels = examples(5000)
        predictions = tf.argmax(inference(points), 1, output_type=tf.int32)
        tf.train.Saver(model_variables()).restore(session, path)
        return session.run(tf.reduce_mean(tf.cast(tf.equal(predictions, labels), tf.float32)))


def check_names(answer):
    with tf.Graph().as_default():
        inference(examples(1)[0])
        found = answer.model_variables()
        expected = [variable.op.name for variable in tf.trainable_variables()]
    checking.expect(isinstance(found, dict), f'model_variables() returns {found}, not a dict.')
    checking.expect(
        'Average' not in str(list(found)),
        f'model_variables() reads averages: {sorted(found)}. Your own checkpoints hold the '
        'variables, too. The published model in results/ holds nothing but averages.',
    )
    checking.expect(':0' not in str(list(found)), 'names in a checkpoint have no ":0". See hint 1.')
    checking.expect(
        sorted(found) == sorted(expected),
        f'model_variables() reads {sorted(found)}, but the model has {sorted(expected)}.',
    )


def check_average(answer, history, expected):
    """Averages the weights of each step. The result should be TensorFlow's average."""

    def replay(update_average):
        average = history[0]
        for step, value in enumerate(history[1:], 1):
            average = update_average(average, value, step)
        return average

    def is_average(decay):
        average = replay(lambda average, value, n: value + decay(n) * (average - value))
        return np.allclose(found, average, atol=1e-3)

    found = replay(answer.update_average)
    print(f'update_average(): differs from TensorFlow by {abs(found - expected).max():.1e} at most')
    checking.expect(
        not is_average(lambda n: 0.9999),
        f'{0.9999**STEPS:.0%} of the average is still the initial value. The decay has to be '
        'smaller in the first steps. See hint 2.',
    )
    checking.expect(
        not is_average(lambda n: 1 - min(0.9999, (1 + n) / (10 + n))),
        'the decay is the part of the old average that stays, not the part of the new value.',
    )
    for step, decay in (1, 2 / 11), (10**6, cifar10.MOVING_AVERAGE_DECAY):
        yours = np.ravel(answer.update_average(np.ones(1), np.zeros(1), step))[0]
        checking.expect(
            np.isclose(yours, decay, rtol=1e-6),
            f'at step {step:,} the decay is {decay:.6f}. Yours is {yours:.6f}. See hint 2.',
        )
    checking.expect(np.allclose(found, expected, atol=1e-5), 'this is another decay. See hint 2.')


def check(answer):
    check_names(answer)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'model.ckpt')
        history = train(path)
        averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
        with_averages = evaluate(path, averages.variables_to_restore)
        without = evaluate(path, answer.model_variables)
        expected = tf.train.load_variable(path, 'softmax_linear/weights/ExponentialMovingAverage')
    print(f'accuracy with averages {with_averages:.3f}, without {without:.3f}')
    check_average(answer, history, expected)
    return (
        'each step moves the variables to and fro, by the noise of one batch times the learning '
        'rate. The average is steady. At a lower learning rate it is worth less.'
    )


if __name__ == '__main__':
    checking.run(check)
