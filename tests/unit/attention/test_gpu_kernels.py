"""What a machine without a GPU can say of its kernels: shapes by torch's own rules, and the arguments of the calls."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from megatron_rpsd.attention import BLOCK_KERNELS, KERNELS, causal_attention
from megatron_rpsd.attention.gpu_kernels import CUDNN, cudnn_attention, flash_attention
from megatron_rpsd.attention.kernels import FlashKernel, PrefixAndSquare
from tests.unit.attention.test_kernels import bottom_right, random_inputs, written_out


def test_every_kernel_has_a_name():
    assert BLOCK_KERNELS["sdpa"] is causal_attention and set(KERNELS) == {*BLOCK_KERNELS, "te"}


def grouped_forward(query, key, value, causal, scale):
    """A kernel in fp64 that takes grouped heads, as cuDNN does, and hands its backward two more tensors."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = scale * query @ key.mT
    if causal:
        scores = scores.masked_fill(~bottom_right(*scores.shape[-2:]), float("-inf"))
    rest = torch.tensor(int(causal)), torch.tensor(2)
    return scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1), rest


def grouped_backward(grad, query, key, value, output, log_sum, causal, scale, rest):
    """The flash backward: probabilities from the log-sum-exp that it is given, not from its own scores' sum."""
    assert [int(tensor) for tensor in rest] == [int(causal), 2]
    share = query.shape[1] // key.shape[1]
    keys, values = (tensor.repeat_interleave(share, dim=1) for tensor in (key, value))
    scores = scale * query @ keys.mT
    if causal:
        scores = scores.masked_fill(~bottom_right(*scores.shape[-2:]), float("-inf"))
    weights = (scores - log_sum.unsqueeze(-1)).exp()
    slope = weights * (grad @ values.mT - (grad * output).sum(dim=-1, keepdim=True))
    both = scale * slope.mT @ query, weights.mT @ grad
    return scale * slope @ keys, *(tensor.unflatten(1, (-1, share)).sum(dim=2) for tensor in both)


@pytest.mark.parametrize(("sq", "sk"), [(2, 5), (1, 7), (16, 33)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_prefix_and_square_merge_for_any_kernel_of_that_form(sq, sk, heads, groups):
    inputs = random_inputs(sq, sk, heads, groups)
    copies = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    kernel = FlashKernel(grouped_forward, grouped_backward)
    ours = PrefixAndSquare.apply(kernel, *(tensor.permute(1, 2, 0, 3) for tensor in inputs), 0.3).permute(2, 0, 1, 3)
    expected = written_out(*copies, bottom_right(sq, sk), scale=0.3)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view(ours.shape)
    ours.backward(upstream)
    expected.backward(upstream)
    for tensor, copy in zip(inputs, copies, strict=True):
        torch.testing.assert_close(tensor.grad, copy.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sk", [8, 24])
def test_cudnns_calls_have_the_shapes_that_torch_gives_them(sk):
    """On the meta device, where torch checks a call and computes nothing."""
    inputs = [torch.empty(size, 2, heads, 16, dtype=torch.bfloat16, device="meta") for size, heads in
              ((8, 4), (sk, 2), (sk, 2))]  # fmt: skip
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in inputs)
    output, log_sum, rest = CUDNN.forward(query, key, value, sk == 8, 0.3)
    assert output.shape == query.shape and log_sum.shape == query.shape[:3] and log_sum.dtype == torch.float32
    grads = CUDNN.backward(output, query, key, value, output, log_sum, sk == 8, 0.3, rest)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]
    if sk > 8:
        leaves = [tensor.requires_grad_() for tensor in inputs]
        result = cudnn_attention(*leaves, 0.3)
        result.sum().backward()
        assert result.shape == (8, 2, 4, 16) and all(leaf.grad.shape == leaf.shape for leaf in leaves)


def test_flash_attn_is_asked_for_causal_attention_with_batch_first(monkeypatch):
    asked = []

    def flash_attn_func(q, k, v, *, softmax_scale, causal):
        asked.append((tuple(q.shape), tuple(k.shape), causal))
        assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
        context = causal_attention(*(tensor.transpose(0, 1) for tensor in (q, k, v)), softmax_scale)
        return context.transpose(0, 1)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    inputs = random_inputs(3, 7, 4, 2)
    torch.testing.assert_close(flash_attention(*inputs, 0.3), causal_attention(*inputs, 0.3), rtol=0, atol=0)
    assert asked == [((2, 3, 4, 8), (2, 7, 2, 8), True)]
