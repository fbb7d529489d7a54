"""Writes a checkpoint as a SavedModel, for TensorFlow Serving or any other program.

    python cifar10_export.py        the published model; or one of your own:
    python cifar10_export.py --checkpoint_dir=/tmp/cifar10_train --export_dir=/tmp/mine
    saved_model_cli show --all --dir /tmp/cifar10_export/150000

It becomes EXPORT_DIR/STEP, whole or not at all; what is there already is never overwritten.
A server takes the largest number it finds: give each model an --export_dir of its own.
Both signatures give, for each of n pictures, the names of all classes and their
probabilities, most probable first:

    serving_default    image_bytes: string [n], encoded pictures of any size
    images             images: uint8 [n, 32, 32, 3]

    classes: string [n, number of classes]; scores: float32 of the same shape
"""

import os
import tempfile

import cifar10_input
import cifar10_predict
from support import checkpoints, pictures, script

import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_string('export_dir', '/tmp/cifar10_export', 'Where a server looks for models.')
for _name in 'checkpoint_dir', 'use_moving_averages', 'views':
    tf.flags.declare_key_flag(_name)


def build(class_names):
    """Builds the graph that is served. Returns dict of name -> signature."""
    image_bytes = tf.placeholder(tf.string, [None], name='image_bytes')
    size = cifar10_input.RECORD_SIZE
    decoded = tf.map_fn(lambda contents: pictures.decode(contents, size), image_bytes, tf.uint8)
    # The one network serves both signatures: a feed takes the place of what was decoded.
    images = tf.placeholder_with_default(decoded, [None, size, size, 3], name='images')
    # TensorFlow 1.15 cannot load the resource variables that 2.x saves.
    with tf.variable_scope(tf.get_variable_scope(), use_resource=False):
        probabilities = cifar10_predict.class_probabilities(images, len(class_names))
    scores, ranked = tf.nn.top_k(probabilities, len(class_names))
    outputs = {'classes': tf.gather(tf.constant(class_names), ranked), 'scores': scores}

    def signature(name, tensor):
        return tf.saved_model.predict_signature_def({name: tensor}, outputs)

    return {
        tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: signature('image_bytes', image_bytes),
        'images': signature('images', images),
    }


def main():
    checkpoint, class_names = cifar10_predict.newest_model()
    step = checkpoints.step_of(checkpoint)
    folder = os.path.join(FLAGS.export_dir, str(step))
    if os.path.exists(folder):
        raise script.UserError(f'{folder} is there already; nothing was written')
    os.makedirs(FLAGS.export_dir, exist_ok=True)
    config = tf.ConfigProto(device_count={'GPU': 0})
    with tf.Graph().as_default(), tf.Session(config=config) as session:
        signatures = build(class_names)
        cifar10_predict.restore(session, checkpoint)
        # A server looks at folders that are called by numbers only.
        with tempfile.TemporaryDirectory(prefix='.export-', dir=FLAGS.export_dir) as tmp:
            written = os.path.join(tmp, str(step))
            builder = tf.saved_model.Builder(written)
            builder.add_meta_graph_and_variables(
                session,
                [tf.saved_model.tag_constants.SERVING],
                signatures,
                strip_default_attrs=True,
            )
            builder.save()
            os.rename(written, folder)
    print(f'Saved {folder}, the model {checkpoint}.')


if __name__ == '__main__':
    cifar10_predict.set_defaults()
    script.run(main)
