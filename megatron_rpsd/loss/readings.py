"""A chunk of logits on one tensor-parallel rank, and what all ranks know of it after one small exchange.

Notation, for a token and rank r, with z the logits of r's real columns and a temperature T (1 for CLM):

    m_r = max_v z,   A_r = sum_v e^((z - m_r) / T)            this rank's
    m   = max_r m_r, S   = sum_r A_r e^((m_r - m) / T)        the group's
    log p_v = (z_v - m_r) / T + (m_r - m) / T - log S

Everything is taken relative to maxima: log-sum-exp itself, in fp32, would be rounded at the size of the largest logit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpsd.parallel import VocabularyShard, group_rank, group_size

# The maximum of a rank that holds padding only: it contributes e^(this - m) = 0; -inf would turn 0 x inf into nan.
LOWEST = -1e30
# Reductions of products go over this many columns at a time, so that the product is never whole.
BLOCK = 8192


def gather_statistics(statistics: Tensor, shard: VocabularyShard) -> Tensor:
    """All ranks' statistics [ranks, k, ...] from this rank's [k, ...]: the one collective of a chunk."""
    ranks = group_size(shard.group)
    if ranks == 1:
        return statistics.unsqueeze(0)
    gathered = statistics.new_empty((ranks * statistics.shape[0], *statistics.shape[1:]))
    if statistics.numel():  # every rank of the group holds the same tokens, so all skip an empty exchange together
        dist.all_gather_into_tensor(gathered, statistics.contiguous(), group=shard.group)
    return gathered.view(ranks, *statistics.shape)


class Reading:
    """One reading's logits of a chunk, relative to this rank's maxima.

    Attributes:
        maxima: m_r [c].
        centred: z - m_r [c, columns], until `exponentiate` overwrites it.
        exponentials: e^((z - m_r) / T) [c, columns] by temperature.
    """

    def __init__(self, logits: Tensor) -> None:
        """Takes `logits` [c, columns] in fp32 or fp64 over as its own memory."""
        self.maxima = logits.amax(dim=-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], LOWEST)
        self.centred: Tensor | None = logits.sub_(self.maxima.unsqueeze(-1))
        self.exponentials: dict[float, Tensor] = {}

    def exponentiate(self, temperatures: Iterable[float], spare: Iterable[Tensor] = ()) -> None:
        """Form the exponentials of every temperature, the last in place of the logits, others in `spare` memory."""
        *others, last = temperatures
        for temperature, out in zip(others, spare, strict=True):
            self.exponentials[temperature] = torch.div(self.centred, temperature, out=out).exp_()
        if last != 1.0:
            self.centred.div_(last)
        self.exponentials[last], self.centred = self.centred.exp_(), None


@dataclass(frozen=True)
class Normaliser:
    """What turns a reading's exponentials into probabilities, the same numbers on every rank.

    Attributes:
        offsets: (m_r - m) / T of every rank [ranks, c].
        sums: A_r of every rank [ranks, c].
        log_sum: log S [c].
        rank: this rank in the group.
    """

    offsets: Tensor
    sums: Tensor
    log_sum: Tensor
    rank: int

    @classmethod
    def of(cls, maxima: Tensor, sums: Tensor, temperature: float, shard: VocabularyShard) -> Normaliser:
        """From all ranks' m_r and A_r, [ranks, c] each."""
        offsets = (maxima - maxima.amax(dim=0)) / temperature
        return cls(offsets, sums, (offsets.exp() * sums).sum(dim=0).log(), group_rank(shard.group))

    @property
    def offset(self) -> Tensor:
        """(m_r - m) / T of this rank [c]."""
        return self.offsets[self.rank]

    @property
    def scale(self) -> Tensor:
        """p = exponentials x scale [c], on this rank."""
        return (self.offset - self.log_sum).exp()

    @property
    def shares(self) -> Tensor:
        """e^((m_r - m) / T) / S of every rank [ranks, c]: what a rank's sum over exponentials counts as probability."""
        return self.offsets.exp() / (self.offsets.exp() * self.sums).sum(dim=0)


def sum_of_products(first: Tensor, second: Tensor) -> Tensor:
    """sum_v first x second [c] of two [c, columns], without a third of their size."""
    blocks = zip(first.split(BLOCK, dim=-1), second.split(BLOCK, dim=-1), strict=True)
    return torch.stack([(a * b).sum(dim=-1) for a, b in blocks], dim=-1).sum(dim=-1)
