"""On a GPU: attention kernels and the fused loss against fp32 and fp64, and the training entry over NCCL."""

from __future__ import annotations

import pytest
import torch

from megatron_rpsd.attention import KERNELS
from megatron_rpsd.planning import gpu_attention, gpu_loss, gpu_training

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", gpu_attention.GPU_SIZES.exact, ids=lambda shape: shape.name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_is_off_by_at_most_twice_torchs_own_error(kernel, shape):
    reason = gpu_attention.kernel_missing(kernel, "cuda")
    if reason is not None:
        pytest.skip(reason)
    ours, torchs = gpu_attention.kernel_errors(gpu_attention.kernel_for(kernel, shape), shape, "cuda")
    for name, error in ours.items():
        assert error <= gpu_attention.allowed_error(torchs[name]), (name, error, torchs[name])


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_query_sees_a_later_key(kernel):
    reason = gpu_attention.kernel_missing(kernel, "cuda")
    if reason is not None:
        pytest.skip(reason)
    for shape in (gpu_attention.Shape(2048, 2048, 8, 2, 128), gpu_attention.Shape(1024, 2048, 8, 2, 64)):
        change, _ = gpu_attention.sees_ahead(gpu_attention.kernel_for(kernel, shape), shape, "cuda")
        assert change == 0.0, shape.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_loss_equals_its_definition(dtype):
    ours, torchs = gpu_loss.loss_errors(gpu_loss.GPU_SIZES.small, "cuda", dtype)
    for name, error in ours.items():
        assert error <= gpu_loss.allowed_loss_error(name, torchs[name], dtype), (name, error, torchs[name])


def test_the_training_entry_trains_resumes_and_exports():
    rows = list(gpu_training.training_rows("cuda", gpu_training.GPU_SIZES))
    assert rows and all(row.verdict == "good" for row in rows), [row for row in rows if row.verdict != "good"]
