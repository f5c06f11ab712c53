"""The vocabulary-parallel losses on one rank against the written-out definition (on several: tests/distributed)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_rpsd.loss import (
    clm_per_token,
    reverse_kl_per_token,
    vocab_parallel_cross_entropy,
    vocab_parallel_reverse_kl,
)
from megatron_rpsd.loss.vocab_parallel import _log_sum_exp, _max_and_exp
from megatron_rpsd.parallel import VocabularyShard

TOKENS, BATCH, VOCAB = 6, 2, 37


def shard(padded: int = VOCAB, vocab_size: int = VOCAB) -> VocabularyShard:
    return VocabularyShard.of_rank(vocab_size, padded, None)


def random_logits(columns: int = VOCAB, seed: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    return 4 * torch.randn(tokens, BATCH, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_labels(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(VOCAB, (tokens, BATCH), generator=torch.Generator().manual_seed(7))


def per_token_weights() -> torch.Tensor:
    """Another upstream gradient for each token, so that a mixed-up token shows."""
    return torch.linspace(-1, 2, TOKENS * BATCH, dtype=torch.float64).view(TOKENS, BATCH)


def loss_and_gradient(function, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf)
    (loss * per_token_weights().to(loss.dtype)).sum().backward()
    return loss.detach(), leaf.grad


def cross_entropy_forms(dtype: torch.dtype):
    """Ours, torch's and the definition, as functions of the logits."""
    labels = random_labels()
    return (
        lambda z: vocab_parallel_cross_entropy(z, labels, shard()),
        lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none").view(TOKENS, BATCH),
        lambda z: clm_per_token(z, labels),
    )


def reverse_kl_forms(dtype: torch.dtype):
    """The same of the reverse KL, for a fixed teacher of that type."""
    teacher = random_logits(seed=1).to(dtype)
    return (
        lambda z: vocab_parallel_reverse_kl(z, teacher, shard()),
        lambda z: F.kl_div(
            teacher.log_softmax(-1), z.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1),
        lambda z: reverse_kl_per_token(z, teacher),
    )  # fmt: skip


BOTH = pytest.mark.parametrize("forms", [cross_entropy_forms, reverse_kl_forms], ids=["cross_entropy", "reverse_kl"])


def losses(logits: torch.Tensor, which: VocabularyShard) -> list[torch.Tensor]:
    teacher = logits.detach().flip(0)
    labels = random_labels(logits.shape[0])
    return [vocab_parallel_cross_entropy(logits, labels, which), vocab_parallel_reverse_kl(logits, teacher, which)]


@BOTH
def test_fp64_equals_the_definition(forms):
    ours, _, definition = forms(torch.float64)
    for got, expected in zip(*(loss_and_gradient(f, random_logits()) for f in (ours, definition)), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("scale", [1, 8])
@pytest.mark.parametrize("seed", range(3))
def test_fp32_error_is_at_most_twice_torchs(forms, scale, seed):
    ours, torchs, definition = forms(torch.float32)
    logits = scale * random_logits(seed=10 + seed).float()
    exact = loss_and_gradient(lambda z: definition(z), logits.double())
    for got, standard, expected in zip(
        loss_and_gradient(ours, logits), loss_and_gradient(torchs, logits), exact, strict=True
    ):
        assert got.dtype == torch.float32
        error, standard_error = ((x.double() - expected).abs().max() for x in (got, standard))
        assert 0 < standard_error < 1e-4
        assert error <= 2 * standard_error, f"{error:.2e} against torch's {standard_error:.2e}"


@BOTH
def test_bf16_logits_give_fp32_losses_and_rounded_gradients(forms):
    ours, _, definition = forms(torch.bfloat16)
    logits = random_logits().bfloat16()
    loss, gradient = loss_and_gradient(ours, logits)
    expected_loss, expected_gradient = loss_and_gradient(definition, logits.double())
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-5)
    # One rounding to bf16's 8 bits, at most half a unit in the last place; atol is fp32's share.
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("filling", [0.0, 1e30, -1e30, float("inf"), float("nan")])
def test_padding_columns_change_nothing_and_get_no_gradient(filling):
    real = random_logits().requires_grad_()
    padded = torch.cat([real.detach(), torch.full((TOKENS, BATCH, 11), filling).double()], dim=-1).requires_grad_()
    plain, with_padding = losses(real, shard()), losses(padded, shard(VOCAB + 11))
    for one, other in zip(plain, with_padding, strict=True):
        assert torch.equal(one, other)
    sum(loss.sum() for loss in plain).backward()
    sum(loss.sum() for loss in with_padding).backward()
    assert torch.equal(padded.grad[..., :VOCAB], real.grad)
    assert torch.equal(padded.grad[..., VOCAB:], torch.zeros(TOKENS, BATCH, 11, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_views_have_no_divergence_bitwise(dtype):
    logits = random_logits().to(dtype).requires_grad_()
    divergence = vocab_parallel_reverse_kl(logits, logits.detach().clone(), shard())
    divergence.sum().backward()
    assert torch.equal(divergence, torch.zeros_like(divergence))
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_teacher_gets_no_gradient():
    student, teacher = random_logits().requires_grad_(), random_logits(seed=1).requires_grad_()
    vocab_parallel_reverse_kl(student, teacher, shard()).sum().backward()
    assert teacher.grad is None and student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inputs_are_not_modified(dtype):
    student, teacher = random_logits().to(dtype).requires_grad_(), random_logits(seed=1).to(dtype)
    labels, gradient = random_labels(), torch.ones(TOKENS, BATCH, dtype=torch.promote_types(dtype, torch.float32))
    inputs = (student.data, teacher, labels, gradient)
    before = [tensor.clone() for tensor in inputs]
    vocab_parallel_cross_entropy(student, labels, shard()).backward(gradient)
    vocab_parallel_reverse_kl(student, teacher, shard()).backward(gradient)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


def test_gradients_by_finite_differences():
    student = (random_logits(7, tokens=2) / 4).requires_grad_()
    teacher, labels = random_logits(7, seed=1, tokens=2) / 4, torch.tensor([[0, 4], [3, 2]])
    padded = shard(padded=7, vocab_size=5)
    assert torch.autograd.gradcheck(lambda z: vocab_parallel_cross_entropy(z, labels, padded), student)
    assert torch.autograd.gradcheck(lambda z: vocab_parallel_reverse_kl(z, teacher, padded), student)


def test_no_tokens_is_an_empty_loss():
    logits = random_logits(tokens=0).requires_grad_()
    found = losses(logits, shard())
    assert all(loss.shape == (0, BATCH) for loss in found)
    sum(loss.sum() for loss in found).backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_stay_finite_and_right(dtype):
    student = (torch.sign(random_logits()) * 1e4 + random_logits(seed=1)).to(dtype).requires_grad_()
    teacher = (torch.sign(random_logits(seed=2)) * 1e4).to(dtype)
    labels = random_labels()
    clm = vocab_parallel_cross_entropy(student, labels, shard())
    divergence = vocab_parallel_reverse_kl(student, teacher, shard())
    (clm.sum() + divergence.sum()).backward()
    assert all(torch.isfinite(tensor).all() for tensor in (clm, divergence, student.grad))
    # fp32 holds 1e4 to 1e-3 / 2, and a loss is a difference of such numbers.
    torch.testing.assert_close(clm.double(), clm_per_token(student, labels), rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(divergence.double(), reverse_kl_per_token(student, teacher), rtol=1e-5, atol=4e-3)


@pytest.mark.parametrize("sizes", [[37], [20, 17], [1, 35, 1], [37, 0], [12, 12, 13, 0]])
def test_shards_statistics_combine_to_the_whole_vocabularys(sizes):
    """The combine step on split columns; a part without columns is a rank that holds padding only."""
    logits = random_logits() + 1e3 * torch.eye(VOCAB, dtype=torch.float64)[:TOKENS, None]  # maxima far apart
    parts = [_max_and_exp(part) for part in logits.split(sizes, dim=-1)]
    maxima = torch.stack([largest for largest, _ in parts])
    sums = torch.stack([exponentials.sum(dim=-1) for _, exponentials in parts])
    largest, log_sum, weights = _log_sum_exp(maxima, sums)
    torch.testing.assert_close(largest + log_sum, logits.logsumexp(dim=-1), rtol=1e-14, atol=1e-13)
    assert torch.isfinite(weights).all() and (weights.amax(dim=0) == 1).all()
    assert all(not weight.any() for weight, columns in zip(weights, sizes, strict=True) if columns == 0)


@pytest.mark.parametrize(
    ("vocab_size", "start", "stop", "columns"),
    [(100, 0, 64, 64), (100, 64, 128, 36), (100, 128, 192, 0), (128, 64, 128, 64), (64, 64, 128, 0)],
)
def test_real_columns_of_a_shard(vocab_size, start, stop, columns):
    assert VocabularyShard(vocab_size, start, stop).columns == columns


def test_an_output_layer_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="an output layer of 64 columns cannot hold a vocabulary of 65"):
        VocabularyShard.of_rank(65, 64, None)
