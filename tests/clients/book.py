"""A chapter of a book: its own small network, fed with batches from cifar10_input."""

import math

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_input

batch_size = 128
num_examples = 300
cifar10.maybe_download_and_extract()
data_dir = cifar10.FLAGS.data_dir + '/cifar-10-batches-bin'
images_train, labels_train = cifar10_input.distorted_inputs(
    data_dir=data_dir, batch_size=batch_size
)
images_test, labels_test = cifar10_input.inputs(
    eval_data=True, data_dir=data_dir, batch_size=batch_size
)
image_holder = tf.placeholder(tf.float32, [batch_size, 24, 24, 3])
label_holder = tf.placeholder(tf.int32, [batch_size])

kernel = tf.Variable(tf.truncated_normal([5, 5, 3, 8], stddev=5e-2), name='kernel')
conv = tf.nn.relu(tf.nn.conv2d(image_holder, kernel, [1, 2, 2, 1], padding='SAME'))
flat = tf.reshape(conv, [batch_size, -1])
weights = tf.Variable(tf.truncated_normal([flat.get_shape()[1].value, 10], stddev=0.01))
logits = tf.matmul(flat, weights)
cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(logits=logits, labels=label_holder)
loss = tf.reduce_mean(cross_entropy)
train_op = tf.train.AdamOptimizer(1e-3).minimize(loss)
top_k_op = tf.nn.in_top_k(logits, label_holder, 1)

sess = tf.InteractiveSession()
tf.global_variables_initializer().run()
tf.train.start_queue_runners()
for step in range(7):
    image_batch, label_batch = sess.run([images_train, labels_train])
    feed = {image_holder: image_batch, label_holder: label_batch}
    _, loss_value = sess.run([train_op, loss], feed_dict=feed)
    print('step %d, loss = %.2f' % (step, loss_value))
num_iter = int(math.ceil(num_examples / batch_size))
true_count = 0
for _ in range(num_iter):
    image_batch, label_batch = sess.run([images_test, labels_test])
    feed = {image_holder: image_batch, label_holder: label_batch}
    true_count += np.sum(sess.run(top_k_op, feed_dict=feed))
print('precision @ 1 = %.3f' % (true_count / (num_iter * batch_size)))
print('kernel', sess.run('kernel:0').shape)
