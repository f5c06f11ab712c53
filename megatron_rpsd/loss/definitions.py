"""RPSD's objective written out in full: whole logits, fp64, one process. The oracle of every faster version.

Source: "Shuffle the Context: RoPE-Perturbed Self-Distillation for Long-Context Adaptation", arXiv 2604.14339.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clm_per_token(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label), fp64 [...], of logits [..., v] and int64 labels [...]."""
    log_p = torch.log_softmax(logits.double(), dim=-1)
    return -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def reverse_kl_per_token(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q), fp64 [...]; p of the student (the perturbed view), q of the teacher.

    No gradient flows to the teacher.
    """
    log_p = torch.log_softmax(student_logits.double(), dim=-1)
    log_q = torch.log_softmax(teacher_logits.detach().double(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def divergence_per_token(
    student_logits: Tensor,
    teacher_logits: Tensor,
    direction: str = "reverse-kl",
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """T^2 x divergence of softmax(z / T) from softmax(t / T), fp64 [...]; no gradient flows to the teacher.

    reverse-kl: KL(p || q); forward-kl: KL(q || p); jsd: (KL(p || u) + KL(q || u)) / 2 with u = (p + q) / 2, where
    KL(a || b) = sum_v a (log a - log b). With top_k, both distributions are first reduced to the teacher's K likeliest
    tokens and one more outcome, all other tokens together.
    """
    p = torch.softmax(student_logits.double() / temperature, dim=-1)
    q = torch.softmax(teacher_logits.detach().double() / temperature, dim=-1)
    if top_k is not None and top_k < p.shape[-1]:
        chosen = torch.zeros_like(q, dtype=torch.bool).scatter_(-1, q.topk(top_k, dim=-1).indices, True)
        p, q = (
            torch.cat([part[chosen].view(*part.shape[:-1], top_k), (part * ~chosen).sum(-1, keepdim=True)], dim=-1)
            for part in (p, q)
        )
    u = (p + q) / 2
    terms = {
        "reverse-kl": lambda: p * (p / q).log(),
        "forward-kl": lambda: q * (q / p).log(),
        "jsd": lambda: (p * (p / u).log() + q * (q / u).log()) / 2,
    }
    return temperature**2 * terms[direction]().sum(dim=-1)


def objective(
    standard_logits: Tensor,
    perturbed_logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    splits: Tensor,
    kl_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """L = L_CLM + weight x L_KL of a micro-batch (the paper's objective), with a loss mask.

    Every sequence contributes its mean CLM over the N tokens that the mask keeps, and its mean KL over the M of them
    that stand at or after its split; sequences are weighed by N, as Megatron's per-token loss does. With nothing masked
    N = L and M = L - s, and this is the paper's mean over sequences.

    Args:
        standard_logits, perturbed_logits: [b, L, v], the same tokens under both views.
        labels: int64 [b, L].
        loss_mask: [b, L], 1 keeps a token.
        splits: int64 [b], the first token whose position is perturbed.

    Returns:
        objective, mean CLM (over N), mean KL (over M): fp64 scalars.
    """
    mask = loss_mask.double()
    suffix = mask * (torch.arange(labels.shape[1], device=labels.device) >= splits[:, None])
    clm = (clm_per_token(standard_logits, labels) * mask).sum(dim=1)
    kl = (reverse_kl_per_token(perturbed_logits, standard_logits) * suffix).sum(dim=1)
    kept, kept_suffix = mask.sum(dim=1), suffix.sum(dim=1)
    weighed = clm + kl_weight * kept * kl / kept_suffix.clamp(min=1)
    return weighed.sum() / kept.sum(), clm.sum() / kept.sum(), kl.sum() / kept_suffix.sum().clamp(min=1)
