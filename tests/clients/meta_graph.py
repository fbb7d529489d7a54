"""Loads a trainer's graph and weights from its files alone, without the modules."""

import sys

import tensorflow.compat.v1 as tf

path = tf.train.latest_checkpoint(sys.argv[1])
with tf.Graph().as_default() as graph, tf.Session() as sess:
    saver = tf.train.import_meta_graph(path + '.meta', clear_devices=True)
    saver.restore(sess, path)
    logits = graph.get_tensor_by_name(sys.argv[2] + 'softmax_linear/softmax_linear:0')
    print(logits.get_shape(), sess.run('softmax_linear/weights:0').shape)
    print('step', sess.run('global_step:0'))
