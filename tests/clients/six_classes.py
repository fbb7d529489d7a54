"""Another data set: six classes, its own input, the tutorial's constants set from outside."""

import cifar10
import tensorflow.compat.v1 as tf

cifar10.NUM_CLASSES = 6
cifar10.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 1000
cifar10.NUM_EPOCHS_PER_DECAY = 2.0
cifar10.INITIAL_LEARNING_RATE = 0.05

global_step = tf.Variable(0, trainable=False)
images = tf.random_normal([4, 24, 24, 3])
labels = tf.random_uniform([4], maxval=6, dtype=tf.int32)
logits = cifar10.inference(images)
print('logits', logits.get_shape().as_list())
total_loss = cifar10.loss(logits, labels)
train_op = cifar10.train(total_loss, global_step)
summary_op = tf.summary.merge_all()

with tf.Session() as sess:
    sess.run(tf.global_variables_initializer())
    for step in range(17):  # 2 epochs of 1000 images in batches of 128: 15.6 steps.
        if step >= 13:
            summary = tf.Summary.FromString(sess.run(summary_op))
            rate = [value.simple_value for value in summary.value if value.tag == 'learning_rate']
            print('step %d, rate %.4f' % (step, rate[0]))
        sess.run(train_op)
