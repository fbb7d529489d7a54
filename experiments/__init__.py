"""Better recipes and published results, reproduced: each module is a model and a script.

    python -m experiments.NAME --use_fp16                    trains and evaluates
    python -m experiments.NAME --checkpoint_dir=FOLDER       evaluates a model that it has trained

On two GPUs, add --num_gpus=2 --batch_size=64: a step still has 128 images.
"""

import cifar10
import cifar10_eval
import cifar10_multi_gpu_train
from support import devices, flags

FLAGS = flags.FLAGS


def train_and_evaluate(model, max_steps, use_moving_averages):
    """Trains a model, and evaluates it on the test set with one view and with ten.

    With --checkpoint_dir, it only evaluates the model in that folder; with --views, only those.

    Args:
      model: a module with the functions of cifar10, except train().
      max_steps, use_moving_averages: the defaults of these flags.

    Returns:
      The exit status.
    """
    FLAGS.set_default('max_steps', max_steps)
    FLAGS.set_default('use_moving_averages', use_moving_averages)
    cifar10.maybe_download_and_extract()
    print(devices.describe(FLAGS.use_fp16, FLAGS.num_gpus))
    if FLAGS['checkpoint_dir'].using_default_value:
        status = cifar10_multi_gpu_train.train(model)
        if status != 0:
            return status
        FLAGS.checkpoint_dir = FLAGS.train_dir
    FLAGS.run_once = True
    views = ['1', '10'] if FLAGS['views'].using_default_value else [FLAGS.views]
    for FLAGS.views in views:
        cifar10_eval.evaluate(model)
    return 0
