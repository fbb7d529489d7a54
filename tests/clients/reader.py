"""An input pipeline of its own around read_cifar10."""

import glob
import sys

import cifar10_input
import numpy as np
import tensorflow.compat.v1 as tf

filenames = sorted(glob.glob(sys.argv[1] + '/data_batch_*.bin'))
filename_queue = tf.train.string_input_producer(filenames)
result = cifar10_input.read_cifar10(filename_queue)
print(result.height, result.width, result.depth, result.uint8image.get_shape())
result.label = tf.cast(result.label, tf.int64)
result.uint8image = tf.cast(result.uint8image, tf.float32)
image = tf.random_crop(result.uint8image, [24, 24, 3])
image = tf.image.random_flip_left_right(image)
image.set_shape([24, 24, 3])
result.label.set_shape([1])
images, labels, keys = tf.train.shuffle_batch(
    [image, result.label, result.key],
    batch_size=50,
    num_threads=4,
    capacity=200,
    min_after_dequeue=100,
)
labels = tf.reshape(labels, [50])
with tf.Session() as sess:
    sess.run(tf.global_variables_initializer())
    coord = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(sess=sess, coord=coord)
    batches = [sess.run([images, labels, keys]) for _ in range(4)]
    coord.request_stop()
    coord.join(threads)
images, labels, keys = [np.concatenate(arrays) for arrays in zip(*batches)]
np.savez('batches.npz', images, labels, keys.astype(str))
