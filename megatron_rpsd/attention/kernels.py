"""Attention kernels: plain causal attention of a block of queries that ends where its keys end.

A dense mask makes a rectangular CPU kernel pay for keys that it may not see. So the keys are cut where the queries
begin: those before are seen by every query, without a mask, and the rest is a causal square. With o, l the output and
the log-sum-exp of the scores of either part, softmax over both is

    l = log(e^l1 + e^l2),   o = o1 e^(l1 - l) + o2 e^(l2 - l)

and, since a flash kernel's backward rebuilds the probabilities as e^(score - l), running it on each part with the
*merged* o and l gives that part's exact gradients; the query's is their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class FlashKernel:
    """A flash kernel over [b, heads, s, d] whose backward can be given another output and log-sum-exp than its own.

    Attributes:
        forward: (query, key, value, causal, scale) -> output [b, n, sq, d], log-sum-exp of the scores in nats, fp32
            [b, n, sq], and what its backward asks for beside them, as a tuple.
        backward: (gradient, query, key, value, output, log-sum-exp, causal, scale, that tuple) -> three gradients.
    """

    forward: Callable
    backward: Callable


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float):
    return *_flash(query, key, value, 0.0, causal, scale=scale), ()


def _cpu_backward(grad, query, key, value, output, log_sum, causal, scale, rest):
    return _flash_backward(grad, query, key, value, output, log_sum, 0.0, causal, scale=scale)


_CPU = FlashKernel(_cpu_forward, _cpu_backward)


class PrefixAndSquare(torch.autograd.Function):
    """Rectangular causal attention out of a kernel's unmasked and its square causal form; tensors [b, heads, s, d].

    Fewer key heads than query heads are the kernel's own matter.
    """

    @staticmethod
    def forward(ctx, kernel: FlashKernel, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        before = key.shape[2] - query.shape[2]
        seen, seen_sum, seen_rest = kernel.forward(query, key[:, :, :before], value[:, :, :before], False, scale)
        own, own_sum, own_rest = kernel.forward(query, key[:, :, before:], value[:, :, before:], True, scale)
        log_sum = torch.logaddexp(seen_sum, own_sum)
        weigh_seen, weigh_own = ((part - log_sum).exp().unsqueeze(-1) for part in (seen_sum, own_sum))
        output = (seen * weigh_seen + own * weigh_own).to(query.dtype)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.kernel, ctx.scale, ctx.rests = kernel, scale, (seen_rest, own_rest)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, output, log_sum = ctx.saved_tensors
        before = key.shape[2] - query.shape[2]
        parts = []
        for keys, causal, rest in zip(
            (slice(None, before), slice(before, None)), (False, True), ctx.rests, strict=True
        ):
            seen = key[:, :, keys], value[:, :, keys]
            parts.append(ctx.kernel.backward(grad, query, *seen, output, log_sum, causal, ctx.scale, rest))
        (query_seen, key_seen, value_seen), (query_own, key_own, value_own) = parts
        key_grad, value_grad = torch.cat([key_seen, key_own], dim=2), torch.cat([value_seen, value_own], dim=2)
        return None, query_seen + query_own, key_grad, value_grad, None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax attention with the bottom-right causal mask: query i of sq sees keys j <= i + sk - sq.

        sq = 2, sk = 5      1 1 1 1 .
                            1 1 1 1 1

    Args:
        query: [sq, b, n, d].
        key, value: [sk, b, g, d] with sk >= sq and n a multiple of g (grouped-query attention).
        scale: factor on the scores.

    Returns:
        [sq, b, n, d] in the query's dtype.
    """
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, s, d]
    square = query.shape[2] == key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda:
        mask = None if square else causal_lower_right(query.shape[2], key.shape[2])
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=grouped
        )
        return context.permute(2, 0, 1, 3)
    if grouped:
        # The CPU's flash kernel takes equal head counts; its fallback for grouped heads builds the whole score matrix.
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    if square:
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    else:
        context = PrefixAndSquare.apply(_CPU, query, key, value, scale)
    return context.permute(2, 0, 1, 3)
