"""Exercise: probabilities instead of logits.

    "The output of `inference` are un-normalized logits. Try editing the network architecture to
    return normalized predictions using `tf.nn.softmax`."

Look at inference() and loss() in cifar10.py. Where is the softmax now? Write both functions anew,
so that training works as before. Then run `python -m exercises.softmax`.

Hints:
1. The functions belong together: cifar10.loss() expects logits and applies a softmax to them.
2. Find logits that softmax turns into the probabilities p. There is a simple answer.
3. A float32 number below 1e-38 counts as 0, and a probability can be smaller than that.
"""

import numpy as np

import cifar10
from exercises import checking
from support.compat import tf


def inference(images):
    """[n, 24, 24, 3] -> [n, 10]: the probabilities of the classes."""
    raise checking.NotStartedError  # YOUR CODE HERE


def loss(probabilities, labels):
    """[n, 10], [n] -> scalar: the same loss as cifar10.loss() of the logits."""
    raise checking.NotStartedError  # YOUR CODE HERE


# --- The check -----------------------------------------------------------------

STEPS = 50  # Of training.
LABELS = np.arange(20) % 10
IMAGES = np.random.RandomState(0).normal(size=[10, 1, 1, 3])[LABELS]  # A color for each class.
IMAGES = (IMAGES + np.random.RandomState(1).normal(0, 0.5, [20, 24, 24, 3])).astype(np.float32)


def outputs(answer):
    """What inference() returns, and what it should: for a network that is sure."""
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(1)
        with tf.variable_scope('', reuse=tf.AUTO_REUSE):
            results = answer.inference(IMAGES), tf.nn.softmax(cifar10.inference(IMAGES))
            weights = tf.get_variable('softmax_linear/weights')
        session.run(tf.global_variables_initializer())
        session.run(weights.assign(100 * weights))
        return session.run(results)


def train(model):
    """The loss before and after some steps of training on one batch."""
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(1)
        loss = model.loss(model.inference(IMAGES), LABELS)
        step = tf.train.GradientDescentOptimizer(0.02).minimize(loss)
        session.run(tf.global_variables_initializer())
        losses = [session.run([loss, step])[0] for _ in range(STEPS)]
        return losses[0], losses[-1]


def wrong_by(lead, loss, activation):
    """The loss where a wrong logit is ahead by `lead`, and its gradient for the right logit."""
    with tf.Graph().as_default(), tf.Session() as session:
        logits = tf.constant([[lead] + 9 * [0.0]])
        value = loss(activation(logits), [1])
        return session.run([value, tf.gradients(value, logits)[0][0, 1]])


def check(answer):
    found, expected = outputs(answer)
    print(f'inference(): the outputs for an image add up to {found[0].sum():.3f}')
    axis = 'the softmax runs over the batch. The classes are the last axis.'
    checking.expect(not np.allclose(found.sum(0), 1, 1e-3), axis)
    sums = 'inference() still returns logits. Probabilities add up to 1.'
    checking.expect(np.allclose(found.sum(1), 1, 1e-3), sums)
    print(f'inference(): the largest output is {found.max():.3f}, expected {expected.max():.3f}')
    twice = 'The softmax of numbers from 0 to 1 gives no class more than e / (e + 9) = 0.23.'
    checking.expect(found.max() > 0.233, f'inference() applies softmax twice. {twice}')
    other = 'these are not the probabilities that belong to the logits of cifar10.inference().'
    checking.expect(np.allclose(found, expected, atol=1e-3), other)

    for name, model in ('logits', cifar10), ('probabilities', answer):
        first, last = train(model)
        print(f'{STEPS} steps on one batch, {name}: the loss falls from {first:.2f} to {last:.2f}')
    by_2, softmax_twice = (
        wrong_by(2.0, loss, tf.nn.softmax)[0] for loss in (answer.loss, cifar10.loss)
    )
    checking.expect(
        not np.isclose(by_2, softmax_twice, rtol=1e-3),
        f'the loss hardly falls because loss() applies a second softmax. {twice} See hint 2.',
    )
    decay = 'the weight decay is missing. Its terms are in the collection "losses".'
    checking.expect(first > 2.4, decay)
    checking.expect(
        np.isclose(by_2, 2.797, rtol=1e-3) and 4.5 < first < 4.9,
        f'if the logits are 2, 0, 0 ..., the cross entropy of the second class is 2.797. Yours is '
        f'{by_2:.3f}. The first loss is 4.68. Yours is {first:.2f}.',
    )

    for name, loss, activation in (
        ('logits', cifar10.loss, tf.identity),
        ('probabilities', answer.loss, tf.nn.softmax),
    ):
        by_200, gradient = wrong_by(200.0, loss, activation)
        print(f'a wrong logit ahead by 200, {name}: loss {by_200:.1f}, gradient {gradient + 0:.1f}')
    checking.expect(
        np.isfinite([by_200, gradient]).all(),
        'the probability of the right class is 0 in float32, and the logarithm of 0 is infinite. '
        'Give the logarithm a smallest probability, not below 1e-38.',
    )
    if gradient < -0.5:
        return (
            'the same network learns the same. Your loss() looks at the logits behind the '
            'probabilities. Without them, the gradient would be 0 or infinite where a probability '
            "is 0. That is why the tutorial's inference() returns logits."
        )
    return (
        'the same network learns the same. But where a probability is 0, the gradient is 0, too: '
        'the network cannot learn from its worst mistakes. From logits, softmax and logarithm can '
        "be computed together and exactly. That is why the tutorial's inference() returns logits."
    )


if __name__ == '__main__':
    checking.run(check)
