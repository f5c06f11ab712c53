"""The written-out objective against torch's own losses and against sums by hand in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_rpsd.loss import clm_per_token, objective, reverse_kl_per_token


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    return [math.exp(x) / sum(math.exp(y) for y in row) for x in row]


def kl(student: list[float], teacher: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(softmax(student), softmax(teacher), strict=True))


def test_clm_equals_torch_cross_entropy():
    logits = random_logits(4, 7, 13)
    labels = torch.randint(13, (4, 7), generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(4, 7)
    torch.testing.assert_close(clm_per_token(logits, labels), expected, rtol=1e-13, atol=1e-13)


def test_reverse_kl_equals_torch_kl_div_with_the_student_as_its_target():
    student, teacher = random_logits(4, 7, 13), random_logits(4, 7, 13, seed=1)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    reverse = F.kl_div(input=log_q, target=log_p, reduction="none", log_target=True).sum(-1)
    forward = F.kl_div(input=log_p, target=log_q, reduction="none", log_target=True).sum(-1)
    ours = reverse_kl_per_token(student, teacher)
    torch.testing.assert_close(ours, reverse, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(ours, forward, rtol=0.1), "the example cannot tell the two directions apart"


def test_three_tokens_by_hand():
    student = [[0.0, 0.0], [math.log(3), 0.0], [5.0, 5.0 + math.log(4)]]  # p = (1/2, 1/2), (3/4, 1/4), (1/5, 4/5)
    teacher = [[0.0, 0.0], [0.0, 0.0], [math.log(4), 0.0]]  # q = (1/2, 1/2), (1/2, 1/2), (4/5, 1/5)
    clm = clm_per_token(torch.tensor(student, dtype=torch.float64), torch.tensor([0, 0, 1]))
    reverse_kl = reverse_kl_per_token(*(torch.tensor(rows, dtype=torch.float64) for rows in (student, teacher)))
    assert clm.tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(5 / 4)], abs=1e-14)
    by_hand = [0.0, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.2 * math.log(0.25) + 0.8 * math.log(4)]
    assert reverse_kl.tolist() == pytest.approx(by_hand, abs=1e-14)


def test_results_are_fp64_whatever_the_logits_are():
    logits = random_logits(2, 5).bfloat16()
    labels = torch.zeros(2, dtype=torch.int64)
    assert clm_per_token(logits, labels).dtype == reverse_kl_per_token(logits, logits).dtype == torch.float64


def test_the_teacher_gets_no_gradient():
    student, teacher = random_logits(3, 5).requires_grad_(), random_logits(3, 5, seed=1).requires_grad_()
    reverse_kl_per_token(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def objective_by_hand(standard, perturbed, labels, mask, splits, weight) -> tuple[float, float, float]:
    """The docstring's arithmetic over lists: sequences weighed by kept tokens, KL a mean over kept suffix tokens."""
    total = clm_sum = kl_sum = 0.0
    tokens = suffix_tokens = 0
    for sequence in range(len(labels)):
        clm, divergence, kept, kept_suffix = 0.0, 0.0, 0, 0
        for i, keep in enumerate(mask[sequence]):
            if not keep:
                continue
            kept += 1
            clm -= math.log(softmax(standard[sequence][i])[labels[sequence][i]])
            if i >= splits[sequence]:
                kept_suffix += 1
                divergence += kl(perturbed[sequence][i], standard[sequence][i])
        if kept:
            total += kept * (clm / kept + weight * (divergence / kept_suffix if kept_suffix else 0.0))
        clm_sum, kl_sum = clm_sum + clm, kl_sum + divergence
        tokens, suffix_tokens = tokens + kept, suffix_tokens + kept_suffix
    return total / tokens, clm_sum / tokens, kl_sum / suffix_tokens if suffix_tokens else 0.0


@pytest.mark.parametrize(
    ("mask", "splits"),
    [
        ([[1, 1, 1, 1], [1, 1, 1, 1]], [0, 0]),
        ([[1, 1, 1, 1], [1, 1, 1, 1]], [1, 3]),
        ([[1, 0, 1, 1], [1, 1, 0, 0]], [2, 1]),
        ([[0, 1, 1, 0], [1, 1, 1, 1]], [3, 0]),  # no kept token after the first split: its KL is 0, not 0 / 0
        ([[1, 1, 0, 0], [1, 0, 0, 0]], [2, 3]),  # none in the whole micro-batch
    ],
)
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_objective_of_two_sequences_equals_plain_python(mask, splits, weight):
    standard, perturbed = random_logits(2, 4, 3), random_logits(2, 4, 3, seed=1)
    labels = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    ours = objective(standard, perturbed, labels, torch.tensor(mask), torch.tensor(splits), weight)
    expected = objective_by_hand(standard.tolist(), perturbed.tolist(), labels.tolist(), mask, splits, weight)
    assert [value.item() for value in ours] == pytest.approx(expected, abs=1e-13)
    assert all(value.dtype == torch.float64 for value in ours)


def test_objective_without_a_mask_is_the_papers_mean_over_sequences():
    standard, perturbed = random_logits(2, 4, 3), random_logits(2, 4, 3, seed=1)
    labels, splits = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]]), torch.tensor([1, 3])
    total, _, _ = objective(standard, perturbed, labels, torch.ones(2, 4), splits, 1.0)
    sequences = [
        F.cross_entropy(standard[b], labels[b])
        + F.kl_div(standard[b].log_softmax(-1), perturbed[b].log_softmax(-1), reduction="none", log_target=True)
        .sum(-1)[splits[b] :]
        .mean()
        for b in range(2)
    ]
    torch.testing.assert_close(total, torch.stack(sequences).mean(), rtol=1e-13, atol=1e-13)


def test_equal_views_leave_the_clm_loss_alone():
    logits = random_logits(2, 4, 3)
    labels = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    total, clm, divergence = objective(logits, logits.clone(), labels, torch.ones(2, 4), torch.tensor([0, 2]), 1.0)
    assert divergence.item() == 0 and total.item() == clm.item()


def test_gradients_go_where_the_paper_says():
    standard, perturbed = random_logits(1, 4, 3).requires_grad_(), random_logits(1, 4, 3, seed=1).requires_grad_()
    labels, split = torch.tensor([[0, 1, 2, 0]]), 2
    objective(standard, perturbed, labels, torch.ones(1, 4), torch.tensor([split]), 1.0)[0].backward()
    one_hot = F.one_hot(labels, 3)
    torch.testing.assert_close(standard.grad, (standard.detach().softmax(-1) - one_hot) / 4, rtol=1e-12, atol=1e-13)
    assert not perturbed.grad[:, :split].any() and perturbed.grad[:, split:].all()
