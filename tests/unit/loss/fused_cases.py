"""A pair of readings and a teacher, and their losses three ways: ours, torch's own in the same type, and fp64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rpsd.loss import (
    Divergence,
    KnownTopK,
    Teacher,
    clm_per_token,
    divergence_per_token,
    fused_linear_loss,
    likeliest_tokens,
)
from megatron_rpsd.parallel import VocabularyShard


@dataclass(frozen=True)
class Case:
    """Sizes that do not divide, a fifth of the tokens masked."""

    vocab_size: int = 101
    padded: int = 128
    standard: int = 13
    perturbed: int = 8
    hidden: int = 24
    size: float = 1.0  # of hidden states
    view: Divergence = field(default_factory=Divergence)
    distill: Divergence | None = None
    logit_scale: float = 1.0

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Inputs, drawn in fp64 and rounded to `dtype`, so that every form sees the same numbers."""
        generator = torch.Generator().manual_seed(11)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n, m = self.standard, self.perturbed
        made = {
            "hidden": self.size * normal(n + m, self.hidden),
            "weight": normal(self.padded, self.hidden),  # padded rows as large as others: they must not count
            "teacher_hidden": self.size * normal(n, self.hidden + 3),
            "teacher_weight": normal(self.padded, self.hidden + 3),
        }
        made = {name: value.to(dtype) for name, value in made.items()}
        keep = (torch.rand(n, generator=generator) > 0.2).double()
        made["labels"] = torch.randint(self.vocab_size, (n,), generator=generator)
        made["clm_weights"] = keep * (0.5 + torch.rand(n, generator=generator, dtype=torch.float64))
        made["view_weights"] = keep[n - m :] * (0.5 + torch.rand(m, generator=generator, dtype=torch.float64))
        made["teacher_weights"] = keep * torch.rand(n, generator=generator, dtype=torch.float64)
        return made

    def fused(
        self,
        dtype: torch.dtype,
        chunk_bytes: int,
        group=None,
        masked: bool = False,
        teacher: KnownTopK | None = None,
    ) -> dict[str, Tensor]:
        """Losses and gradients of `fused_linear_loss` on this rank's shard; `masked`: with every weight 0."""
        given = self.tensors(dtype)
        shard = VocabularyShard.of_rank(self.vocab_size, self.padded // (group.size() if group else 1), group)
        rows = slice(shard.vocab_start, shard.vocab_stop)
        hidden, weight = given["hidden"].requires_grad_(), given["weight"][rows].clone().requires_grad_()
        keep = 0.0 if masked else 1.0
        if self.distill is not None and teacher is None:
            teacher = Teacher(
                given["teacher_hidden"],
                given["teacher_weight"][rows],
                self.distill,
                keep * given["teacher_weights"],
                0.5,
            )
        loss = fused_linear_loss(
            hidden, weight, given["labels"], keep * given["clm_weights"], shard,
            split_readings=lambda whole: whole.split([self.standard, self.perturbed]),
            view_weights=keep * given["view_weights"], divergence=self.view, teacher=teacher,
            logit_scale=self.logit_scale, chunk_bytes=chunk_bytes,
        )  # fmt: skip
        (3 * loss.total).backward()
        return {
            "total": loss.total.detach(), "clm": loss.clm, "view": loss.view, "teacher": loss.teacher,
            "hidden": hidden.grad, "weight": weight.grad,
        }  # fmt: skip

    def _logits(self, given: dict[str, Tensor], dtype: torch.dtype):
        hidden = given["hidden"].detach().to(dtype).requires_grad_()
        weight = given["weight"].detach().to(dtype).requires_grad_()
        logits = (self.logit_scale * F.linear(hidden, weight))[:, : self.vocab_size]
        teacher = 0.5 * F.linear(given["teacher_hidden"].to(dtype), given["teacher_weight"].to(dtype))
        return hidden, weight, logits, teacher[:, : self.vocab_size]

    def definition(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same in fp64, of inputs rounded to `dtype`."""
        given = self.tensors(dtype)
        hidden, weight, logits, teacher = self._logits(given, torch.float64)
        seen, again = logits.split([self.standard, self.perturbed])
        settings = self.view.direction, self.view.temperature, self.view.top_k
        result = {
            "clm": clm_per_token(seen, given["labels"]),
            "view": divergence_per_token(again, seen[self.standard - self.perturbed :], *settings),
            "teacher": logits.new_empty(0),
        }
        if self.distill is not None:
            settings = self.distill.direction, self.distill.temperature, self.distill.top_k
            result["teacher"] = divergence_per_token(seen, teacher, *settings)
        return self._finish(result, given, hidden, weight)

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same with torch's own losses on logits of `dtype`, statistics in fp32: what a careful user writes."""
        given = self.tensors(dtype)
        hidden, weight, logits, teacher = self._logits(given, dtype)
        seen, again = logits.float().split([self.standard, self.perturbed])
        result = {
            "clm": F.cross_entropy(seen, given["labels"], reduction="none"),
            "view": _plain_divergence(again, seen[self.standard - self.perturbed :], self.view),
            "teacher": seen.new_empty(0),
        }
        if self.distill is not None:
            result["teacher"] = _plain_divergence(seen, teacher.float(), self.distill)
        return self._finish(result, given, hidden, weight)

    def _finish(self, result: dict, given: dict, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
        total = (result["clm"] * given["clm_weights"]).sum() + (result["view"] * given["view_weights"]).sum()
        if len(result["teacher"]):
            total = total + (result["teacher"] * given["teacher_weights"]).sum()
        (3 * total).backward()
        values = {name: value.detach() for name, value in result.items()}
        return {**values, "total": total.detach(), "hidden": hidden.grad, "weight": weight.grad}


def _plain_divergence(student: Tensor, teacher: Tensor, settings: Divergence) -> Tensor:
    heat = settings.temperature
    log_p, log_q = (student / heat).log_softmax(-1), (teacher.detach() / heat).log_softmax(-1)

    def kl(target, given):
        return F.kl_div(given, target, reduction="none", log_target=True).sum(-1)

    if settings.top_k is not None:
        chosen = log_q.topk(settings.top_k, dim=-1).indices
        outside = torch.ones_like(log_q).scatter(-1, chosen, 0.0).log()  # 0 outside, -inf inside
        log_p, log_q = (
            torch.cat([part.gather(-1, chosen), (part + outside).logsumexp(-1, keepdim=True)], -1)
            for part in (log_p, log_q)
        )
    if settings.direction == "jsd":
        middle = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
        return heat**2 * 0.5 * (kl(log_p, middle) + kl(log_q, middle))
    return heat**2 * (kl(log_p, log_q) if settings.direction == "reverse-kl" else kl(log_q, log_p))


def errors(result: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Error of each value in the 2-norm, relative to the truth's."""
    return {
        name: ((result[name].double() - value).norm() / value.norm().clamp(min=1e-30)).item()
        for name, value in truth.items()
        if value.numel()
    }


def kept_teacher(case: Case, dtype: torch.dtype, chunk_bytes: int, group=None) -> dict[str, Tensor]:
    """As `Case.fused`, the teacher read beforehand into its likeliest tokens."""
    given = case.tensors(dtype)
    shard = VocabularyShard.of_rank(case.vocab_size, case.padded // (group.size() if group else 1), group)
    rows = slice(shard.vocab_start, shard.vocab_stop)
    read = likeliest_tokens(
        given["teacher_hidden"], given["teacher_weight"][rows], shard, case.distill, 0.5, chunk_bytes
    )
    return case.fused(dtype, chunk_bytes, group, teacher=KnownTopK(*read, case.distill, given["teacher_weights"]))
