"""A multi-GPU trainer of its own: towers, a float step, a Saver of all global variables."""

import re

import cifar10
import tensorflow.compat.v1 as tf

FLAGS = tf.app.flags.FLAGS
tf.app.flags.DEFINE_string('train_dir', '/tmp/cifar10_train', 'Where to write checkpoints.')
tf.app.flags.DEFINE_integer('num_gpus', 2, 'How many GPUs to use.')


def average_gradients(tower_grads):
    averaged = []
    for pairs in zip(*tower_grads):
        stacked = tf.concat([tf.expand_dims(gradient, 0) for gradient, _ in pairs], axis=0)
        averaged.append((tf.reduce_mean(stacked, 0), pairs[0][1]))
    return averaged


with tf.Graph().as_default(), tf.device('/cpu:0'):
    zero = tf.constant_initializer(0)
    global_step = tf.get_variable('global_step', [], initializer=zero, trainable=False)
    rate = tf.train.exponential_decay(cifar10.INITIAL_LEARNING_RATE, global_step, 100, 0.1)
    opt = tf.train.GradientDescentOptimizer(rate)
    tower_losses, tower_grads = [], []
    with tf.variable_scope(tf.get_variable_scope()):
        for i in range(FLAGS.num_gpus):
            tower = '%s_%d' % (cifar10.TOWER_NAME, i)
            with tf.device('/gpu:%d' % i), tf.name_scope(tower) as scope:
                images, labels = cifar10.distorted_inputs()
                total_loss = cifar10.loss(cifar10.inference(images), labels)
                losses = tf.get_collection('losses', scope)
                for loss in losses + [total_loss]:
                    name = re.sub('%s_[0-9]*/' % cifar10.TOWER_NAME, '', loss.op.name)
                    tf.summary.scalar(name, loss)
                tf.get_variable_scope().reuse_variables()
                summaries = tf.get_collection(tf.GraphKeys.SUMMARIES, scope)
                tower_grads.append(opt.compute_gradients(tf.add_n(losses)))
                tower_losses.append(total_loss)
    apply_op = opt.apply_gradients(average_gradients(tower_grads), global_step=global_step)
    averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY, global_step)
    averages_op = averages.apply(tf.trainable_variables() + tf.moving_average_variables())
    train_op = tf.group(apply_op, averages_op)
    saver = tf.train.Saver(tf.global_variables())
    summary_op = tf.summary.merge(summaries)
    sess = tf.Session(config=tf.ConfigProto(allow_soft_placement=True))
    sess.run(tf.global_variables_initializer())
    tf.train.start_queue_runners(sess=sess)
    print('losses: %.2f %.2f' % tuple(sess.run(tower_losses)))
    for _ in range(3):
        sess.run([train_op, summary_op])
    saver.save(sess, FLAGS.train_dir + '/model.ckpt', global_step=3)
