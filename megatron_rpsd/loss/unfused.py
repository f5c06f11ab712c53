"""The same sums as `fused_linear`, from whole logits: readable, and large. The oracle that runs inside a training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rpsd.loss.fused_linear import LinearLoss, whole_readings
from megatron_rpsd.loss.vocab_parallel import vocab_parallel_cross_entropy, vocab_parallel_reverse_kl
from megatron_rpsd.parallel import VocabularyShard


def unfused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    clm_weights: Tensor,
    shard: VocabularyShard,
    *,
    split_readings: Callable[[Tensor], tuple[Tensor, Tensor]] = whole_readings,
    view_weights: Tensor | None = None,
    reweigh: Callable[[Tensor, slice], Tensor] | None = None,
    logit_scale: float = 1.0,
) -> LinearLoss:
    """CLM and the view pair's reverse KL; arguments and results as `fused_linear_loss`, logits [n + m, v/tp] kept."""
    standard, perturbed = split_readings(hidden)
    logits = torch.nn.functional.linear(torch.cat([standard, perturbed]), weight)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    seen, again = logits.split([len(standard), len(perturbed)])
    clm = vocab_parallel_cross_entropy(seen, labels, shard)
    if reweigh is not None:
        clm_weights = clm_weights * reweigh(clm.detach(), slice(None))
    total = (clm * clm_weights).sum()
    view = clm.new_empty(0)
    if len(perturbed):
        view = vocab_parallel_reverse_kl(again, seen.detach()[len(standard) - len(perturbed) :], shard)
        total = total + (view * view_weights).sum()
    return LinearLoss(total, clm.detach(), view.detach(), clm.new_empty(0))
