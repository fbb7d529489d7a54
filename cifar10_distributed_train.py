"""Trains the CIFAR-10 network on several machines, synchronously.

    TF_CONFIG='{"cluster": {"chief": ["10.0.0.1:2222"], "worker": ["10.0.0.2:2222"]},
                "task": {"type": "chief", "index": 0}}' python cifar10_distributed_train.py

The same command on every machine; only "task" differs, here {"type": "worker", "index": 0}
on the second one. On one machine, to try it: make cluster WORKERS=2

It is cifar10_multi_gpu_train.py carried on: a tower is a name scope and a device, and a device
may be on another machine. The chief builds one graph, with --num_gpus towers on each machine
and an input pipeline of its own for them. It averages the gradients, updates the variables
once, logs and saves, as the other trainers do. Every other process is a server, on which
the chief's session runs a part of the graph:

    chief    input -> batches -> tower_0 -> gradients -+
    worker 0 input -> batches -> tower_1 -> gradients -+-> average -> update (chief, or ps)
    worker 1 input -> batches -> tower_2 -> gradients -+                        |
                                    ^                                           |
                                    +--------------- variables <----------------+

With "ps" tasks in the cluster, the variables are spread over these. --batch_size is per tower.
Only the chief needs --train_dir; --data_dir is the same path everywhere. A task of type
"evaluator" runs cifar10_eval.py on --train_dir. When a machine is lost, all processes end
with status 138; started again, the run goes on. More: docs/several_machines.md.
"""

import contextlib
import os

import cifar10
import cifar10_eval
import cifar10_input
import cifar10_multi_gpu_train
import cifar10_train
from support import cluster, devices, script

import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS
tf.flags.adopt_module_key_flags(cifar10_multi_gpu_train)
tf.flags.adopt_module_key_flags(cifar10_eval)


def machine_batches(i, device):
    """A queue of batches on a machine, filled from an input pipeline of its own.

    Args:
      i: the machine's number; 0 is the chief.
      device: of the machine; '' for the chief.
    """
    if i == 0:
        return cifar10_multi_gpu_train.shared_batches()
    # The chief has said already how full the queues have to be, and in TensorBoard the others'
    # summaries get a prefix.
    with contextlib.redirect_stdout(None), tf.name_scope(f'machine_{i}'), tf.device(device):
        return cifar10_multi_gpu_train.shared_batches()


def build_step(global_step, machines, target):
    """Builds the training graph for --num_gpus towers on each machine.

    Args:
      machines: their devices, such as '/job:worker/task:0'; that of the chief comes first.
      target: the address of the chief's server.

    Returns:
      A cifar10_train.Step.
    """
    images_per_step = FLAGS.batch_size * FLAGS.num_gpus * len(machines)
    optimizer = cifar10.gradient_descent(global_step, images_per_step)
    losses, gradients = [], []
    with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
        for i, machine in enumerate(machines):
            # The first tower makes the variables. It names no machine, and leaves it to
            # devices.with_ps() where they are.
            device = machine if i else ''
            batches = machine_batches(i, device)
            for gpu in range(FLAGS.num_gpus):
                with tf.name_scope(f'{cifar10.TOWER_NAME}_{len(losses)}'), tf.device(device):
                    with tf.device(f'/gpu:{gpu}'):
                        losses.append(cifar10_multi_gpu_train.tower_loss(batches))
                        gradients.append(optimizer.compute_gradients(losses[-1]))
    with tf.device('/cpu:0'):
        loss = tf.add_n(losses) / len(losses)
    average = cifar10_multi_gpu_train.average_gradients(gradients)
    train_op = cifar10.apply_gradients(optimizer, average, loss, global_step)
    return cifar10_train.Step(train_op, loss, images_per_step, target)


def facts(has_towers):
    """What has to be the same on all machines. Dict of name -> value."""
    files = cluster.code()
    result = {'TensorFlow': tf.__version__}
    if has_towers:
        folder = cifar10.data_folder()
        result['--data_dir'] = os.path.abspath(FLAGS.data_dir)
        result['training images'] = cifar10_input.num_examples(False, folder)
        files += cifar10_input.data_files(False, folder)
    return dict(result, **cluster.digests(files))


def main():
    machines = cluster.from_environment()
    me = machines.me
    if me is None:
        FLAGS.checkpoint_dir = FLAGS.train_dir
        return cifar10_eval.main()
    if me.job != 'ps':
        cifar10.maybe_download_and_extract()
        if me != machines.chief:
            print(devices.describe(FLAGS.use_fp16), flush=True)

    def start_server():
        # A ps needs no GPU, and leaves it to who else is on that machine.
        config = tf.ConfigProto(device_count={'GPU': 0}) if me.job == 'ps' else None
        return tf.train.Server(machines.jobs, me.job, me.index, config=config)

    def lead(server):
        towers = [task.device for task in cluster.workers(machines)]
        return cifar10_train.train(
            lambda global_step: build_step(global_step, towers, server.target),
            devices.with_ps(me.device, len(machines.jobs.get('ps', []))),
        )

    return cluster.run(machines, facts(me.job != 'ps'), start_server, lead)


if __name__ == '__main__':
    script.run(main)
