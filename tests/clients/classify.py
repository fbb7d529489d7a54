"""Classifies one picture: decoded, resized and standardized by the script itself."""

import sys

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10

picture, checkpoint_dir = sys.argv[1:]
image = tf.image.decode_png(tf.read_file(picture), channels=3)
image = tf.image.resize_image_with_crop_or_pad(tf.cast(image, tf.float32), 24, 24)
image = tf.image.per_image_standardization(image)
logits = cifar10.inference(tf.expand_dims(image, 0))
top = tf.nn.top_k(tf.nn.softmax(logits), k=3)
tf.get_variable_scope().reuse_variables()
as_list = cifar10.inference([image])
averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
saver = tf.train.Saver(averages.variables_to_restore())
with tf.Session() as sess:
    saver.restore(sess, tf.train.get_checkpoint_state(checkpoint_dir).model_checkpoint_path)
    values, classes = sess.run(top)
    from_numpy = cifar10.inference(np.array([sess.run(image)]))
    others = sess.run([as_list, from_numpy])
for value, number in zip(values[0], classes[0]):
    print('class %d: %.3f' % (number, value))
print('as a list', others[0].argmax(), 'as an array', others[1].argmax())
