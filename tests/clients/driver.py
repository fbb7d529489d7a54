"""Calls the trainers and the evaluator one after another, with flags of its own."""

import tensorflow.compat.v1 as tf

FLAGS = tf.app.flags.FLAGS
tf.app.flags.DEFINE_string('data_url', 'http://localhost/mine', 'Defined before the imports.')

import cifar10
import cifar10_eval
import cifar10_multi_gpu_train
import cifar10_train

tf.app.flags.DEFINE_integer('log_frequency', 2, 'Defined after the imports.')


def main(argv=None):
    cifar10.maybe_download_and_extract()
    if tf.gfile.Exists(FLAGS.train_dir):
        tf.gfile.DeleteRecursively(FLAGS.train_dir)
    tf.gfile.MakeDirs(FLAGS.train_dir)
    FLAGS.max_steps = 3
    cifar10_train.train()
    FLAGS.max_steps = 6
    FLAGS.num_gpus = 2
    cifar10_multi_gpu_train.train()
    FLAGS.checkpoint_dir = FLAGS.train_dir
    FLAGS.run_once = True
    cifar10_eval.evaluate()
    cifar10_eval.evaluate()
    print(FLAGS.data_url, FLAGS.log_frequency, argv[1:])


if __name__ == '__main__':
    tf.app.run()
