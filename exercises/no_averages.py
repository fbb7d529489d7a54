"""Exercise: evaluate without the moving averages.

    python exercises/no_averages.py     or: make exercise NAME=no_averages

Trains the tutorial's network and, on the way, evaluates it with the averages of the variables and
with the variables themselves; in the evaluator that is --use_moving_averages=false. (The model
that comes along cannot show it: it holds the averages alone. Needs matplotlib.)

22 minutes on two cores of an AMD EPYC (Zen 4), with TensorFlow 2.21 and --use_fp16, that is in
bfloat16, beside other work; no_averages.png is the picture:

    step      averages  variables
    4000      0.7618    0.7257
    8000      0.8059    0.6864
    12000     0.8238    0.7818
    16000     0.8314    0.8020
    20000     0.8397    0.8052

With a learning rate of 0.1, each step moves the variables to and fro across the valley: how good
they are is a matter of luck. Their mean over the last ten thousand steps is not. After the rate has
dropped, the averages are worth less: results/README.md has the whole of a run of 150,000 steps.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10_train
from results import record
from support import script

from matplotlib.figure import Figure
import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
NUM_CHECKPOINTS = 5
tf.flags.DEFINE_string('picture', '/tmp/no_averages.png', 'Where to draw the table.')


def draw(rows, path):
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    steps, averaged, raw = zip(*rows)
    axes.plot(steps, averaged, 'o-', label='moving averages')
    axes.plot(steps, raw, 'o-', label='variables')
    axes.set(xlabel='step', ylabel='precision @ 1')
    axes.legend()
    figure.savefig(path, dpi=100, bbox_inches='tight')


def main():
    last, rows = FLAGS.max_steps, []
    FLAGS.max_to_keep = 0  # All.
    for i in range(1, NUM_CHECKPOINTS + 1):
        FLAGS.max_steps = last * i // NUM_CHECKPOINTS
        status = cifar10_train.main()
        if status:
            return status
        path = os.path.join(FLAGS.train_dir, f'model.ckpt-{FLAGS.max_steps}')
        if not os.path.exists(path + '.index'):
            raise script.UserError(f'{FLAGS.train_dir} holds another run; name a --train_dir')
        both = [record.precision(path, averages) for averages in (True, False)]
        rows.append((FLAGS.max_steps, *both))
    print('step      averages  variables')
    for row in rows:
        print('%-9d %.4f    %.4f' % row)
    draw(rows, FLAGS.picture)
    print(f'Saved {FLAGS.picture}.')


if __name__ == '__main__':
    FLAGS.set_default('train_dir', '/tmp/cifar10_no_averages')
    FLAGS.set_default('max_steps', 20000)
    script.run(main)
