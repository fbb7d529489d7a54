"""Shows the kernels of conv1 and the activations of some layers."""

import sys

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10

images, labels = cifar10.inputs(eval_data=True)
logits = cifar10.inference(images)
with tf.variable_scope('conv1', reuse=True):
    weights = tf.get_variable('weights')
lowest, highest = tf.reduce_min(weights), tf.reduce_max(weights)
kernels = tf.transpose((weights - lowest) / (highest - lowest), [3, 0, 1, 2])
tf.summary.image('kernels', kernels, max_outputs=64)
graph = tf.get_default_graph()
conv1 = graph.get_tensor_by_name('conv1/conv1:0')
local3 = graph.get_tensor_by_name('local3/local3:0')

with tf.Session() as sess:
    saver = tf.train.Saver()
    saver.restore(sess, tf.train.latest_checkpoint(sys.argv[1]))
    threads = tf.train.start_queue_runners()
    by_name = sess.run([v.name for v in tf.trainable_variables()])
    shown = sess.run([images, kernels, conv1, local3])
    writer = tf.summary.FileWriter('.')
    writer.add_summary(sess.run(tf.summary.merge_all()))
np.savez('shown.npz', *shown, weights=by_name[0])
