"""A trainer around MonitoredTrainingSession, with a logger hook."""

import cifar10
import tensorflow.compat.v1 as tf

FLAGS = tf.app.flags.FLAGS
tf.app.flags.DEFINE_string('train_dir', '/tmp/cifar10_train', 'Where to write checkpoints.')
tf.app.flags.DEFINE_integer('max_steps', 1000000, 'Number of batches to run.')


def main(argv=None):
    global_step = tf.train.get_or_create_global_step()
    with tf.device('/cpu:0'):
        images, labels = cifar10.distorted_inputs()
    loss = cifar10.loss(cifar10.inference(images), labels)
    train_op = cifar10.train(loss, global_step)

    class LoggerHook(tf.train.SessionRunHook):
        def before_run(self, run_context):
            return tf.train.SessionRunArgs(loss)

        def after_run(self, run_context, run_values):
            print('loss = %.2f' % run_values.results)

    stop = tf.train.StopAtStepHook(last_step=FLAGS.max_steps)
    hooks = [stop, tf.train.NanTensorHook(loss), LoggerHook()]
    with tf.train.MonitoredTrainingSession(checkpoint_dir=FLAGS.train_dir, hooks=hooks) as sess:
        while not sess.should_stop():
            sess.run(train_op)


if __name__ == '__main__':
    tf.app.run()
