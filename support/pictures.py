"""Picture files -> square RGB images of one size."""

import concurrent.futures
import contextlib
import itertools
import os
import stat
import threading
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from support.compat import tf

# Pillow reads many more, some of them with external programs.
FORMATS = ['BMP', 'GIF', 'JPEG', 'PNG', 'WEBP']
# A few kilobytes can decode to gigabytes. Cameras have up to 61 megapixels. Decoding takes 14 bytes
# per pixel, and each CPU core decodes a picture; but only one at a time that is large.
MAX_PIXELS = 64 * 10**6
LARGE_PIXELS = 16 * 10**6
MAX_FILE_BYTES = 256 << 20  # An uncompressed BMP with MAX_PIXELS is smaller.

# They are about damaged metadata, or about sizes, which load() checks.
warnings.filterwarnings('ignore', module=r'PIL\.')

_decoding_large = threading.Lock()


def open_regular(path, max_bytes=MAX_FILE_BYTES):
    """Opens a file to read its bytes.

    Raises:
      OSError: it does not exist, is a folder, pipe or device, or is larger than max_bytes.
    """
    status = os.stat(path)  # Opening a pipe would wait for somebody who writes.
    if not stat.S_ISREG(status.st_mode):
        raise OSError('not a regular file')
    if status.st_size > max_bytes:
        raise OSError(f'{status.st_size} bytes are more than the limit of {max_bytes}')
    return open(path, 'rb')


def load(path):
    """Decodes a picture file: its first frame, turned upright as its EXIF data says.

    Returns:
      [height, width, 3] uint8. Gray becomes RGB; transparency is ignored.

    Raises:
      Exception: it cannot be read. Pillow raises errors of many types for damaged files.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_regular(path))
        try:
            picture = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError('damaged, or not a BMP, GIF, JPEG, PNG or WebP picture')
        except Image.DecompressionBombError:
            raise ValueError(f'more pixels than the limit of {MAX_PIXELS}')
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f'{width}x{height}: more pixels than the limit of {MAX_PIXELS}')
        if width * height > LARGE_PIXELS:
            stack.enter_context(_decoding_large)
        picture.load()
        try:
            picture = ImageOps.exif_transpose(picture)
        except Exception:
            pass  # Damaged EXIF data says nothing about the orientation.
        if picture.mode.startswith('I'):  # 16 bits per pixel; convert() would clip them.
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return np.asarray(picture.convert('RGB'))


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
    # What tf.image.resize(antialias=True) is built on; 1.15 has no such argument.
    scaled = tf.raw_ops.ScaleAndTranslate(
        images=image[tf.newaxis, top : top + side, left : left + side],
        size=[size, size],
        scale=tf.fill([2], size / tf.cast(side, tf.float32)),
        translation=[0.0, 0.0],
        kernel_type='triangle',
        antialias=True,
    )
    return tf.saturate_cast(tf.round(scaled[0]), tf.uint8)


def decode(contents, size, name):
    """Adds ops that decode and scale a JPEG or PNG picture, for graphs that run without Pillow.

    Args:
      contents: scalar string, the bytes of the file.
      size: as in scale().
      name: scalar string, what error messages call it.

    Returns:
      [size, size, 3] uint8. As in load(), but EXIF data is ignored.

    Raises:
      tf.errors.InvalidArgumentError: when run with something else, or with more than MAX_PIXELS.
    """
    is_jpeg = tf.equal(tf.substr(contents, 0, 3), b'\xff\xd8\xff')
    is_png = tf.logical_and(
        tf.equal(tf.substr(contents, 0, 8), b'\x89PNG\r\n\x1a\n'), tf.strings.length(contents) > 24
    )
    is_known = tf.Assert(
        tf.logical_or(is_jpeg, is_png), [name, 'is damaged, or neither a JPEG nor a PNG picture']
    )
    with tf.control_dependencies([is_known]):
        height_and_width = tf.cond(
            is_jpeg,
            lambda: tf.image.extract_jpeg_shape(contents)[:2],
            lambda: tf.decode_raw(tf.substr(contents, 16, 8), tf.int32, little_endian=False)[::-1],
        )
    pixels = tf.reduce_prod(tf.cast(height_and_width, tf.int64))
    is_small = tf.Assert(pixels <= MAX_PIXELS, [name, f'has more than {MAX_PIXELS} pixels'])
    with tf.control_dependencies([is_small]):
        image = tf.image.decode_png(contents, 3)  # Decodes JPEG, too.
    return scale(image, size)


def read(sources, size, at_a_time):
    """Reads pictures in parallel.

    Args:
      sources: iterable of paths, or of [height, width, 3] uint8 arrays.
      size: as in scale().
      at_a_time: the number of pictures in a list; no more are held in memory.

    Yields:
      Lists of (source, [size, size, 3] uint8 array, None), or (source, None, reason why it cannot
      be read), in the order of the sources.
    """
    graph = tf.Graph()
    with graph.as_default():
        pixels = tf.placeholder(tf.uint8, [None, None, 3])
        scaled = scale(pixels, size)
    session = tf.Session(graph=graph, config=tf.ConfigProto(device_count={'GPU': 0}))

    def load_scaled(source):
        try:
            image = load(source) if isinstance(source, str) else source
        except Exception as error:
            return source, None, getattr(error, 'strerror', None) or str(error)
        return source, session.run(scaled, {pixels: image}), None

    sources = iter(sources)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        for some in iter(lambda: list(itertools.islice(sources, at_a_time)), []):
            yield list(executor.map(load_scaled, some))
