"""Where and in what precision a session computes."""

import os
import re

from support import checkpoints
from support.compat import tf


# Trainer and evaluator can share a GPU: neither takes more of its memory than it needs.
# TensorFlow reads this when it first uses the GPU, whichever session that is.
os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')


def half_precision(use_fp16):
    """What --use_fp16 means on this machine: 'float16', 'bfloat16' or None."""
    if not use_fp16:
        return None
    if tf.test.is_gpu_available(cuda_only=True, min_cuda_compute_capability=(7, 0)):
        return 'float16'
    options = tf.ConfigProto().graph_options.rewrite_options
    if hasattr(options, 'auto_mixed_precision_onednn_bfloat16') and _cpu_has_bfloat16():
        return 'bfloat16'
    return None


def _cpu_has_bfloat16():
    if not os.path.exists('/proc/cpuinfo'):
        return False
    with open('/proc/cpuinfo') as cpuinfo:
        return re.search(r'\b(avx512_bf16|amx_bf16)\b', cpuinfo.read()) is not None


def session_config(use_fp16, log_device_placement=False):
    """The tf.ConfigProto of every session here: ops move to where they can run."""
    config = tf.ConfigProto(allow_soft_placement=True, log_device_placement=log_device_placement)
    options = config.graph_options.rewrite_options
    if half_precision(use_fp16) == 'bfloat16':
        options.auto_mixed_precision_onednn_bfloat16 = options.ON
    elif half_precision(use_fp16) == 'float16':
        options.auto_mixed_precision = options.ON
    return config


def scale_loss(optimizer, use_fp16):
    """The optimizer; in float16, one that scales the loss, as small gradients would become 0."""
    if half_precision(use_fp16) != 'float16':
        return optimizer
    with tf.variable_creator_scope(checkpoints.not_saved):
        return tf.train.experimental.enable_mixed_precision_graph_rewrite(optimizer)


def describe(use_fp16, num_towers=1):
    """One line: where a session computes, if not on a GPU why not, and in which precision."""
    gpus = tf.config.experimental.list_physical_devices('GPU')
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if gpus:
        where = ', '.join(gpu.name.split(':', 1)[1] for gpu in gpus)
    elif not tf.test.is_built_with_cuda():
        where = 'the CPU (this TensorFlow is built without CUDA)'
    elif visible is not None:
        where = f'the CPU (CUDA_VISIBLE_DEVICES={visible})'
    else:
        where = 'the CPU (no GPU found; TF_CPP_MIN_LOG_LEVEL=0 shows why)'
    precision = half_precision(use_fp16) or 'float32'
    if use_fp16 and precision == 'float32':
        precision += ' (--use_fp16: neither float16 nor bfloat16 is available here)'
    if num_towers > max(1, len(gpus)):
        where += f', shared by {num_towers} towers,'
    return f'Running on {where} with TensorFlow {tf.__version__} in {precision}.'
