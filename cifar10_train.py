"""Trains the CIFAR-10 network on one device, a GPU if there is one.

    python cifar10_train.py                       start, or go on where it stopped
    python cifar10_train.py --max_steps=100000    train up to this step
    python cifar10_eval.py                        beside it: precision @ 1
    tensorboard --logdir /tmp/cifar10_train       losses, images, distributions

A checkpoint is written every two minutes and at the end. Ctrl-C or SIGTERM end
the run after the current step and a last checkpoint; the same command resumes it.
"""

import collections
from datetime import datetime
import os
import re
import signal
import time

import cifar10
import cifar10_input
from support import checkpoints, devices, script

import numpy as np
import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_string('train_dir', '/tmp/cifar10_train', 'Folder of checkpoints and events.')
tf.flags.DEFINE_integer('max_steps', 1000000, 'Train up to this global step.', lower_bound=1)
tf.flags.DEFINE_bool('log_device_placement', False, 'Log on which device each op runs.')
tf.flags.DEFINE_integer('log_frequency', 10, 'Steps between two lines of the log.', lower_bound=1)
tf.flags.DEFINE_integer('save_checkpoint_secs', 120, 'Seconds between checkpoints.', lower_bound=1)
tf.flags.DEFINE_integer('max_to_keep', 5, 'Newest checkpoints to keep; 0: all.', lower_bound=0)
tf.flags.register_validator(
    'train_dir',
    lambda folder: not re.search(r'[\[\\]|//$', folder),
    message='TensorFlow saves below such a path, but does not find it again',
)
tf.flags.adopt_module_key_flags(cifar10)

SUMMARY_STEPS = 100

# What to train: the op that does a step, its loss, how many images it takes, and the address
# of the tf.train.Server where the session is, '' for this process.
Step = collections.namedtuple('Step', 'train_op loss num_images target')


def build_step(global_step):
    """Builds the training graph for one device. Returns a Step."""
    images, labels = cifar10.distorted_inputs()
    logits = cifar10.inference(images, len(cifar10.class_names()))
    loss = cifar10.loss(logits, labels)
    return Step(cifar10.train(loss, global_step), loss, FLAGS.batch_size, target='')


def train(build, device=None):
    """Trains in --train_dir, from the newest checkpoint there if there is one.

    Args:
      build: function of the global step that builds the graph and returns a Step.
      device: where ops go that name no other machine, as for tf.device().

    Returns:
      The exit status: 0, or 128 + the number of the signal that ended the run.
    """
    cifar10.maybe_download_and_extract()
    os.makedirs(FLAGS.train_dir, exist_ok=True)
    with script.locked(FLAGS.train_dir, f'another trainer is at work in {FLAGS.train_dir}'):
        return script.hear_signals(lambda signals: train_until_signal(build, signals, device))


def train_until_signal(build, signals, device=None):
    """As train(), up to the step at which a signal appears in the list `signals`."""
    checkpoint = checkpoints.newest(FLAGS.train_dir)
    if checkpoints.step_of(checkpoint) >= FLAGS.max_steps:
        print(f'Nothing to do: {checkpoint} has reached --max_steps={FLAGS.max_steps}.')
        return 0
    if checkpoint:
        known = cifar10_input.class_names(FLAGS.train_dir)
        checkpoints.expect_classes(checkpoint, known, cifar10.class_names())
    print(devices.describe(FLAGS.use_fp16), flush=True)
    if checkpoint:
        print(f'Resuming from {checkpoint}.', flush=True)

    with tf.Graph().as_default(), tf.device(device):
        with tf.device('/cpu:0'):
            global_step = tf.train.get_or_create_global_step()
        step = build(global_step)
        if checkpoint:
            checkpoints.choose(checkpoint, FLAGS.max_to_keep)
        checkpoints.clear_finished(FLAGS.train_dir)
        # With them, a checkpoint can be used where the data set isn't.
        cifar10_input.write_class_names(FLAGS.train_dir, cifar10.class_names())
        done = run_steps(step, global_step, checkpoint, signals)

    saved = tf.train.latest_checkpoint(FLAGS.train_dir)
    if done < FLAGS.max_steps:
        by = signal.Signals(signals[0]).name
        print(
            f'Stopped by {by} at step {done}. Saved {saved}; the same command goes on from there.'
        )
        return 128 + signals[0]
    checkpoints.mark_finished(FLAGS.train_dir, done)
    print(f'Finished at step {done}. Saved {saved}.')
    return 0


def run_steps(step, global_step, checkpoint, signals):
    """Runs a Step until --max_steps or a signal.

    Args:
      checkpoint: the path to start from, or None.

    Returns:
      The global step at the end.

    Raises:
      script.UserError: the loss or a variable isn't finite, or the disk is full.
    """
    # The variable itself, run beside train_op, could be read before or after its update.
    with tf.control_dependencies([step.train_op]):
        steps_done = tf.identity(global_step)
    done = logged = checkpoints.step_of(checkpoint)
    logged_at = time.monotonic()
    with open_session(checkpoint, step.target) as session:
        while done < FLAGS.max_steps and not signals:
            before = done
            _, loss, done = session.run([step.train_op, step.loss, steps_done])
            if not np.isfinite(loss):
                raise checkpoints.diverged(f'the loss of step {before} is {loss}')
            # In float16 a step may be skipped: no line for it.
            if before % FLAGS.log_frequency == 0 and done > before:
                now = time.monotonic()
                seconds = (now - logged_at) / (done - logged)
                logged, logged_at = done, now
                print(
                    f'{datetime.now()}: step {before}, loss = {loss:.2f} '
                    f'({step.num_images / seconds:.1f} examples/sec; {seconds:.3f} sec/batch)',
                    flush=True,
                )
    if done < FLAGS.max_steps and not signals:  # To the session, this is a normal end.
        raise RuntimeError(f'the input ended at step {done}')
    return done


def open_session(checkpoint, target):
    """A session on the default graph that looks after the run by itself.

    It initializes the variables or restores them, and starts the queue runners. Its hooks,
    called before and after each run, save checkpoints and write summaries.
    """
    config = devices.session_config(FLAGS.use_fp16, FLAGS.log_device_placement)
    scaffold = tf.train.Scaffold(saver=checkpoints.Saver(FLAGS.max_to_keep, checkpoint))
    writer = checkpoints.event_writer(FLAGS.train_dir)
    save = tf.train.CheckpointSaverHook(
        FLAGS.train_dir, save_secs=FLAGS.save_checkpoint_secs, scaffold=scaffold
    )
    summarize = tf.train.SummarySaverHook(SUMMARY_STEPS, summary_writer=writer, scaffold=scaffold)
    return tf.train.SingularMonitoredSession(
        [save, summarize],
        scaffold,
        target,
        config,
        checkpoint_dir=FLAGS.train_dir if checkpoint else None,
    )


def main():
    return train(build_step)


if __name__ == '__main__':
    script.run(main)
