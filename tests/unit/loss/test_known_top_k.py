"""A teacher kept by its likeliest tokens against one that is there, on one rank; more padding and another precision."""

from __future__ import annotations

import pytest
import torch

from megatron_rpsd.loss import Divergence, KnownTopK, Teacher, fused_linear_loss, likeliest_tokens
from megatron_rpsd.parallel import VocabularyShard
from tests.unit.loss.fused_cases import Case, errors, kept_teacher

ONE_TOKEN, SOME, ALL = 1, 12_000, 2**30


@pytest.mark.parametrize("chunk_bytes", [ONE_TOKEN, SOME, ALL])
@pytest.mark.parametrize("direction", ["forward-kl", "reverse-kl", "jsd"])
@pytest.mark.parametrize("temperature, k", [(1.0, 5), (2.0, 40), (1.0, 101)])
def test_a_kept_teacher_equals_the_definition(direction, temperature, k, chunk_bytes):
    case = Case(distill=Divergence(direction, temperature, k))
    truth = case.definition(torch.float64)
    found = errors(kept_teacher(case, torch.float64, chunk_bytes), truth)
    assert max(found.values()) < 1e-12, found


def test_a_confident_teachers_rest_is_not_lost():
    """At a margin of 200 nats the others weigh less than fp32 holds beside 1; their logarithm is exact all the same."""
    logits = torch.tensor([[200.0, 0.0, -1.0, -2.0]])
    log_probs, tokens, log_rest = likeliest_tokens(
        logits, torch.eye(4), VocabularyShard(4, 0, 4), Divergence("reverse-kl", 1.0, 1)
    )
    assert tokens.tolist() == [[0]] and log_probs.item() == 0
    assert log_rest.item() == pytest.approx(torch.logsumexp(torch.tensor([0.0, -1.0, -2.0]), 0).item() - 200)


@pytest.mark.parametrize("student, teacher", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_teacher_has_its_own_precision_and_padding(student, teacher):
    generator = torch.Generator().manual_seed(3)
    hidden, weight, other_hidden, other_weight = (
        torch.randn(*shape, generator=generator) for shape in ((7, 8), (64, 8), (7, 12), (128, 12))
    )
    hidden, weight = hidden.to(student).requires_grad_(), weight.to(student)
    other_hidden, other_weight = other_hidden.to(teacher), other_weight.to(teacher)
    labels = torch.zeros(7, dtype=torch.int64)
    loss = fused_linear_loss(
        hidden, weight, labels, torch.zeros(7), VocabularyShard(61, 0, 64),
        teacher=Teacher(other_hidden, other_weight, Divergence("forward-kl"), torch.ones(7)), chunk_bytes=SOME,
    )  # fmt: skip
    loss.total.backward()
    log_p = (hidden.detach().float() @ weight.float().T)[:, :61].log_softmax(-1)
    log_q = (other_hidden.float() @ other_weight.float().T)[:, :61].log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1)
    # Logits are products in the reading's own precision: a bf16 product is rounded to 8 bits.
    torch.testing.assert_close(loss.teacher, expected, rtol=3e-2, atol=0)
    gradient = (log_p.exp() - log_q.exp()) @ weight.float()[:61]
    torch.testing.assert_close(hidden.grad.float(), gradient, rtol=3e-2, atol=3e-2 * gradient.abs().max().item())
    assert hidden.grad.dtype == student


def test_equal_readings_have_no_divergence():
    given = Case().tensors(torch.float64)
    hidden, weight = given["hidden"][:13], given["weight"]
    shard, settings = VocabularyShard(101, 0, 128), Divergence("forward-kl", 1.0, 7)
    known = KnownTopK(*likeliest_tokens(hidden, weight, shard, settings), settings, torch.ones(13))
    loss = fused_linear_loss(hidden, weight, given["labels"], torch.zeros(13), shard, teacher=known)
    assert loss.teacher.abs().max() < 1e-14
