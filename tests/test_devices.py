"""Tests of --use_fp16: the precision that it chooses, and how close the results are."""

import os
from unittest import mock

import numpy as np
import pytest

import cifar10
from support import devices
from support.compat import tf
from tests import reference


def test_half_precision_depends_on_hardware(monkeypatch):
    bfloat16 = 'bfloat16' if tf.__version__.startswith('2.') else None  # 1.15 has none for CPUs.
    for use_fp16, gpu, cpu, expected in [
        (False, (8, 0), 'avx512_bf16', None),
        (True, (8, 0), 'avx512_bf16', 'float16'),
        (True, (7, 0), 'avx2', 'float16'),
        (True, (6, 1), 'avx2', None),
        (True, (6, 1), 'amx_bf16', bfloat16),
        (True, (0, 0), 'avx512_bf16', bfloat16),
        (True, (0, 0), 'avx512f', None),
    ]:

        def is_gpu_available(cuda_only, min_cuda_compute_capability, capability=gpu):
            return capability >= min_cuda_compute_capability

        cpuinfo = mock.mock_open(read_data=f'flags\t\t: fpu {cpu} sse2\n')
        monkeypatch.setattr(tf.test, 'is_gpu_available', is_gpu_available)
        monkeypatch.setattr(os.path, 'exists', lambda path: path == '/proc/cpuinfo')
        monkeypatch.setattr(devices, 'open', cpuinfo, raising=False)
        assert devices.half_precision(use_fp16) == expected, (use_fp16, gpu, cpu)


def test_bfloat16_logits_are_close_to_float32():
    if devices.half_precision(use_fp16=True) != 'bfloat16':
        pytest.skip('no bfloat16 on this machine or in this TensorFlow')
    images = reference.standardize(reference.random_images(16, size=24)).astype(np.float32)
    logits = cifar10.inference(images)
    results = []
    for use_fp16 in False, True:
        with tf.Session(config=devices.session_config(use_fp16)) as session:
            for variable in tf.trainable_variables():
                variable.load(reference.random_variables()[variable.op.name], session)
            results.append(session.run(logits))
    # A bfloat16 has 8 significant bits.
    error = abs(results[1] - results[0]).max() / abs(results[0]).max()
    assert 1e-5 < error < 0.03
