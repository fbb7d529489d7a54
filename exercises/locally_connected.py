"""Exercise: the top layers of cuda-convnet.

    "The model architecture in `inference()` differs slightly from the CIFAR-10 model specified in
    cuda-convnet. In particular, the top layers of Alex's original model are locally connected and
    not fully connected. Try editing the architecture to exactly reproduce the locally connected
    architecture in the top layer."

A locally connected layer is a convolution without sharing: each position of the image has its own
weights and biases. layers-conv-local-11pct.cfg of cuda-convnet says about the top layers:

    layer             filters     stddev of the initial weights    weight decay
    local3            64 of 3x3   0.04                             0.004
    local4            32 of 3x3   0.04                             0.004
    softmax_linear                0.01                             0.01

Images are padded with zeros. local3 and local4 end with a ReLU; softmax_linear reads the output of
local4. All biases start from 0 and do not decay. The layers before local3 stay those of the
tutorial.

Look at conv(), fully_connected() and inference() in cifar10.py. Write the layer and the network,
then run `python -m exercises.locally_connected`.

Hints:
1. Pad the images. Nine shifted slices of the result, concatenated, hold the 3x3 patches.
2. tf.matmul of [..., n, m] and [..., m, k] is one product of matrices for each leading index.
3. cifar10._variable_with_weight_decay() and cifar10._variable_on_cpu() create the variables.
"""

import numpy as np

import cifar10
from exercises import checking
from support.compat import tf


def locally_connected(name, images, channels):
    """[n, h, w, depth] -> [n, h, w, channels]. n may be unknown when the graph is built."""
    raise checking.NotStartedError  # YOUR CODE HERE


def inference(images):
    """[n, 24, 24, 3] -> [n, 10] logits."""
    raise checking.NotStartedError  # YOUR CODE HERE


# --- The check -----------------------------------------------------------------

NETWORKS = {  # Number of parameters: the mistake.
    1068298: "this is still the tutorial's network.",
    2109610: 'the biases are shared between positions. Each position has its own.',
    174250: 'the weights are shared between positions: these are convolutions.',
    177610: 'the weights are shared between positions: these are convolutions.',
    1116490: 'local3 has 32 filters. That is layers-conv-local-13pct.cfg.',
    5651914: 'the filters are 5x5, not 3x3.',
}
# Number of values in a variable: their initial root mean square, and their weight decay.
LAYERS = {
    1327104: ('local3, weights', 0.04, 0.004),
    2304: ('local3, biases', 0.0, 0.0),
    663552: ('local4, weights', 0.04, 0.004),
    1152: ('local4, biases', 0.0, 0.0),
    11520: ('softmax_linear, weights', 0.01, 0.01),
    10: ('softmax_linear, biases', 0.0, 0.0),
}


def build(function, shape):
    """Calls function(images) for images [n, ...] of an unknown n. Returns images and outputs."""
    try:
        images = tf.placeholder(tf.float32, [None] + shape)
        return images, function(images)
    except (TypeError, ValueError):
        with tf.Graph().as_default():
            function(tf.zeros([3] + shape))  # If this fails too, its traceback helps more.
        raise checking.AnswerError(
            'it only works if the batch size is known. -1 may help in a shape.'
        )


def check_layer(answer):
    """An output may only depend on the 3x3 pixels around it, in its own image."""
    with tf.Graph().as_default(), tf.Session() as session:
        images, outputs = build(lambda x: answer.locally_connected('local', x, 70), [4, 5, 6])
        shape = f'images [n, 4, 5, 6] with 70 channels became {outputs.shape}. Pad them.'
        checking.expect(outputs.shape.as_list()[1:] == [4, 5, 70], shape)
        session.run(tf.global_variables_initializer())
        feed = {images: np.random.RandomState(0).normal(size=[3, 4, 5, 6])}
        for y, x, window in (1, 2, np.s_[:3, 1:4]), (3, 0, np.s_[2:, :2]):
            gradient = session.run(tf.gradients(outputs[1, y, x], images)[0], feed)
            expected = np.zeros([3, 4, 5], bool)
            expected[1][window] = True
            found = gradient.any(axis=3)
            checking.expect(
                np.array_equal(found, expected),
                f'the output of image 1 at row {y}, column {x} should depend on these pixels '
                f'[image, row, column]: {np.argwhere(expected).tolist()}. It depends on '
                f'{np.argwhere(found).tolist()}. Look at the order of the axes.',
            )
        relu = 'some outputs are negative. The ReLU is missing.'
        checking.expect(session.run(outputs, feed).min() >= 0, relu)
    print('locally_connected(): every output depends on its 3x3 pixels')


def check(answer):
    check_layer(answer)
    with tf.Graph().as_default(), tf.Session() as session:
        images, logits = build(answer.inference, [24, 24, 3])
        variables = tf.trainable_variables()
        number = sum(variable.shape.num_elements() for variable in variables)
        print(f'inference(): {number:,} parameters, expected 2,112,970')
        shapes = ', '.join(f'{variable.op.name} {variable.shape}' for variable in variables)
        hint = NETWORKS.get(number, f'compare with the table: {shapes}')
        checking.expect(number == 2112970, hint)
        decay = tf.add_n(tf.get_collection('losses') or [tf.zeros([])])
        loss = cifar10.loss(logits, np.arange(30) % 10)
        gradients = tf.gradients(decay, variables, unconnected_gradients='zero')
        session.run(tf.global_variables_initializer())
        feed = {images: np.random.RandomState(0).normal(size=[30, 24, 24, 3])}
        loss, decay, gradients, values = session.run([loss, decay, gradients, variables], feed)
    print(f'first loss {loss:.2f}: cross entropy {loss - decay:.2f}, weight decay {decay:.2f}')
    for value, gradient in zip(values, gradients):
        name, stddev, wd = LAYERS.get(value.size, (None, 0, 0))
        scale = np.sqrt(np.square(value).mean())  # 0.88 stddev after truncation.
        factor = np.vdot(gradient, value) / np.vdot(value, value) if scale else 0
        checking.expect(
            not name or 0.8 * stddev <= scale <= 1.1 * stddev,
            f'{name}: the initial values are about {scale:.3f} and should be about {stddev}.',
        )
        checking.expect(
            not name or np.isclose(factor, wd),
            f'{name}: the weight decay is {factor:.3f} and should be {wd}. If all is right, the '
            'first loss is 7.24.',
        )
    checking.expect(7.1 < loss < 7.4, 'the first loss should be 7.24: every weight decays once.')
    return (
        'without sharing, two layers of 3x3 filters have more parameters than the whole network '
        'of the tutorial. The first loss is 7.24 instead of 4.68 because more weights decay.'
    )


if __name__ == '__main__':
    checking.run(check)
