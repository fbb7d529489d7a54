"""A copy of the evaluator, trimmed: averages by name, threads of its own, whole batches."""

import math

import cifar10
import numpy as np
import tensorflow.compat.v1 as tf

FLAGS = tf.app.flags.FLAGS
tf.app.flags.DEFINE_string('checkpoint_dir', '/tmp/cifar10_train', 'Where the checkpoints are.')
tf.app.flags.DEFINE_integer('num_examples', 10000, 'Images to evaluate.')


def main(argv=None):
    with tf.Graph().as_default():
        images, labels = cifar10.inputs(eval_data='test')
        logits = cifar10.inference(images)
        top_k_op = tf.nn.in_top_k(logits, labels, 1)
        variable_averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
        saver = tf.train.Saver(variable_averages.variables_to_restore())
        with tf.Session() as sess:
            ckpt = tf.train.get_checkpoint_state(FLAGS.checkpoint_dir)
            saver.restore(sess, ckpt.model_checkpoint_path)
            step = ckpt.model_checkpoint_path.split('/')[-1].split('-')[-1]
            coord = tf.train.Coordinator()
            threads = []
            for qr in tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS):
                threads.extend(qr.create_threads(sess, coord=coord, daemon=True, start=True))
            num_iter = int(math.ceil(FLAGS.num_examples / FLAGS.batch_size))
            true_count, i = 0, 0
            while i < num_iter and not coord.should_stop():
                true_count += np.sum(sess.run([top_k_op]))
                i += 1
            precision = true_count / (num_iter * FLAGS.batch_size)
            print('step %s: precision @ 1 = %.3f' % (step, precision))
            coord.request_stop()
            coord.join(threads, stop_grace_period_secs=10)


if __name__ == '__main__':
    tf.app.run()
