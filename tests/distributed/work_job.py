"""What a step multiplies, counted by torch as it happens, beside what the forward step says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tests.distributed import jobs

_ATEN = torch.ops.aten


@dataclass
class Counted:
    """Of one step.

    Attributes:
        said: the forward step's own count.
        products: torch's count of matrix products outside of attention.
        attention: torch's count of attention, which takes every kernel's square in full and a flash kernel's backward
            as five products.
        kernels: (queries, keys, causal, backward) of every call of an attention kernel, a head and row at a time.
        head_dim: d.
    """

    said: int = 0
    products: int = 0
    attention: int = 0
    kernels: list[tuple[int, int, bool, bool]] = field(default_factory=list)
    head_dim: int = 0


def count(hf: Path, flags: list[str], sample: dict, views: list | None, suffix_start: int = 0) -> Counted:
    """A forward and backward pass through Megatron's schedule, under torch's counter."""
    counted = Counted()

    def forward(query, key, value, dropout_p=0.0, is_causal=False, **_) -> int:
        return _attended(counted, query, key, is_causal, sdpa_flop_count(query.shape, key.shape, value.shape))

    def backward(grad, query, key, value, output, log_sum, dropout_p, is_causal, **_) -> int:
        flops = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
        return _attended(counted, query, key, is_causal, flops, backward=True)

    def added(total, left, right, **_) -> int:
        return 2 * left.shape[0] * left.shape[1] * right.shape[1]

    def raw(formula):
        formula._get_raw = True
        return formula

    def without_output(formula):
        return raw(lambda *given, out_val=None, **named: formula(*given, **named))

    mapping = {
        _ATEN.addmm_: without_output(added),  # the fused loss adds in place, which torch's table leaves out
        _ATEN._scaled_dot_product_flash_attention_for_cpu: without_output(forward),
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: without_output(backward),
    }
    from megatron_rpsd.training.forward_step import ForwardStep

    flops = ForwardStep.flops

    def remembered(step, batch, sample) -> int:
        counted.said += flops(step, batch, sample)
        return flops(step, batch, sample)

    ForwardStep.flops = remembered
    try:
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            jobs.step(hf, flags, sample, views, len(sample["tokens"]), suffix_start)
    finally:
        ForwardStep.flops = flops
    totals = counter.get_flop_counts()["Global"]
    counted.attention = sum(value for name, value in totals.items() if "scaled_dot_product" in str(name))
    counted.products = sum(totals.values()) - counted.attention
    return counted


def _attended(counted: Counted, query, key, causal: bool, flops: int, backward: bool = False) -> int:
    rows_and_heads = query.shape[0] * query.shape[1]
    counted.head_dim = query.shape[3]
    counted.kernels += [(query.shape[2], key.shape[2], causal, backward)] * rows_and_heads
    return flops


def count_all(hf: Path, cases: list[tuple]) -> list[Counted]:
    """`count` of each case, one after the other in this process."""
    found = []
    for case in cases:
        if not dist.is_initialized():  # the session before ended it
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        found.append(count(hf, *case))
    return found
