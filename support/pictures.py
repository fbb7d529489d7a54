"""Pictures in files of many kinds -> square RGB images of one size."""

import concurrent.futures
import itertools
import os

import tensorflow.compat.v1 as tf


def scale(image, size):
    """The largest central square of an image, scaled with antialiasing.

    Args:
      image: [height, width, channels] uint8.

    Returns:
      [size, size, channels] uint8.
    """
    height, width = tf.unstack(tf.shape(image)[:2])
    side = tf.minimum(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    # What tf.image.resize(antialias=True) stands on, which 1.15 has under another name.
    scaled = tf.raw_ops.ScaleAndTranslate(
        images=image[tf.newaxis, top : top + side, left : left + side],
        size=[size, size],
        scale=tf.fill([2], size / tf.cast(side, tf.float32)),
        translation=[0.0, 0.0],
        kernel_type='triangle',
        antialias=True,
    )
    return tf.saturate_cast(tf.round(scaled[0]), tf.uint8)


def _decode_bmp(contents):
    """tf.image.decode_bmp knows no palettes; and in 1.15, one op only one number of channels."""
    header_bytes = tf.decode_raw(tf.substr(contents, 14, 4), tf.int32)[0]
    bits_per_pixel = tf.decode_raw(tf.substr(contents, 28, 2), tf.int16)[0]

    def with_palette():
        # An error of tf.substr quotes the file, whose bytes make the session of 1.15 crash.
        end = tf.strings.length(contents)
        is_inside = tf.logical_and(header_bytes >= 0, header_bytes < end - 14)
        start = tf.where(is_inside, 14 + header_bytes, end)
        palette = tf.decode_raw(tf.substr(contents, start, 1024), tf.uint8)
        blue_green_red = tf.reshape(palette, [-1, 4])[:, :3]
        pixels = tf.image.decode_bmp(contents)[..., 0]
        return tf.gather(blue_green_red[:, ::-1], tf.cast(pixels, tf.int32))

    return tf.case(
        [
            (tf.equal(bits_per_pixel, 8), with_palette),
            (tf.equal(bits_per_pixel, 32), lambda: tf.image.decode_bmp(contents, 4)[..., :3]),
        ],
        default=lambda: tf.image.decode_bmp(contents, 3),
    )


def decode(contents, size):
    """As scale(), of an encoded picture: PNG, JPEG, BMP, or the first frame of a GIF.

    Args:
      contents: scalar string.

    Returns:
      [size, size, 3] uint8. Grey becomes RGB; transparency is ignored.
    """
    is_bmp = tf.logical_and(
        tf.equal(tf.substr(contents, 0, 2), 'BM'), tf.strings.length(contents) >= 54
    )
    # Ops that both generations know (not tf.image.decode_image), since graphs are exported.
    image = tf.case(
        [
            (is_bmp, lambda: _decode_bmp(contents)),
            (tf.equal(tf.substr(contents, 0, 3), 'GIF'), lambda: tf.image.decode_gif(contents)[0]),
        ],
        default=lambda: tf.image.decode_png(contents, 3),  # Of a JPEG, too.
    )
    image.set_shape([None, None, 3])
    return scale(image, size)


def read(sources, size, at_a_time):
    """Reads pictures in parallel.

    Args:
      sources: iterable of paths, or of [height, width, 3] uint8 arrays.
      size: as in scale().
      at_a_time: how many pictures make a list; no more are held in memory.

    Yields:
      Lists of (source, [size, size, 3] uint8 array, None), or (source, None, what is wrong
      with it), in the order of the sources.
    """
    graph = tf.Graph()
    with graph.as_default():
        contents = tf.placeholder(tf.string, [])
        pixels = tf.placeholder(tf.uint8, [None, None, 3])
        decoded, scaled = decode(contents, size), scale(pixels, size)
    session = tf.Session(graph=graph, config=tf.ConfigProto(device_count={'GPU': 0}))

    def load(source):
        try:
            if not isinstance(source, str):
                return source, session.run(scaled, {pixels: source}), None
            with open(source, 'rb') as file:
                return source, session.run(decoded, {contents: file.read()}), None
        except (OSError, ValueError) as error:
            return source, None, getattr(error, 'strerror', None) or str(error)
        except tf.errors.OpError as error:  # The reason stands before the name of the node.
            return source, None, error.message.split('[[')[0].strip().rpartition('\n')[2]

    sources = iter(sources)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        for some in iter(lambda: list(itertools.islice(sources, at_a_time)), []):
            yield list(executor.map(load, some))
