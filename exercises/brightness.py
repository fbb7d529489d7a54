"""Exercise: brightness, which is not in the tutorial.

    Why does it change nothing to remove random_brightness() from distort()?

Look at distort() and the functions that it calls in cifar10_input.py. Write a measurement of the
effect, and another preparation of the images, with which brightness does have an effect. Then run
`python -m exercises.brightness`.

Hints:
1. What is the mean of the pixels before standardize(), and after it?
2. distort() draws other random numbers each time. Leave the random functions out.
3. The network expects pixels around 0 that rarely exceed 3. They may be prepared without knowing
   the mean of each image.
"""

from unittest import mock

import numpy as np

import cifar10_input
from exercises import checking
from support.compat import tf


def effect(images, delta):
    """How much the input of the network changes if all images are `delta` brighter.

    Args:
      images: tensor [n, 24, 24, 3] float32, from 0 to 255.
      delta: a number, at most 63.

    Returns:
      Scalar: the largest change of a pixel after cifar10_input.standardize(), up or down.
    """
    raise checking.NotStartedError  # YOUR CODE HERE


def prepare(images, delta):
    """Makes images `delta` brighter and prepares them for the network, instead of standardize().

    Args:
      images, delta: as in effect().

    Returns:
      [n, 24, 24, 3] float32, from about -3 to 3, different for different values of delta.
    """
    raise checking.NotStartedError  # YOUR CODE HERE


# --- The check -----------------------------------------------------------------

RANDOM = np.random.RandomState(0)
COLOR = RANDOM.uniform(40, 120, [8, 1, 1, 3]) + RANDOM.uniform(0, 100, [8, 24, 24, 3])
COLOR = COLOR.astype(np.float32)
GRAY = np.tile(COLOR.mean(axis=3, keepdims=True), [1, 1, 1, 3])


def evaluate(function, images, *args):
    with tf.Graph().as_default(), tf.Session() as session:
        return session.run(function(tf.constant(images), *args))


def does_not_cancel(images):
    """Replaces standardize() in the check."""
    return images * images / 1000


def check_effect(answer):
    try:
        effects = [float(evaluate(answer.effect, COLOR, delta)) for delta in (63, 63, -40)]
    except tf.errors.InvalidArgumentError as error:
        if 'indices' not in str(error):
            raise
        raise checking.AnswerError('the images are crops already, and distort() crops. See hint 2.')
    print(f'effect(): a delta of 63 changes a standardized pixel by {effects[0]:.2g} at most')
    checking.expect(effects[0] == effects[1], 'the next call gives another result. See hint 2.')
    checking.expect(
        not np.isclose(np.abs(effects[2]), 40, atol=0.1),
        'delta itself is left. It has to be added before standardize(), to one of two images.',
    )
    checking.expect(max(effects) < 1e-3, 'this is more than a rounding error. Compare with hint 1.')
    with mock.patch.object(cifar10_input, 'standardize', does_not_cancel):
        for delta in 63, -40:
            expected = np.abs(does_not_cancel(COLOR + delta) - does_not_cancel(COLOR)).max()
            found = float(evaluate(answer.effect, COLOR, delta))
            checking.expect(
                np.isclose(found, expected, rtol=1e-3),
                'effect() should measure any preparation of the images. With one that squares '
                f'them, the largest change is {expected:.1f}, but effect() gives {found:.1f}.',
            )


def check_prepare(answer):
    dark, same, bright = (evaluate(answer.prepare, COLOR, delta) for delta in (-63, 0, 63))
    difference, largest = np.abs(bright - dark).max(), np.abs([dark, same, bright]).max()
    print(f'prepare(): up to {largest:.1f}; from -63 to 63, a pixel changes by {difference:.2g}')
    checking.expect(same.shape == COLOR.shape, f'prepare() returns the shape {same.shape}.')
    checking.expect(
        difference > 0.1,
        'brightness still changes nothing. Is delta used? Subtracting the mean of an image '
        'cancels it.',
    )
    checking.expect(
        largest < 6,
        f'pixels reach {largest:.0f}. Scale images and delta alike, to about 3 at most.',
    )
    checking.expect(same.min() < 0, 'no pixel is negative. The network expects them around 0.')
    checking.expect(
        np.corrcoef(same.ravel(), COLOR.ravel())[0, 1] > 0.5, 'the images are not recognizable.'
    )


def check(answer):
    check_effect(answer)
    check_prepare(answer)
    for name, images in ('color', COLOR), ('gray', GRAY):
        contrast = evaluate(cifar10_input.random_contrast, images)
        changed, same = (evaluate(cifar10_input.standardize, x) for x in (contrast, images))
        print(
            f'random_contrast(), {name} images: a pixel changes by {abs(changed - same).max():.2g}'
        )
    return (
        'standardize() subtracts the mean of each image, and with it the brightness. It also '
        'divides by the standard deviation, which cancels the contrast of gray images. In color '
        'images, random_contrast() changes the colors, too, and that remains.'
    )


if __name__ == '__main__':
    checking.run(check)
