"""Divergences against a teacher cut to its K likeliest tokens.

Both distributions are looked at through the same K + 1 outcomes: the teacher's K likeliest tokens, each by itself, and
all other tokens together. Merging outcomes never increases a divergence, so this is a lower bound of the whole one
that is 0 where the readings agree, and K = v - 1 is the whole one. (Megatron's cached distillation calls the
(K + 1)-th outcome its ghost token.)

With f the divergence as a function of log p and log q over outcomes and u_i = p_i df/dp_i,

    df/dz_v = u_v - p_v U                        for a token v among the K,       U = sum of all K + 1 u_i
    df/dz_v = p_v (u_rest / p_rest - U)          for any other

Each rank offers its own K likeliest: teacher logit, student logit and token id, 3 K floats a token in the chunk's one
exchange; every rank picks the group's K from them. What the others weigh is added up from the others themselves, in
logarithms: 1 - sum of K would lose a confident token's rest to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpsd.loss.divergences import Divergence
from megatron_rpsd.loss.readings import Normaliser, Reading
from megatron_rpsd.parallel import VocabularyShard

_NO_TOKEN = -1.0


class TopKPair:
    """A chunk's student and teacher over the teacher's K likeliest tokens and the rest; used like `DensePair`."""

    def __init__(self, student: Reading, teacher: Reading, settings: Divergence, memory: Tensor) -> None:
        self.student, self.settings, self.memory = student, settings, memory
        held = min(settings.top_k, teacher.centred.shape[-1])
        values, self.columns = teacher.centred.topk(held, dim=-1)  # [c, held]
        picked = student.centred.gather(-1, self.columns)
        missing = (0, settings.top_k - held)  # a shard may hold fewer columns
        offered_teacher, offered_student = (
            torch.nn.functional.pad(part / settings.temperature, missing, value=-torch.inf) for part in (values, picked)
        )
        columns = self.columns.to(values.dtype)  # exact up to 2^24 columns
        columns = torch.nn.functional.pad(columns, missing, value=_NO_TOKEN)
        self.offers = torch.cat([offered_teacher, offered_student, columns], dim=-1)  # [c, 3 K]
        self.rest = [self._log_rest(reading) for reading in (student, teacher)]

    def _log_rest(self, reading: Reading) -> Tensor:
        """log sum e^((z - m_r) / T) [c] over this rank's columns that are not offered; -inf if there are none.

        From logits, not from their exponentials: those of a confident token's rest are all 0.
        """
        rest = torch.div(reading.centred, self.settings.temperature, out=self.memory)
        return log_sum(rest.scatter_(-1, self.columns, -torch.inf))

    def statistics(self) -> list[Tensor]:
        """What is not offered (student, teacher) [c], then teacher, student and column of each offer."""
        return [*self.rest, *self.offers.unbind(dim=-1)]

    def value(self, gathered: Tensor, p: Normaliser, q: Normaliser, shard: VocabularyShard) -> Tensor:
        """The divergence of every token [c], from all ranks' statistics [ranks, k, c] and both normalisers."""
        k = self.settings.top_k
        offers = gathered[:, 2:].unflatten(1, (3, k)).permute(1, 3, 0, 2)  # [3, c, ranks, K]
        p_shift, q_shift = ((n.offsets - n.log_sum).T for n in (p, q))  # [c, ranks]
        log_q = (offers[0] + q_shift.unsqueeze(-1)).flatten(1)
        log_p = (offers[1] + p_shift.unsqueeze(-1)).flatten(1)
        ranks = torch.arange(offers.shape[2], device=offers.device).view(1, -1, 1).expand(offers.shape[1:]).flatten(1)
        order = log_q.argsort(dim=-1, descending=True, stable=True)  # the same choice on every rank
        chosen, left = order[:, :k], order[:, k:]
        rest = (gathered[:, 0].T + p_shift, gathered[:, 1].T + q_shift)  # [c, ranks]
        log_p, log_q = (
            torch.cat(
                [logs.gather(-1, chosen), torch.cat([logs.gather(-1, left), others], -1).logsumexp(-1, keepdim=True)],
                -1,
            )
            for logs, others in ((log_p, rest[0]), (log_q, rest[1]))
        )  # [c, K + 1]
        columns = offers[2].flatten(1).gather(-1, chosen)
        self.mine = (ranks.gather(-1, chosen) == p.rank) & (columns >= 0)
        self.chosen_columns = torch.where(self.mine, columns, 0).to(torch.int64)
        self.p = p
        values, self.slopes = values_and_slopes(self.settings.direction, log_p, log_q)
        self.p_rest = log_p[:, -1].exp()
        return self.settings.temperature**2 * values

    def gradient(self, weights: Tensor) -> Tensor:
        """weights x d value / d student logits [c, columns], in the memory given at construction; weights [c]."""
        temperature = self.settings.temperature
        if not self.memory.shape[-1]:
            return self.memory
        weights = weights * temperature
        total = self.slopes.sum(dim=-1)
        rest = torch.where(self.p_rest > 0, self.slopes[:, -1] / self.p_rest, 0.0)
        p = self.student.exponentials[temperature]
        torch.mul(p, (weights * self.p.scale * (rest - total)).unsqueeze(-1), out=self.memory)
        # The K themselves: u - p U instead of p (u_rest / p_rest - U).
        chosen_p = p.gather(-1, self.chosen_columns) * self.p.scale.unsqueeze(-1)
        difference = self.slopes[:, :-1] - chosen_p * rest.unsqueeze(-1)
        difference = torch.where(self.mine, difference * weights.unsqueeze(-1), 0.0)
        return self.memory.scatter_add_(-1, self.chosen_columns, difference)


def log_sum(logits: Tensor) -> Tensor:
    """log sum_v e^z [c] of `logits` [c, columns], which it overwrites; -inf where there is none that counts."""
    if not logits.shape[-1]:
        return logits.new_full(logits.shape[:-1], -torch.inf)
    largest = logits.amax(dim=-1)
    largest = torch.where(largest.isinf(), 0, largest)
    return logits.sub_(largest.unsqueeze(-1)).exp_().sum(dim=-1).log() + largest


def values_and_slopes(direction: str, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence [c] and u = p df/dp [c, K + 1] (up to p times a constant, which the gradient does not see)."""
    p, q = log_p.exp(), log_q.exp()
    # Outcomes that one side rules out count by their limits: 0 log 0 = 0.
    ratio = torch.where(log_p == log_q, 0.0, log_p - log_q)
    if direction == "reverse-kl":
        terms = torch.where(p > 0, p * ratio, 0.0)
        return terms.sum(dim=-1), terms
    if direction == "forward-kl":
        return torch.where(q > 0, -q * ratio, 0.0).sum(dim=-1), p - q
    log_2 = log_p.new_tensor(2.0).log()
    from_p = torch.where(p > 0, p * (torch.nn.functional.logsigmoid(ratio) + log_2), 0.0)
    from_q = torch.where(q > 0, q * (torch.nn.functional.logsigmoid(-ratio) + log_2), 0.0)
    return 0.5 * (from_p + from_q).sum(dim=-1), 0.5 * from_p
