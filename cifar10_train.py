"""Trains the CIFAR-10 network on one device, a GPU if there is one.

    python cifar10_train.py                       start, or resume
    python cifar10_train.py --max_steps=100000    train up to this step
    python cifar10_eval.py                        meanwhile: the accuracy on the test set
    tensorboard --logdir /tmp/cifar10_train       losses, images, distributions

The trainer saves a checkpoint every two minutes and at the end. Ctrl-C or SIGTERM ends the run
after the current step, with a last checkpoint; the same command resumes from it.
"""

from datetime import datetime
import time

import cifar10
from support import devices, flags, script, training
from support.compat import tf

FLAGS = flags.FLAGS
flags.DEFINE_string('train_dir', '/tmp/cifar10_train', 'Folder of checkpoints and events.')
flags.DEFINE_integer('max_steps', 1000000, 'Train up to this global step.', lower_bound=1)
flags.DEFINE_bool('log_device_placement', False, 'Log on which device each op runs.')
flags.DEFINE_integer('log_frequency', 10, 'Steps between two lines of the log.', lower_bound=1)
flags.DEFINE_integer('save_checkpoint_secs', 120, 'Seconds between checkpoints.', lower_bound=1)
flags.DEFINE_integer('max_to_keep', 5, 'Newest checkpoints to keep; 0: all.', lower_bound=0)
flags.adopt_module_key_flags(cifar10)


def open_run():
    """Locks --train_dir and finds the checkpoint to resume from. See training.open_run()."""
    folder = script.output_folder('train_dir')
    return training.open_run(folder, FLAGS.max_steps, cifar10.data_folder())


def build(model):
    """Builds the graph for one device.

    Returns the training op, the loss, and the number of images in a step.
    """
    with tf.device('/cpu:0'):
        global_step = tf.train.get_or_create_global_step()
    images, labels = model.distorted_inputs()
    logits = model.inference(images)
    loss = model.loss(logits, labels)
    train_op = model.train(loss, global_step)
    return train_op, loss, FLAGS.batch_size


def train(model=cifar10, build=build):
    """Trains up to --max_steps.

    Args:
      model: a module or object with the functions of cifar10.
      build: function of the model that builds the graph; by default the one above.

    Returns:
      The exit status: 0, or 128 + the number of the signal that stopped the run.
    """
    with open_run() as run, tf.Graph().as_default():
        if not run.is_finished:
            loop(run, *build(model))
    return run.status


def loop(run, train_op, loss, images_per_step, master=''):
    """Runs training steps until --max_steps or a signal, and logs.

    Args:
      run: from open_run().
      train_op: the op that does a step.
      loss: scalar.
      images_per_step: on all towers together.
      master: address of the tf.train.Server that runs the session; '' for this process.
    """
    # Without this dependency, TensorFlow could read the step before the update.
    with tf.control_dependencies([train_op]):
        steps_done = tf.train.get_global_step().read_value()
    config = devices.session_config(FLAGS.use_fp16, FLAGS.log_device_placement)
    step = logged = run.step
    logged_at = time.monotonic()
    # A tf.train.SingularMonitoredSession. It initializes or restores the variables and starts the
    # queue runners. Its hooks save checkpoints, write summaries and end the loop.
    with run.session(
        loss, FLAGS.save_checkpoint_secs, FLAGS.max_to_keep, config, master
    ) as session:
        while not session.should_stop():
            _, loss_value, done = session.run([train_op, loss, steps_done])
            # In float16, a step whose gradients overflow is skipped: done == step.
            if step % FLAGS.log_frequency == 0 and done > step:
                now = time.monotonic()
                seconds = (now - logged_at) / (done - logged)
                logged, logged_at = done, now
                print(
                    f'{datetime.now()}: step {step}, loss = {loss_value:.2f} '
                    f'({images_per_step / seconds:.1f} examples/sec; {seconds:.3f} sec/batch)'
                )
            step = done


def main(argv=None):
    script.output_folder('train_dir')  # Fail before the download, which takes minutes.
    cifar10.maybe_download_and_extract()
    print(devices.describe(FLAGS.use_fp16))
    return train()


if __name__ == '__main__':
    script.run(main)
