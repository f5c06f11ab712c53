"""Cross-entropy, reverse KL and argmax over tensor-parallel vocabulary shards, with one small collective each.

Who holds what: logits are sharded over the group's ranks along their last dimension; labels and per-token losses are
replicated. Every rank reduces its own columns to a few floats per token, one all-gather brings all ranks' floats
together, and every rank combines them the same way, so the result is bitwise the same on each.

With m_r = max_v z, A_r = sum_v e^(z - m_r) over rank r's real columns, and m = max_r m_r:

    lse(z) = m + log S,   S = sum_r A_r e^(m_r - m)
    CE     = log S - (z_label - m)

and with student logits z, teacher logits t (maxima n_r and n, sum T), d = (z - m) - (t - n) and
B_r = sum_v e^(z - m_r) ((z - m_r) - (t - n_r)):

    KL(p || q) = sum_v p d - log S + log T,   sum_v p d = sum_r e^(m_r - m) (B_r + A_r ((m_r - m) - (n_r - n))) / S

Everything is taken relative to the maxima: lse(z) itself, in fp32, would be rounded at the size of the largest logit.

Gradients are local, without a collective: dCE/dz = p - onehot, and dKL/dz = p ((log p - log q) - KL) with the *global*
KL of the token (arXiv 2604.14339; a local KL is the usual mistake). Where z = t bitwise, KL and its gradient are
exactly 0. Statistics are fp32 (fp64 for fp64 logits) whatever the logits' type: a bf16 sum over 150k columns loses the
tail.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpsd.loss.readings import LOWEST, gather_statistics
from megatron_rpsd.parallel import VocabularyShard


def _statistics_type(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _max_and_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit per token [...] and e^(z - max) [..., columns]."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], LOWEST), logits
    largest = logits.amax(dim=-1)
    return largest, (logits - largest.unsqueeze(-1)).exp()


def _log_sum_exp(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m [...], lse - m [...] and every rank's weight e^(m_r - m) [ranks, ...] from maxima and sums [ranks, ...].

    The two parts of lse stay apart: their sum would round away what a confident token's loss consists of.
    """
    largest = maxima.amax(dim=0)
    weights = (maxima - largest).exp()
    return largest, (weights * sums).sum(dim=0).log(), weights


def _padded_like(logits: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` of the real columns, widened to the shape of `logits` with zeros for padding, in its dtype."""
    if gradient.shape[-1] == logits.shape[-1]:
        return gradient.to(logits.dtype)
    padded = torch.zeros_like(logits)
    padded[..., : gradient.shape[-1]] = gradient
    return padded


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, shard: VocabularyShard) -> Tensor:
        real = logits[..., : shard.columns].to(_statistics_type(logits))
        largest, exponentials = _max_and_exp(real)
        local = (labels >= shard.vocab_start) & (labels < shard.vocab_start + shard.columns)
        column = torch.where(local, labels - shard.vocab_start, 0).unsqueeze(-1)
        at_label = real.gather(-1, column).squeeze(-1) if shard.columns else largest
        at_label = torch.where(local, at_label, 0)
        gathered = gather_statistics(torch.stack([largest, exponentials.sum(dim=-1), at_label]), shard)
        largest, log_sum, _ = _log_sum_exp(gathered[:, 0], gathered[:, 1])
        ctx.shard = shard
        ctx.save_for_backward(logits, largest, log_sum, column, local)
        return log_sum - (gathered[:, 2].sum(dim=0) - largest)

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, largest, log_sum, column, local = ctx.saved_tensors
        real = logits[..., : ctx.shard.columns].to(log_sum.dtype)
        gradient = (real - largest.unsqueeze(-1)).sub_(log_sum.unsqueeze(-1)).exp_()
        if ctx.shard.columns:
            gradient.scatter_add_(-1, column, -local.unsqueeze(-1).to(gradient.dtype))
        return _padded_like(logits, gradient.mul_(grad.unsqueeze(-1))), None, None


def vocab_parallel_cross_entropy(vocab_parallel_logits: Tensor, labels: Tensor, shard: VocabularyShard) -> Tensor:
    """-log p(label) per token.

    Args:
        vocab_parallel_logits: [..., v/tp], any floating type; not modified.
        labels: int64 [...], token ids below `shard.vocab_size`.
        shard: the columns that this rank holds.

    Returns:
        [...] in fp32 (fp64 for fp64 logits), the same on every rank of `shard.group`.
    """
    assert vocab_parallel_logits.shape[-1] == shard.vocab_stop - shard.vocab_start
    return _CrossEntropy.apply(vocab_parallel_logits, labels, shard)


def _difference(z: Tensor, t: Tensor, z_max: Tensor, t_max: Tensor) -> Tensor:
    """(z - max z) - (t - max t) [..., columns]: log p - log q up to one number per token, and exactly 0 where z = t."""
    return (z - z_max.unsqueeze(-1)).sub_(t - t_max.unsqueeze(-1))


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, shard: VocabularyShard) -> Tensor:
        kind = _statistics_type(student)
        z, t = student[..., : shard.columns].to(kind), teacher[..., : shard.columns].to(kind)
        z_max, z_exp = _max_and_exp(z)
        t_max, t_exp = _max_and_exp(t)
        cross = (z_exp * _difference(z, t, z_max, t_max)).sum(dim=-1)
        local = torch.stack([z_max, z_exp.sum(dim=-1), cross, t_max, t_exp.sum(dim=-1)])
        gathered = gather_statistics(local, shard)
        z_largest, z_log_sum, weights = _log_sum_exp(gathered[:, 0], gathered[:, 1])
        t_largest, t_log_sum, _ = _log_sum_exp(gathered[:, 3], gathered[:, 4])
        # From differences to a rank's own maxima to differences to the group's.
        moved = (gathered[:, 0] - z_largest) - (gathered[:, 3] - t_largest)
        cross = (weights * (gathered[:, 2] + gathered[:, 1] * moved)).sum(dim=0)
        kl = cross / (weights * gathered[:, 1]).sum(dim=0) - (z_log_sum - t_log_sum)
        ctx.shard = shard
        ctx.save_for_backward(student, teacher, z_largest, t_largest, z_log_sum, t_log_sum, kl)
        return kl

    @staticmethod
    def backward(ctx, grad: Tensor):
        student, teacher, z_largest, t_largest, z_log_sum, t_log_sum, kl = ctx.saved_tensors
        columns = ctx.shard.columns
        z, t = student[..., :columns].to(kl.dtype), teacher[..., :columns].to(kl.dtype)
        p = (z - z_largest.unsqueeze(-1)).sub_(z_log_sum.unsqueeze(-1)).exp_()
        # (log p - log q) - KL, with the differences taken logit by logit: exactly 0 where the views agree.
        gradient = p * (_difference(z, t, z_largest, t_largest) - (z_log_sum - t_log_sum + kl).unsqueeze(-1))
        return _padded_like(student, gradient.mul_(grad.unsqueeze(-1))), None, None


def vocab_parallel_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, shard: VocabularyShard) -> Tensor:
    """KL(p || q) = sum p (log p - log q) per token; p of the student, q of the teacher, to which no gradient flows.

    Args:
        student_logits, teacher_logits: [..., v/tp], the same tokens and columns; not modified.
        shard: the columns that this rank holds.

    Returns:
        nats [...] in fp32 (fp64 for fp64 logits), the same on every rank of `shard.group`.
    """
    assert student_logits.shape == teacher_logits.shape
    assert student_logits.shape[-1] == shard.vocab_stop - shard.vocab_start
    return _ReverseKL.apply(student_logits, teacher_logits.detach(), shard)


@torch.no_grad()
def vocab_parallel_argmax(vocab_parallel_logits: Tensor, shard: VocabularyShard) -> Tensor:
    """The likeliest token of every position, the smallest id among equals, as torch's argmax over whole logits.

    Args:
        vocab_parallel_logits: [..., v/tp], any floating type.
        shard: the columns that this rank holds; padded ones are never chosen.

    Returns:
        int64 [...], the same on every rank of `shard.group`.
    """
    assert vocab_parallel_logits.shape[-1] == shard.vocab_stop - shard.vocab_start
    real = vocab_parallel_logits[..., : shard.columns]
    if shard.columns:
        largest, column = real.max(dim=-1)
    else:
        largest, column = real.new_full(real.shape[:-1], -torch.inf), real.new_zeros(real.shape[:-1], dtype=torch.int64)
    # fp64 holds every logit and every id exactly, so that one exchange carries both.
    best = torch.stack([largest.double(), (column + shard.vocab_start).double()])
    gathered = gather_statistics(best, shard)  # [ranks, 2, ...]
    rank = gathered[:, 0].argmax(dim=0, keepdim=True)  # the first of equal ranks has the smaller ids
    return gathered[:, 1].gather(0, rank).squeeze(0).long()
