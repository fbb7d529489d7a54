"""Freezes the network into one file, by the name of its output, and runs the frozen graph."""

import sys

import cifar10
import numpy as np
import tensorflow.compat.v1 as tf

OUTPUT = 'softmax_linear/softmax_linear'
some_images = np.random.RandomState(0).normal(size=[2, 24, 24, 3]).astype(np.float32)

with tf.Graph().as_default() as graph, tf.Session() as sess:
    images = tf.placeholder(tf.float32, [None, 24, 24, 3], name='images')
    logits = cifar10.inference(images)
    tf.train.Saver().restore(sess, tf.train.latest_checkpoint(sys.argv[1]))
    live = sess.run(logits, {images: some_images})
    frozen = tf.graph_util.convert_variables_to_constants(sess, graph.as_graph_def(), [OUTPUT])
with tf.gfile.GFile('frozen.pb', 'wb') as f:
    f.write(frozen.SerializeToString())

with tf.Graph().as_default() as graph, tf.Session() as sess:
    graph_def = tf.GraphDef()
    with tf.gfile.GFile('frozen.pb', 'rb') as f:
        graph_def.ParseFromString(f.read())
    tf.import_graph_def(graph_def, name='')
    images, logits = [graph.get_tensor_by_name(name + ':0') for name in ('images', OUTPUT)]
    thawed = sess.run(logits, {images: some_images})
    gradient = sess.run(tf.gradients(logits[:, 3], images)[0], {images: some_images})
    weights = sess.run('conv1/weights:0')
np.savez('frozen.npz', images=some_images, live=live, frozen=thawed, gradient=gradient, w=weights)
