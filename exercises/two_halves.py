"""Exercise: two towers with a batch of 64 each, against one with 128.

    python exercises/two_halves.py     or: make exercise NAME=two_halves

The same images, and as the gradients show, the same step. Where does the time go? TensorFlow
tells for a single run, if asked by RunOptions: for each op when it began and ended. Sums by kind
of op are printed, and the traces are saved for chrome://tracing, where one sees what runs side by
side. With two GPUs each tower has its own; without any, the towers share the CPU's cores. (The
sums are right on a CPU. A GPU's kernels come more than once: look at the trace.)

20 seconds on two cores of an AMD EPYC (Zen 4), with TensorFlow 2.21:

    The gradients differ by 3.3e-06 of the largest at most.
    1 x 128: 1667 images/s; trace: /tmp/two_halves-1.json
      _MklNativeConv2DBackpropFilter 32.3 ms, _MklNativeConv2DBackpropInput 27.3 ms, ...
    2 x 64: 1737 images/s; trace: /tmp/two_halves-2.json
      _MklNativeConv2DBackpropFilter 29.3 ms, _MklNativeConv2DBackpropInput 28.5 ms, ...
    Ratio: 1.04

In 1.15 it is 639 and 703 images/s, a ratio of 1.05. With one tower or two, most of the time goes
into the gradients of the convolutions.
"""

import collections
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10
import cifar10_multi_gpu_train
from support import devices, script

import numpy as np
import tensorflow.compat.v1 as tf
from tensorflow.python.client import timeline

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_string('trace', '/tmp/two_halves', 'Where to save the traces: TRACE-1.json, ...')
tf.flags.DEFINE_integer('rounds', 10, 'Of 10 steps with each number of towers.', lower_bound=1)
IMAGES = 128


def gradients(num_towers):
    """The gradients for the same images and initial weights, whatever the number of towers."""
    images = np.random.RandomState(0).normal(size=[IMAGES, 24, 24, 3]).astype(np.float32)
    parts = zip(np.split(images, num_towers), np.split(np.arange(IMAGES) % 10, num_towers))
    optimizer = tf.train.GradientDescentOptimizer(0.1)
    towers = []
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(1)
        with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
            for i, (images, labels) in enumerate(parts):
                with tf.name_scope(f'{cifar10.TOWER_NAME}_{i}'):
                    loss = cifar10.loss(cifar10.inference(tf.constant(images)), labels)
                    towers.append(optimizer.compute_gradients(loss))
        average = cifar10_multi_gpu_train.average_gradients(towers)
        session.run(tf.global_variables_initializer())
        return session.run([gradient for gradient, _ in average])


def start_trainer(num_towers):
    """A session that can train with so many towers, and what to run in it."""
    FLAGS.num_gpus, FLAGS.batch_size = num_towers, IMAGES // num_towers
    with tf.Graph().as_default():
        step = cifar10_multi_gpu_train.build_step(tf.train.get_or_create_global_step())
        session = tf.train.SingularMonitoredSession(config=devices.session_config(False))
        session.run(step.train_op)
        return session, step.train_op


def trace(session, train_op, path):
    """Runs a step, saves its trace, and returns milliseconds by kind of op, added up."""
    options, found = tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE), tf.RunMetadata()
    session.run(train_op, options=options, run_metadata=found)
    with open(path, 'w') as file:
        file.write(timeline.Timeline(found.step_stats).generate_chrome_trace_format())
    total = collections.Counter()
    for device in found.step_stats.dev_stats:
        for node in device.node_stats:
            kind = node.timeline_label.partition(' = ')[2].partition('(')[0]
            total[kind or node.node_name] += (
                node.op_end_rel_micros - node.op_start_rel_micros
            ) / 1e3
    return total


def main():
    cifar10.maybe_download_and_extract()
    print(devices.describe(False), flush=True)
    gap = max(abs(a - b).max() / abs(a).max() for a, b in zip(gradients(1), gradients(2)))
    print(f'The gradients differ by {gap:.1e} of the largest at most.', flush=True)
    trainers = {num_towers: start_trainer(num_towers) for num_towers in (1, 2)}
    rates = {num_towers: [] for num_towers in trainers}
    for _ in range(FLAGS.rounds):
        for num_towers, (session, train_op) in trainers.items():
            begin = time.monotonic()
            for _ in range(10):
                session.run(train_op)
            rates[num_towers].append(10 * IMAGES / (time.monotonic() - begin))
    for num_towers, trainer in trainers.items():
        path = f'{FLAGS.trace}-{num_towers}.json'
        total = trace(*trainer, path)
        rate = statistics.median(rates[num_towers])
        print(f'{num_towers} x {IMAGES // num_towers}: {rate:.0f} images/s; trace: {path}')
        print('  ' + ', '.join(f'{kind} {ms:.1f} ms' for kind, ms in total.most_common(8)))
    print(f'Ratio: {statistics.median(b / a for a, b in zip(rates[1], rates[2])):.2f}')


if __name__ == '__main__':
    script.run(main)
