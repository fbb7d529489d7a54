"""Ten views of an image. The average of their probabilities is more accurate than one of them.

As in cuda-convnet, the views are the center, the four corners, and the mirror images of these five.
"""

import functools

from support.compat import tf


def crop(images, num_views, size):
    """Crops the views of images.

    Args:
      images: [n, height, width, channels].
      num_views: 1, only the center, or 10.
      size: height and width of a view.

    Returns:
      [n, size, size, channels], with ten views [n, 10, size, size, channels].
    """
    center = tf.image.resize_image_with_crop_or_pad(images, size, size)
    if num_views == 1:
        return center
    sides = [slice(None, size), slice(-size, None)]
    views = [center] + [images[:, rows, columns] for rows in sides for columns in sides]
    return tf.stack(views + [view[:, :, ::-1] for view in views], axis=1)


def cropper(num_views, size):
    """crop() as a function of the images."""
    return functools.partial(crop, num_views=num_views, size=size)


def probabilities(inference, images):
    """Builds a network up to the probabilities of the classes, means over the views of an image.

    Args:
      inference: function from images to logits.
      images: [n, height, width, channels], or [n, num_views, height, width, channels].

    Returns:
      [n, num_classes] float32.
    """
    *num_views, height, width, channels = images.shape.as_list()[1:]
    per_view = tf.nn.softmax(inference(tf.reshape(images, [-1, height, width, channels])))
    return tf.reduce_mean(tf.reshape(per_view, [-1, *(num_views or [1]), per_view.shape[1]]), 1)
