"""A network of its own from the building blocks of cifar10."""

import cifar10
import tensorflow.compat.v1 as tf

images = tf.random_normal([8, 24, 24, 3])
labels = tf.zeros([8], tf.int64)
with tf.variable_scope('layer1') as scope:
    kernel = cifar10._variable_with_weight_decay('weights', shape=[3, 3, 3, 4], stddev=0.1, wd=0.0)
    biases = cifar10._variable_on_cpu('biases', [4], tf.constant_initializer(0.1))
    conv = tf.nn.conv2d(images, kernel, [1, 1, 1, 1], padding='SAME')
    layer1 = tf.nn.relu(tf.nn.bias_add(conv, biases), name=scope.name)
    cifar10._activation_summary(layer1)
with tf.variable_scope('layer2') as scope:
    flat = tf.reshape(layer1, [8, -1])
    dim = flat.get_shape()[1].value
    weights = cifar10._variable_with_weight_decay('weights', [dim, 10], stddev=0.04, wd=0.5)
    others = cifar10._variable_with_weight_decay('others', [dim, 10], stddev=0.04, wd=None)
    logits = tf.matmul(flat, weights + others, name=scope.name)
    cifar10._activation_summary(logits)
loss = cifar10.loss(logits, labels)
entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
by_hand = tf.reduce_mean(entropies) + 0.5 * tf.nn.l2_loss(weights)
saver = tf.train.Saver({'kernel': kernel, 'biases': biases})
reset = weights.assign(tf.zeros_like(weights))
train_op = cifar10.train(loss, tf.train.get_or_create_global_step())

with tf.Session() as sess:
    sess.run(tf.global_variables_initializer())
    print('loss %.4f %.4f' % tuple(sess.run([loss, by_hand])))
    for value in tf.Summary.FromString(sess.run(tf.summary.merge_all())).value:
        print(value.tag)
    sess.run(train_op)
    sess.run(reset)
    print('reset', weights.eval().any(), kernel.op.name, biases.op.name)
    print('saved', saver.save(sess, './part.ckpt'))
