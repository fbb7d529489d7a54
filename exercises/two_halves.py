"""Exercise: two towers with half of a batch each.

    "The default settings for `cifar10_train.py` is to run on a batch size of 128. Try running
    `cifar10_multi_gpu_train.py` on 2 GPUs with a batch size of 64 and compare the training speed."

With two GPUs, run it and compare examples/sec:

    python cifar10_train.py --batch_size=128 --max_steps=200
    python cifar10_multi_gpu_train.py --num_gpus=2 --batch_size=64 --max_steps=200 \\
        --train_dir=/tmp/two_halves

But is it the same training? Look at build_towers() in cifar10_multi_gpu_train.py, and write it for
two halves of one batch. The check compares the gradients with those of one tower, and the speed of
both, on any machine. Run `python -m exercises.two_halves`.

Hints:
1. tf.split cuts images and labels into halves.
2. Both towers share their variables. tf.variable_scope has an argument for it.
3. Which weight decay does loss() add? Its docstring says in which name scopes it looks at one
   tower only.
"""

import statistics
import time
import types

import numpy as np

import cifar10
from exercises import checking
from support import devices
from support.compat import tf


def gradients(model, optimizer, images, labels):
    """Builds two towers, each on half of the images.

    Args:
      model: has the functions inference(images) and loss(logits, labels).
      optimizer: a tf.train.Optimizer.
      images: tensor [n, 24, 24, 3], for both towers together.
      labels: tensor [n].

    Returns:
      The averages of the two towers' gradients: a list of pairs (gradient, variable).
    """
    raise checking.NotStartedError  # YOUR CODE HERE


# --- The check -----------------------------------------------------------------

DESCENT = tf.train.GradientDescentOptimizer(0.1)
CONFIG = devices.session_config(use_fp16=False)  # Without GPUs, the towers are on the CPU.
IMAGES = np.random.RandomState(0).normal(size=[128, 24, 24, 3]).astype(np.float32)
LABELS = np.arange(128) % 10
ROUNDS = 5  # Of the measurement.


def one_tower(model, optimizer, images, labels):
    return optimizer.compute_gradients(model.loss(model.inference(images), labels))


def evaluate(gradients, examples):
    """Builds the gradients for some of the examples, and runs them with fixed variables.

    Returns:
      Dict of variable name -> gradient, the names of all variables, the towers' batch sizes.
    """
    sizes, random = [], np.random.RandomState(1)

    def inference(images):
        sizes.append(images.shape.as_list()[0])
        return cifar10.inference(images)

    model = types.SimpleNamespace(inference=inference, loss=cifar10.loss)
    with tf.Graph().as_default(), tf.Session(config=CONFIG) as session:
        batch = tf.constant(IMAGES[examples]), tf.constant(LABELS[examples])
        try:
            pairs = gradients(model, DESCENT, *batch)
        finally:
            names = [variable.op.name for variable in tf.trainable_variables()]
            hint = f'each tower has its own variables: {names}. See hint 2.'
            checking.expect(len(names) <= 10, hint)
        variables = sorted(tf.trainable_variables(), key=lambda variable: variable.op.name)
        for variable in variables:
            variable.load(random.normal(0, 0.03, variable.shape.as_list()), session)
        found = session.run({variable.op.name: gradient for gradient, variable in pairs})
        return found, [variable.op.name for variable in variables], sizes


def check_gradients(answer):
    try:
        found, names, sizes = evaluate(answer.gradients, np.s_[:20])
    except ValueError as error:
        hint = 'the second tower creates its variables again. See hint 2.'
        checking.expect('already exists' not in str(error), hint)
        raise
    print(f'batch sizes of the towers: {sizes}, variables: {len(names)}')
    checking.expect(sizes, 'the network is not built by model.inference().')
    checking.expect(sizes == [10, 10], 'of 20 images, each of the two towers should get 10.')
    whole, first, second = (
        evaluate(one_tower, part)[0] for part in (np.s_[:20], np.s_[:10], np.s_[10:20])
    )
    scope = f'no checkpoint has these variables: {names}. tf.get_variable_scope() adds no name.'
    checking.expect(set(found) == set(whole), scope)

    def difference(expected):
        """Relative to the largest gradient of each variable."""
        return max(
            abs(found[name] - expected[name]).max() / abs(whole[name]).max() for name in whole
        )

    def is_sum(a, b):
        """Is it a times the gradients of the first half plus b times those of the second?"""
        return difference({name: a * first[name] + b * second[name] for name in whole}) < 1e-3

    print(f'difference from the gradients of one tower: {difference(whole):.1e}')
    checking.expect(not is_sum(1, 1), 'the gradients are summed over the towers. Average them.')
    checking.expect(not is_sum(1, 0), 'both towers use the first half.')
    checking.expect(not is_sum(0, 1), 'only the second tower counts.')
    hint = 'the loss of the second tower includes the loss of the first one. See hint 3.'
    checking.expect(not is_sum(1, 0.5), hint)
    checking.expect(difference(whole) < 1e-3, 'this is not the mean of the two gradients.')


def measure(*functions):
    """The median seconds of a step of 128 images, for each function that builds gradients."""
    trainers = []
    for function in functions:
        with tf.Graph().as_default():
            step = DESCENT.apply_gradients(function(cifar10, DESCENT, IMAGES, LABELS))
            session = tf.Session(config=CONFIG)
            session.run(tf.global_variables_initializer())
            session.run(step)
            trainers.append((session, step, []))
    for _ in range(ROUNDS):  # In turns, because other programs may be busy.
        for session, step, seconds in trainers:
            begin = time.monotonic()
            session.run(step)
            seconds.append(time.monotonic() - begin)
    return [statistics.median(seconds) for _, _, seconds in trainers]


def check(answer):
    check_gradients(answer)
    print(devices.describe(use_fp16=False))
    for name, seconds in zip(['1 x 128', '2 x 64'], measure(one_tower, answer.gradients)):
        print(f'{name}: {seconds:.3f} s per step, {len(IMAGES) / seconds:.0f} images/s')
    return (
        'two halves make the same step as one whole. Two GPUs share the work. On one device, the '
        'time stays about the same. (--batch_size is per tower: with the default, two towers take '
        '256 images per step, so compare images/s and not the time per step.)'
    )


if __name__ == '__main__':
    checking.run(check)
