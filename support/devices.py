"""Where and in what precision a session computes."""

import os
import re

import tensorflow.compat.v1 as tf

FLAGS = tf.flags.FLAGS


def half_precision():
    """What --use_fp16 means on this machine: 'float16', 'bfloat16' or None."""
    if not FLAGS.use_fp16:
        return None
    if tf.test.is_gpu_available(cuda_only=True, min_cuda_compute_capability=(7, 0)):
        return 'float16'
    options = tf.ConfigProto().graph_options.rewrite_options
    if hasattr(options, 'auto_mixed_precision_onednn_bfloat16') and _cpu_has_bfloat16():
        return 'bfloat16'
    return None


def _cpu_has_bfloat16():
    try:
        with open('/proc/cpuinfo') as cpuinfo:
            return re.search(r'\b(avx512_bf16|amx_bf16)\b', cpuinfo.read()) is not None
    except OSError:
        return False


def session_config(**kwargs):
    """The tf.ConfigProto of all sessions here: ops move to where they can run.

    Memory on a GPU is taken as needed, see cifar10_input.
    """
    config = tf.ConfigProto(allow_soft_placement=True, **kwargs)
    if half_precision() == 'bfloat16':
        options = config.graph_options.rewrite_options
        options.auto_mixed_precision_onednn_bfloat16 = options.ON
    return config


def describe_devices():
    """One line on where a session computes and in what precision."""
    gpus = [device.name.split(':', 1)[1]
            for device in tf.config.experimental.list_physical_devices('GPU')]
    if gpus:
        where = ', '.join(gpus)
    else:
        if not tf.test.is_built_with_cuda():
            reason = 'this TensorFlow was built without CUDA'
        elif not os.path.exists('/proc/driver/nvidia'):
            reason = 'no NVIDIA driver here'
        elif 'CUDA_VISIBLE_DEVICES' in os.environ:
            reason = 'CUDA_VISIBLE_DEVICES=%s leaves none' % os.environ['CUDA_VISIBLE_DEVICES']
        else:
            reason = 'TensorFlow found no GPU that it can use; are its CUDA libraries installed?'
        where = 'the CPU (no GPU: %s)' % reason
    precision = half_precision() or 'float32'
    if FLAGS.use_fp16 and precision == 'float32':
        precision += ' (--use_fp16: neither float16 nor bfloat16 is to be had here)'
    return 'Running on %s with TensorFlow %s in %s.' % (where, tf.__version__, precision)
