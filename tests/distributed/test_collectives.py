"""Collectives and losses over real ranks against the same computation in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rpsd.loss import (
    clm_per_token,
    reverse_kl_per_token,
    vocab_parallel_cross_entropy,
    vocab_parallel_reverse_kl,
)
from megatron_rpsd.parallel import ViewLayout, VocabularyShard, all_gather_tokens, exchange_suffix


def _gather_job(rows: int):
    local = torch.arange(rows * 3, dtype=torch.float64).view(rows, 3) + 100 * dist.get_rank()
    local.requires_grad_()
    gathered = all_gather_tokens(local, dist.group.WORLD)
    weights = torch.arange(gathered.numel(), dtype=torch.float64).view_as(gathered) * (dist.get_rank() + 1)
    (gathered * weights).sum().backward()
    return gathered.detach(), local.grad


def test_all_gather_sums_gradients_back_to_the_owner(ranks):
    results = ranks.run(3, _gather_job, 2)
    whole = torch.cat([torch.arange(6, dtype=torch.float64).view(2, 3) + 100 * rank for rank in range(3)])
    weights = torch.arange(18, dtype=torch.float64).view(6, 3) * (1 + 2 + 3)
    for rank, (gathered, gradient) in enumerate(results):
        assert torch.equal(gathered, whole)
        assert torch.equal(gradient, weights[2 * rank : 2 * rank + 2])


def _exchange_job(length: int, start: int):
    layout = ViewLayout(length, start, dist.get_world_size(), dist.get_rank())
    suffix = layout.suffix_tokens().double().unsqueeze(1).repeat(1, 2).requires_grad_()
    arrived = exchange_suffix(suffix, layout, dist.group.WORLD)
    (arrived * (arrived.detach() + 1)).sum().backward()
    mine = layout.standard_tokens()
    return arrived.detach(), mine[mine >= start].double(), suffix.grad, suffix.detach()


@pytest.mark.parametrize(
    "length, start, cp", [(16, 8, 2), (32, 28, 2), (32, 0, 4), (32, 24, 4), (48, 8, 4), (36, 12, 3)]
)
def test_every_suffix_token_reaches_the_rank_of_its_standard_reading(length, start, cp, ranks):
    empty = 0
    for arrived, expected, gradient, sent in ranks.run(cp, _exchange_job, length, start):
        assert torch.equal(arrived, expected.unsqueeze(1).repeat(1, 2))
        assert torch.equal(gradient, sent + 1)  # what a token met at its destination came back to its owner
        empty += len(expected) == 0
    if (length, start, cp) == (32, 28, 2):
        assert empty == 1  # the last quarter of the last chunk stands on rank 0 alone


def _loss_job(vocab_size: int, columns: int, dtype: torch.dtype):
    """Losses and local gradients of shards of `columns`, the padding filled with what would dominate."""
    world = dist.get_world_size()
    generator = torch.Generator().manual_seed(5)
    full = torch.randn(2, 7, vocab_size, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, vocab_size, (7,), generator=generator)
    weights = torch.rand(2, 7, generator=generator, dtype=torch.float64)
    padded = torch.full((2, 7, columns * world), 50.0, dtype=torch.float64)
    padded[..., :vocab_size] = full
    shard = VocabularyShard.of_rank(vocab_size, columns, dist.group.WORLD)
    local = padded[..., shard.vocab_start : shard.vocab_stop].to(dtype)
    student, teacher = local[0].clone().requires_grad_(), local[1].clone().requires_grad_()
    clm = vocab_parallel_cross_entropy(teacher, labels, shard)
    kl = vocab_parallel_reverse_kl(student, teacher, shard)
    assert torch.equal(student, local[0]) and torch.equal(teacher, local[1])
    ((clm * weights[0]).sum() + (kl * weights[1]).sum()).backward()
    return clm.detach(), kl.detach(), student.grad, teacher.grad, full, labels, weights


@pytest.mark.parametrize("vocab_size, columns, tp", [(96, 48, 2), (97, 64, 2), (97, 64, 3), (50, 64, 2), (101, 34, 3)])
def test_losses_over_vocabulary_shards_equal_the_definition(vocab_size, columns, tp, ranks):
    results = ranks.run(tp, _loss_job, vocab_size, columns, torch.float64)
    full, labels, weights = results[0][4:]
    student, teacher = full[0].clone().requires_grad_(), full[1].clone().requires_grad_()
    clm, kl = clm_per_token(teacher, labels), reverse_kl_per_token(student, teacher)
    ((clm * weights[0]).sum() + (kl * weights[1]).sum()).backward()
    for result in results:
        torch.testing.assert_close(result[0], clm.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result[1], kl.detach(), rtol=1e-12, atol=1e-12)
    for place, tensor in ((2, student), (3, teacher)):
        gradient = torch.cat([result[place] for result in results], dim=-1)
        torch.testing.assert_close(gradient[..., :vocab_size], tensor.grad, rtol=1e-11, atol=1e-13)
        assert not gradient[..., vocab_size:].any()  # padding takes no probability and gets no gradient


def test_losses_are_bitwise_the_same_on_every_rank(ranks):
    first, *others = ranks.run(3, _loss_job, 97, 64, torch.float32)
    for other in others:
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])
