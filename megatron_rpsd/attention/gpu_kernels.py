"""Causal kernels of a GPU in the place of `causal_attention`: the flash-attn package, and cuDNN through torch.

Neither has run on a GPU yet. Their calls were written against the packages' sources; on a machine without a GPU only
shapes and the merging of prefix and square are checked. `tests/gpu/test_attention_kernels.py` compares them with fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_rpsd.attention.kernels import FlashKernel, PrefixAndSquare


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As `causal_attention`, by flash-attn (bf16 or fp16): its causal mask is bottom-right aligned since 2.1."""
    from flash_attn import flash_attn_func

    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))  # [b, s, heads, d]
    return flash_attn_func(query, key, value, softmax_scale=scale, causal=True).transpose(0, 1)


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float):
    output, log_sum, *_, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return output, log_sum.squeeze(-1), (seed, offset)  # cuDNN keeps the log-sum-exp as [b, n, sq, 1]


def _cudnn_backward(grad, query, key, value, output, log_sum, causal, scale, rest):
    # Neither bias nor ragged batch: None where torch's own call hands over undefined tensors.
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, output, log_sum.unsqueeze(-1), *rest, None, None, None, query.shape[2], key.shape[2],
        0.0, causal, scale=scale,
    )  # fmt: skip


CUDNN = FlashKernel(_cudnn_forward, _cudnn_backward)


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As `causal_attention`, by cuDNN alone (bf16 or fp16). torch's cuDNN call masks squares from the top left, so a
    rectangle is its prefix and its square, merged (`kernels`).
    """
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, s, d]
    if query.shape[2] != key.shape[2]:
        return PrefixAndSquare.apply(CUDNN, query, key, value, scale).permute(2, 0, 1, 3)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    return context.permute(2, 0, 1, 3)
