"""A teacher of which only the K likeliest tokens of each position are known: read once, kept, and compared with later.

`likeliest_tokens` reads a teacher's hidden states into log-probabilities of its K likeliest tokens and of all others
together; `KnownTopK` hands them to the fused loss in the place of the teacher itself. The divergence is that of
`top_k`: the same K + 1 outcomes, so that a teacher that was kept gives the loss and the gradient of one that is there.

The K tokens of a position lie on any ranks, so a rank offers the student's logits of those that it holds, and all ranks
find each token's on the one that holds it: K + 1 floats a token in the chunk's exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpsd.loss.chunks import DEFAULT_CHUNK_BYTES
from megatron_rpsd.loss.divergences import Divergence
from megatron_rpsd.loss.readings import Normaliser, Reading, gather_statistics
from megatron_rpsd.loss.top_k import TopKPair, log_sum, values_and_slopes
from megatron_rpsd.parallel import VocabularyShard


@dataclass(frozen=True)
class KnownTopK:
    """What is known of a teacher's reading of the standard view's tokens.

    Attributes:
        log_probs: [n, K], of its likeliest tokens, at the divergence's temperature.
        tokens: int64 [n, K], their ids in the whole vocabulary, all different.
        log_rest: [n], log of the probability of all other tokens together; -inf where there are none.
        divergence: taken of the student from it; its top_k is K.
        weights: per token [n].
    """

    log_probs: Tensor
    tokens: Tensor
    log_rest: Tensor
    divergence: Divergence
    weights: Tensor


class KnownTopKPair(TopKPair):
    """A chunk's student and what is known of its teacher."""

    def __init__(
        self, student: Reading, teacher: KnownTopK, rows: slice, shard: VocabularyShard, memory: Tensor
    ) -> None:
        """`rows`: the chunk's tokens among the teacher's; else as `TopKPair`."""
        self.student, self.settings, self.memory = student, teacher.divergence, memory
        assert self.settings.top_k == teacher.tokens.shape[-1]
        kind = student.maxima.dtype
        self.log_q = torch.cat([teacher.log_probs[rows], teacher.log_rest[rows].unsqueeze(-1)], dim=-1).to(kind)
        tokens = teacher.tokens[rows]
        self.mine = (tokens >= shard.vocab_start) & (tokens < shard.vocab_start + shard.columns)
        self.chosen_columns = torch.where(self.mine, tokens - shard.vocab_start, 0)
        rest = torch.div(student.centred, self.settings.temperature, out=memory)
        self.offers = torch.full_like(tokens, -torch.inf, dtype=kind)
        if shard.columns:
            self.offers = torch.where(self.mine, rest.gather(-1, self.chosen_columns), self.offers)
            # Added, not written: a token of another rank points to column 0, which may be one of the K itself.
            rest.scatter_add_(-1, self.chosen_columns, torch.where(self.mine, -torch.inf, 0.0).to(kind))
        self.rest = log_sum(rest)

    def statistics(self) -> list[Tensor]:
        """The student's others [c], then its logit of each of the K, -inf where another rank holds it."""
        return [self.rest, *self.offers.unbind(dim=-1)]

    def value(self, gathered: Tensor, p: Normaliser, q: None, shard: VocabularyShard) -> Tensor:
        """The divergence of every token [c], from all ranks' statistics [ranks, K + 1, c]."""
        shift = (p.offsets - p.log_sum).T  # [c, ranks]
        log_p = gathered.permute(2, 1, 0) + shift.unsqueeze(1)  # [c, K + 1, ranks]
        log_p = torch.cat([log_p[:, 1:].amax(dim=-1), log_p[:, :1].logsumexp(dim=-1)], dim=-1)
        self.p, self.p_rest = p, log_p[:, -1].exp()
        values, self.slopes = values_and_slopes(self.settings.direction, log_p, self.log_q)
        return self.settings.temperature**2 * values


def likeliest_tokens(
    hidden: Tensor,
    weight: Tensor,
    shard: VocabularyShard,
    divergence: Divergence,
    logit_scale: float = 1.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES["cpu"],
) -> tuple[Tensor, Tensor, Tensor]:
    """A teacher's K likeliest tokens of every position, the same on every rank of the shard's group.

    Args:
        hidden: [n, h'], the teacher's final hidden states.
        weight: [v/tp, h'], this rank's rows of its output layer.
        divergence: for its top_k K and its temperature.
        logit_scale: multiplies the logits.
        chunk_bytes: memory for a chunk's logits, at least one token's.

    Returns:
        `log_probs` [n, K], `tokens` [n, K] and `log_rest` [n] of `KnownTopK`, fp32 (fp64 for fp64 hidden states).
    """
    assert divergence.top_k is not None
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    width = shard.vocab_stop - shard.vocab_start
    rows = max(1, chunk_bytes // (3 * width * kind.itemsize))
    weight = weight[: shard.columns]
    parts = []
    for chunk in hidden.split(rows):
        reading = Reading((chunk @ weight.T).to(kind).mul_(logit_scale))
        parts.append(_likeliest(reading, shard, width, divergence.top_k, divergence.temperature))
    log_probs, tokens, log_rest = (torch.cat(each) for each in zip(*parts, strict=True))
    return log_probs, tokens, log_rest


def _likeliest(
    reading: Reading, shard: VocabularyShard, width: int, k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one chunk: each rank offers its own K, and every rank picks the group's from them."""
    values, columns = reading.centred.topk(min(k, shard.columns), dim=-1)
    missing = (0, k - values.shape[-1])
    offers = torch.nn.functional.pad(values / temperature, missing, value=-torch.inf)
    columns_offered = torch.nn.functional.pad(columns.to(values.dtype), missing)  # exact up to 2^24 columns
    rest = log_sum((reading.centred / temperature).scatter_(-1, columns, -torch.inf))
    reading.exponentiate((temperature,))
    sums = reading.exponentials[temperature].sum(dim=-1)
    sent = [reading.maxima, sums, rest, *offers.unbind(dim=-1), *columns_offered.unbind(dim=-1)]
    gathered = gather_statistics(torch.stack(sent), shard)  # [ranks, 3 + 2 K, c]
    normaliser = Normaliser.of(gathered[:, 0], gathered[:, 1], temperature, shard)
    shift = (normaliser.offsets - normaliser.log_sum).T  # [c, ranks]
    log_q = (gathered[:, 3 : 3 + k].permute(2, 0, 1) + shift.unsqueeze(-1)).flatten(1)  # [c, ranks x K]
    first = torch.arange(len(gathered), device=log_q.device).view(1, -1, 1) * width
    tokens = (gathered[:, 3 + k :].permute(2, 0, 1).to(torch.int64) + first).flatten(1)
    order = log_q.argsort(dim=-1, descending=True, stable=True)
    chosen, left = order[:, :k], order[:, k:]
    others = torch.cat([log_q.gather(-1, left), gathered[:, 2].T + shift], dim=-1)
    return log_q.gather(-1, chosen), tokens.gather(-1, chosen), others.logsumexp(dim=-1)


__all__ = ["KnownTopK", "KnownTopKPair", "likeliest_tokens"]
