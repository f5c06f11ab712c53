"""Scores by hand, the bootstrap against direct computations, and verdicts that can fail."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from examples.lab import scores


def test_scores_by_hand() -> None:
    # two seeds, two documents, three depths
    right = np.array([[[1, 0, 1], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]], dtype=float)
    assert scores.by_depth(right).tolist() == [[1.0, 0.0, 0.5], [1.0, 1.0, 0.5]]
    assert scores.mean_accuracy(right) == pytest.approx(8 / 12)
    expected = (statistics.pstdev([1, 0, 0.5]) + statistics.pstdev([1, 1, 0.5])) / 2
    assert scores.depth_deviation(right) == pytest.approx(expected)
    assert scores.worst_depth(right) == pytest.approx((0.0 + 0.5) / 2)


def test_the_bootstrap_of_a_mean_has_the_mean_s_standard_error() -> None:
    # One seed of independent documents: the interval is that of a mean, 1.96 standard errors each way.
    documents = np.random.default_rng(1).random((1, 400, 1))
    estimate = scores.bootstrap(scores.mean_accuracy, documents)
    error = documents.std(ddof=1) / 20
    assert estimate.value == pytest.approx(documents.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_the_bootstrap_holds_the_chance_of_seeds() -> None:
    # Documents of a seed are alike: only which seeds are drawn matters, so all 27 draws can be counted.
    levels = [0.2, 0.5, 0.9]
    right = np.array(levels)[:, None, None] * np.ones((3, 8, 2))
    draws = sorted((a + b + c) / 3 for a in levels for b in levels for c in levels)
    estimate = scores.bootstrap(scores.mean_accuracy, right, draws=20_000)
    assert estimate.low == pytest.approx(draws[0])  # 1 of 27 draws is the lowest thrice: more than 2.5 %
    assert estimate.high == pytest.approx(draws[-1])


def test_differences_are_paired() -> None:
    # The better arm is right wherever the other is, and on 10 % more: its gap has hardly any spread.
    other = np.random.default_rng(2).random((3, 60, 10))
    estimate = scores.bootstrap(lambda a, b: scores.mean_accuracy(a) - scores.mean_accuracy(b), other + 0.1, other)
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((0.1, 0.1, 0.1))


def exam_of(by_depth: list[float], seeds: int = 3) -> np.ndarray:
    return np.tile(np.array(by_depth), (seeds, 60, 1))


GOOD = {
    "rpsd-skip": {512: exam_of([0.9, 0.96]), 1024: exam_of([0.7, 0.7])},
    "standard": {512: exam_of([0.3, 0.9]), 1024: exam_of([0.1, 0.1])},
    "pose": {512: exam_of([0.8, 0.9]), 1024: exam_of([0.5, 0.6])},
}


def test_all_expectations_hold_on_the_expected_figures() -> None:
    verdicts = scores.judge(GOOD)
    assert len(verdicts) == 5 and all(verdict.met for verdict in verdicts)
    gap = verdicts[0]
    assert gap.estimate.value == pytest.approx(0.33) and gap.margin == pytest.approx(0.13)
    assert gap.by_seed == pytest.approx((0.33, 0.33, 0.33))
    ratio = verdicts[2]
    assert ratio.at_most and ratio.estimate.value == pytest.approx(0.03 / 0.3) and ratio.margin == pytest.approx(0.4)


@pytest.mark.parametrize(
    "arm, length, by_depth, failing",
    [
        ("standard", 512, [0.8, 0.9], {0, 2}),
        ("rpsd-skip", 512, [0.86, 0.92], {1}),
        ("standard", 1024, [0.45, 0.45], {3}),
        ("pose", 1024, [0.68, 0.68], {4}),
    ],
)
def test_each_expectation_can_fail(arm, length, by_depth, failing) -> None:
    changed = {**GOOD, arm: {**GOOD[arm], length: exam_of(by_depth)}}
    assert {index for index, verdict in enumerate(scores.judge(changed)) if not verdict.met} == failing
    assert all(verdict.met == (verdict.margin >= 0) for verdict in scores.judge(changed))


def test_what_was_not_run_is_not_judged() -> None:
    assert scores.judge({"rpsd-skip": {1024: exam_of([1.0, 1.0])}, "standard": GOOD["standard"]})[0].text.endswith(
        "1,024"
    )
    assert scores.judge({"pose": GOOD["pose"]}) == []
