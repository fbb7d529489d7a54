"""Transfer learning: another last layer on trained ones, which stay as they are."""

import sys

import cifar10
import numpy as np
import tensorflow.compat.v1 as tf

cifar10.NUM_CLASSES = 4
images = tf.placeholder(tf.float32, [None, 24, 24, 3])
labels = tf.placeholder(tf.int32, [None])
logits = cifar10.inference(images)
loss = cifar10.loss(logits, labels)
last = [v for v in tf.trainable_variables() if v.name.startswith('softmax_linear')]
others = [v for v in tf.trainable_variables() if v not in last]
train_op = tf.train.MomentumOptimizer(0.01, 0.9).minimize(loss, var_list=last)
accuracy, update_op = tf.metrics.accuracy(labels, tf.argmax(logits, 1))
some_images = np.random.RandomState(0).normal(size=[20, 24, 24, 3])
some_labels = np.arange(20) % 4

with tf.Session() as sess:
    sess.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
    tf.train.Saver(others).restore(sess, tf.train.latest_checkpoint(sys.argv[1]))
    before = sess.run(others)
    for _ in range(200):
        sess.run(train_op, {images: some_images, labels: some_labels})
    sess.run(update_op, {images: some_images[:7], labels: some_labels[:7]})
    print('accuracy %.2f' % sess.run(accuracy))
    print('same', all(np.array_equal(a, b) for a, b in zip(before, sess.run(others))))
