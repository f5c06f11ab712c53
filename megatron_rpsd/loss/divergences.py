"""Divergences between a student's and a teacher's reading of the same tokens, over vocabulary shards.

p is the student's distribution at temperature T, q the teacher's, to which no gradient flows. z and t are their
logits relative to their rank's maxima, m_r and n_r those maxima (m and n the group's), S and R the group's sums of
exponentials (`readings`). With d = (z - t) / T on rank r and its shift c_r = ((m_r - m) - (n_r - n)) / T,

    log p - log q = d + c_r - log S + log R

    reverse KL  KL(p || q) = sum p (log p - log q)       needs  B_r = sum_v e^(z / T) d
    forward KL  KL(q || p) = sum q (log q - log p)       needs  B_r = sum_v e^(t / T) d
    JSD         (KL(p || u) + KL(q || u)) / 2,  u = (p + q) / 2

Both KLs are linear in the normalisers' logarithms, so that B_r travels with the maxima and sums in one exchange: with
w_r = e^((m_r - m) / T) / S, sum p (d + c) = sum_r w_r (B_r + A_r c_r). The JSD is not linear in them: it takes a second
exchange of two floats per token.

Values are multiplied by T^2, so that gradients keep their size as T grows (Hinton et al., arXiv 1503.02531). Gradients
by the student's logits, T^2 included, with the group's own value of the token (a rank's would be wrong):

    reverse KL  T p ((log p - log q) - KL)       forward KL  T (p - q)       JSD  T/2 p (log(p / u) - KL(p || u))

Where the two readings are equal bitwise, every value and every gradient is exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpsd.loss.readings import BLOCK, Normaliser, Reading, gather_statistics, sum_of_products
from megatron_rpsd.parallel import VocabularyShard

DIRECTIONS = ("reverse-kl", "forward-kl", "jsd")


@dataclass(frozen=True)
class Divergence:
    """Which divergence is taken.

    Attributes:
        direction: reverse-kl (RPSD, arXiv 2604.14339), forward-kl or jsd.
        temperature: T, divides both readings' logits; values carry the factor T^2.
        top_k: None takes the whole vocabulary. K compares the teacher's K likeliest tokens and, as one more outcome,
            all others together: a lower bound of the whole divergence (see `top_k`).
    """

    direction: str = "reverse-kl"
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"divergence {self.direction!r} is none of {', '.join(DIRECTIONS)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} must be positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} must be at least 1")


class DensePair:
    """A chunk's student and teacher over the whole vocabulary. Call its methods in the order in which they stand."""

    def __init__(self, student: Reading, teacher: Reading, settings: Divergence, memory: Tensor) -> None:
        """Before either reading is exponentiated; `memory` [c, columns] becomes the gradient in the end."""
        self.student, self.teacher, self.settings = student, teacher, settings
        self.memory = torch.sub(student.centred, teacher.centred, out=memory)  # d: exactly 0 where the readings agree
        if settings.temperature != 1.0:
            self.memory.div_(settings.temperature)

    def statistics(self) -> list[Tensor]:
        """What this rank adds to the exchange: B_r [c], nothing for the JSD."""
        if self.settings.direction == "jsd":
            return []
        weights = self.student if self.settings.direction == "reverse-kl" else self.teacher
        return [sum_of_products(weights.exponentials[self.settings.temperature], self.memory)]

    def value(self, gathered: Tensor, p: Normaliser, q: Normaliser, shard: VocabularyShard) -> Tensor:
        """The divergence of every token [c], from all ranks' statistics [ranks, k, c] and both normalisers."""
        self.p, self.q = p, q
        self.log_ratio_shift = (p.offset - q.offset) - (p.log_sum - q.log_sum)  # log p - log q = d + this
        squared = self.settings.temperature**2
        if self.settings.direction == "jsd":
            self.to_mixture, from_teacher = self._mixture_divergences(shard)
            return squared * 0.5 * (self.to_mixture + from_teacher)
        taken = p if self.settings.direction == "reverse-kl" else q
        moved = p.offsets - q.offsets
        expected = (taken.shares * (gathered[:, 0] + taken.sums * moved)).sum(dim=0)  # of d + c
        difference = p.log_sum - q.log_sum
        self.kl = expected - difference if taken is p else difference - expected
        return squared * self.kl

    def _mixture_divergences(self, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
        """KL(p || u) and KL(q || u) [c]: the JSD's own exchange."""
        self.memory.add_(self.log_ratio_shift.unsqueeze(-1))
        temperature = self.settings.temperature
        sums = []
        for reading, normaliser, sign in ((self.student, self.p, 1), (self.teacher, self.q, -1)):
            blocks = zip(
                reading.exponentials[temperature].split(BLOCK, dim=-1), self.memory.split(BLOCK, dim=-1), strict=True
            )
            parts = [(weights * _log_to_mixture(sign * ratio)).sum(dim=-1) for weights, ratio in blocks]
            sums.append(torch.stack(parts, dim=-1).sum(dim=-1) * normaliser.scale)
        student, teacher = gather_statistics(torch.stack(sums), shard).sum(dim=0)
        return student, teacher

    def gradient(self, weights: Tensor) -> Tensor:
        """weights x d value / d student logits [c, columns], in the memory given at construction; weights [c]."""
        temperature = self.settings.temperature
        weights = weights * temperature
        p = self.student.exponentials[temperature]
        p_scale = (weights * self.p.scale).unsqueeze(-1)
        if self.settings.direction == "reverse-kl":
            return self.memory.add_((self.log_ratio_shift - self.kl).unsqueeze(-1)).mul_(p).mul_(p_scale)
        if self.settings.direction == "forward-kl":
            torch.mul(p, p_scale, out=self.memory)
            q_scale = (weights * self.q.scale).unsqueeze(-1)
            # Products are formed alike for p and q, so that equal readings cancel to exactly 0.
            for memory, q in zip(
                self.memory.split(BLOCK, dim=-1),
                self.teacher.exponentials[temperature].split(BLOCK, dim=-1),
                strict=True,
            ):
                memory.sub_(q * q_scale)
            return self.memory
        for memory in self.memory.split(BLOCK, dim=-1):
            memory.copy_(_log_to_mixture(memory).sub_(self.to_mixture.unsqueeze(-1)))
        return self.memory.mul_(p).mul_(0.5 * p_scale)


def _log_to_mixture(log_ratio: Tensor) -> Tensor:
    """log(p / u) = log 2 - log(1 + q / p), with log_ratio = log p - log q; exactly 0 where p = q."""
    return torch.nn.functional.logsigmoid(log_ratio).add_(log_ratio.new_tensor(2.0).log())
