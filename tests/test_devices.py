"""Tests of --use_fp16: the precision that it chooses, and how close the results are."""

from unittest import mock

import pytest

import cifar10
from support import devices
from support.compat import tf
from tests import reference

BFLOAT16 = 'bfloat16' if tf.__version__.startswith('2.') else None  # 1.15 has none for CPUs.


@pytest.mark.parametrize(
    'gpu, cpu, expected',
    [((7, 0), 'avx512_bf16', 'float16'), ((6, 1), 'amx_bf16', BFLOAT16), ((0, 0), 'avx2', None)],
)
def test_half_precision_depends_on_hardware(monkeypatch, gpu, cpu, expected):
    def is_gpu_available(cuda_only, min_cuda_compute_capability):
        return gpu >= min_cuda_compute_capability

    monkeypatch.setattr(tf.test, 'is_gpu_available', is_gpu_available)
    cpuinfo = mock.mock_open(read_data=f'flags\t\t: fpu {cpu} sse2\n')
    monkeypatch.setattr(devices, 'open', cpuinfo, raising=False)
    assert [devices.half_precision(use_fp16) for use_fp16 in (True, False)] == [expected, None]


def test_bfloat16_logits_are_close_to_float32():
    if devices.half_precision(use_fp16=True) != 'bfloat16':
        pytest.skip('no bfloat16 on this machine or in this TensorFlow')
    logits = cifar10.inference(reference.standardize(reference.random_images(16, size=24)))
    results = []
    for use_fp16 in False, True:
        with tf.Session(config=devices.session_config(use_fp16)) as session:
            for variable in tf.trainable_variables():
                variable.load(reference.random_variables()[variable.op.name], session)
            results.append(session.run(logits))
    error = abs(results[1] - results[0]).max() / abs(results[0]).max()
    assert 1e-5 < error < 0.03  # A bfloat16 has 8 significant bits.
