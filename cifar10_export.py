"""Exports a checkpoint as a SavedModel, for TensorFlow Serving or any other program.

    python cifar10_export.py        the published model; or your own:
    python cifar10_export.py --checkpoint_dir=/tmp/cifar10_train --export_dir=/tmp/mine
    saved_model_cli show --all --dir /tmp/cifar10_export/150000

Writes the folder EXPORT_DIR/STEP, complete or not at all, and never overwrites one. A server loads
the largest number that it finds, so give each model its own --export_dir. Both signatures return
for each of n pictures the names of all classes and their probabilities, most probable first:

    serving_default    image_bytes: string [n], JPEG or PNG files with pictures of any size
    images             images: uint8 [n, 32, 32, 3]

    classes: string [n, number of classes]; scores: float32 of the same shape
"""

import os
import tempfile

import cifar10_input
import cifar10_predict
from support import checkpoints, flags, pictures, script
from support.compat import tf

FLAGS = flags.FLAGS
flags.DEFINE_string('export_dir', '/tmp/cifar10_export', 'Folder where a server finds its models.')
for _name in 'checkpoint_dir', 'use_moving_averages', 'views':
    flags.declare_key_flag(_name)


def decode(image_bytes):
    """[n] string, JPEG or PNG files -> [n, 32, 32, 3] uint8. An error names the first bad one."""

    def decode_one(numbered):
        number, contents = numbered
        name = tf.strings.join(['image_bytes[', tf.as_string(number), ']'])
        return pictures.decode(contents, cifar10_input.RECORD_SIZE, name)

    numbers = tf.range(tf.size(image_bytes))
    return tf.map_fn(decode_one, (numbers, image_bytes), tf.uint8)


def build(class_names):
    """Builds the graph that is served. Returns a dict of name -> signature."""
    image_bytes = tf.placeholder(tf.string, [None], name='image_bytes')
    size = cifar10_input.RECORD_SIZE
    # One network serves both signatures: a value that is fed replaces the decoded images.
    images = tf.placeholder_with_default(decode(image_bytes), [None, size, size, 3], name='images')
    probabilities = cifar10_predict.class_probabilities(images, len(class_names))
    scores, ranked = tf.nn.top_k(probabilities, len(class_names))
    outputs = {'classes': tf.gather(tf.constant(class_names), ranked), 'scores': scores}

    def signature(name, tensor):
        return tf.saved_model.predict_signature_def({name: tensor}, outputs)

    return {
        tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: signature('image_bytes', image_bytes),
        'images': signature('images', images),
    }


def save(session, signatures, folder):
    """Writes the model into a folder that does not exist, which appears when it is complete."""
    parent, step = os.path.split(folder)
    # A server only looks at folders whose names are numbers.
    with tempfile.TemporaryDirectory(prefix='.export-', dir=parent) as tmp:
        written = os.path.join(tmp, step)
        builder = tf.saved_model.Builder(written)
        builder.add_meta_graph_and_variables(
            session,
            [tf.saved_model.tag_constants.SERVING],
            signatures,
            strip_default_attrs=True,
        )
        builder.save()
        os.rename(written, folder)


def main(argv=None):
    script.reject_flags('use_fp16')
    export_dir = script.output_folder('export_dir')
    checkpoint, class_names = cifar10_predict.newest_model()
    folder = os.path.join(export_dir, str(checkpoints.step_of(checkpoint)))
    if os.path.lexists(folder):
        raise script.UserError(f'{folder} exists already; nothing was written')
    config = tf.ConfigProto(device_count={'GPU': 0})
    with tf.Graph().as_default(), tf.Session(config=config) as session:
        signatures = build(class_names)
        cifar10_predict.restore(session, checkpoint)
        with checkpoints.writing(export_dir):
            save(session, signatures, folder)
    print(f'Saved {folder}, the model {checkpoint}.')
    numbers = [int(name) for name in os.listdir(export_dir) if name.isdecimal()]
    if max(numbers) > checkpoints.step_of(checkpoint):
        print(f'A server loads {export_dir}/{max(numbers)} instead, the largest number there.')


if __name__ == '__main__':
    cifar10_predict.set_defaults()
    script.run(main)
