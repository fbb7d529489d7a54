"""What the project is compared with: one image per op, and the built-in LRN.

Both take the place of the project's own functions:

    cifar10_input.distorted_inputs = classic.distorted_inputs
    cifar10.local_response_normalization = classic.local_response_normalization
"""

import cifar10_input

from support.compat import tf


def distorted_inputs(data_dir, batch_size):
    """As cifar10_input.distorted_inputs, but every op of the pipeline sees a single image.

    The distributions, the number of threads and the least number of images in the
    queue are the same.
    """
    min_queue_examples = int(0.4 * cifar10_input.num_examples(False, data_dir))
    with tf.device('/cpu:0'), tf.name_scope('input'):
        files = tf.train.string_input_producer(cifar10_input.data_files(False, data_dir))
        record = cifar10_input.read_cifar10(files)
        image = tf.random_crop(
            tf.cast(record.uint8image, tf.float32),
            [cifar10_input.IMAGE_SIZE, cifar10_input.IMAGE_SIZE, 3],
        )
        image = tf.image.random_flip_left_right(image)
        image = tf.image.random_brightness(image, cifar10_input.MAX_BRIGHTNESS_DELTA)
        image = tf.image.random_contrast(image, *cifar10_input.CONTRAST_RANGE)
        return tf.train.shuffle_batch(
            [tf.image.per_image_standardization(image), record.label[0]],
            batch_size=batch_size,
            num_threads=cifar10_input.NUM_PREPROCESS_THREADS,
            capacity=min_queue_examples + 3 * batch_size,
            min_after_dequeue=min_queue_examples,
        )


def local_response_normalization(name, images):
    """TensorFlow's own op."""
    return tf.nn.local_response_normalization(images, 4, 1.0, 0.001 / 9.0, 0.75, name=name)
