"""Trains the CIFAR-10 network on several machines, synchronously.

    TF_CONFIG='{"cluster": {"chief": ["10.0.0.1:2222"], "worker": ["10.0.0.2:2222"]},
                "task": {"type": "chief", "index": 0}}' python cifar10_distributed_train.py

Run the same command on every machine, each with its own "task"; on the second machine here it is
{"type": "worker", "index": 0}. To try it on one machine: make cluster WORKERS=2

This extends cifar10_multi_gpu_train.py. A tower is a name scope and a device, and the device may be
on another machine. The chief builds one graph with --num_gpus towers on each machine and an input
pipeline for them. As the other trainers do, it averages the gradients, updates the variables once,
logs and saves. Every other process is a server that runs its part of the graph for the chief:

    chief    input -> batches -> tower_0 -> gradients -+
    worker 0 input -> batches -> tower_1 -> gradients -+-> average -> update (chief)
    worker 1 input -> batches -> tower_2 -> gradients -+                 |
                                    ^                                    |
                                    +------- variables (chief) <---------+

--batch_size is per tower. Only the chief needs --train_dir. --data_dir is the same path on every
machine. A task of type "evaluator" runs cifar10_eval.py on --train_dir. When a machine is lost, all
processes exit with status 138; started again, the run resumes. See docs/several_machines.md.
"""

import contextlib
import os

import cifar10
import cifar10_eval
import cifar10_input
import cifar10_multi_gpu_train
import cifar10_train
from support import cluster, devices, flags, script, tf_config
from support.compat import tf

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(cifar10_multi_gpu_train)
flags.adopt_module_key_flags(cifar10_eval)


def machine_batches(model, number, device):
    """A queue of batches on a machine, filled from that machine's input pipeline."""
    with tf.device(device):
        if number == 0:
            return cifar10_multi_gpu_train.shared_batches(model)
        # With a prefix for the summaries, and without the line about the queue again.
        with tf.name_scope(f'machine_{number}'), contextlib.redirect_stdout(None):
            return cifar10_multi_gpu_train.shared_batches(model)


def build(model, machines):
    """Builds the graph for --num_gpus towers on each of the machines, whose devices are given."""
    towers = []
    for number, machine in enumerate(machines):
        batches = machine_batches(model, number, machine)
        towers += [(batches, f'{machine}/gpu:{gpu}') for gpu in range(FLAGS.num_gpus)]
    return cifar10_multi_gpu_train.build_towers(model, towers)


def facts():
    """What must be the same on all machines. Dict of name -> value."""
    folder = cifar10.data_folder()
    return {
        'TensorFlow': tf.__version__,
        '--data_dir': os.path.abspath(FLAGS.data_dir),
        'training images': cifar10_input.num_examples(False, folder),
        **cluster.digests(cifar10_input.data_files(False, folder)),
    }


def train(model=cifar10):
    """As cifar10_multi_gpu_train.train(), on the machines in TF_CONFIG. Only the chief returns."""
    machines = tf_config.read()

    def start_server():
        return tf.train.Server(machines.jobs, machines.me.job, machines.me.index)

    def lead(server):
        # Without another device, an op or a variable is on the chief.
        with cifar10_train.open_run() as run, tf.Graph().as_default():
            with tf.device(machines.chief.device):
                if not run.is_finished:
                    graph = build(model, [task.device for task in machines.tasks])
                    cifar10_train.loop(run, *graph, server.target)
        return run.status

    return cluster.run(machines, facts(), start_server, lead)


def main(argv=None):
    machines = tf_config.read()
    if machines.me is None:
        FLAGS.checkpoint_dir = FLAGS.train_dir
        return cifar10_eval.main()
    if machines.me == machines.chief:
        script.output_folder('train_dir')  # Fail before the download, which takes minutes.
    cifar10.maybe_download_and_extract()
    print(devices.describe(FLAGS.use_fp16, FLAGS.num_gpus))
    return train()


if __name__ == '__main__':
    script.run(main)
