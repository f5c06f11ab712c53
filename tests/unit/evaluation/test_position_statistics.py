"""Intervals against published tables, deviations against holes of known size, the bootstrap against the normal law."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rpsd.evaluation.position_statistics import (
    deviation,
    interval,
    make_bins,
    paired_interval,
    position_statistics,
    resampled_sums,
    standard_error,
    wilson,
)


@pytest.mark.parametrize(
    "found, number, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_newcombe_s_table(found: int, number: int, low: float, high: float) -> None:
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    ends = wilson(np.array([found / number]), np.array([number]))
    assert [float(end[0]) for end in ends] == pytest.approx([low, high], abs=5e-5)
    mirrored = wilson(np.array([1 - found / number]), np.array([number]))
    assert [float(end[0]) for end in mirrored] == pytest.approx([1 - high, 1 - low], abs=5e-5)


def test_a_paired_interval_by_hand() -> None:
    """100 trials, 10 gained, 4 lost: 6/102 +- 1.96 sqrt(15/102 - (6/102)^2) / sqrt(102)."""
    low, high = paired_interval(np.array([10.0]), np.array([4.0]), np.array([100.0]))
    assert (low[0], high[0]) == pytest.approx((-0.0147, 0.1324), abs=5e-5)
    # One trial says next to nothing, and all trials alike still leave doubt.
    low, high = paired_interval(np.array([0.0, 0.0, 0.0]), np.array([1.0, 20.0, 0.0]), np.array([1.0, 20.0, 20.0]))
    assert low[0] == -1.0 and high[0] > 0
    assert low[1] == -1.0 and -1.0 < high[1] < -0.7
    assert -0.2 < low[2] < 0 < high[2] < 0.2


def test_ten_bins_and_empty_ones_left_out() -> None:
    positions = [0.0, 0.05, 0.0999, 0.1, 0.3, 0.7, 0.95, 1.0]
    hits = [True, False, False, True, True, False, True, False]
    cell = position_statistics(positions, hits)
    assert [(b["low"], b["high"], b["n"], b["accuracy"]) for b in cell["bins"]] == [
        (0.0, 0.1, 3, pytest.approx(1 / 3)),
        (0.1, 0.2, 1, 1.0),
        (0.3, 0.4, 1, 1.0),
        (0.7, 0.8, 1, 0.0),
        (0.9, 1.0, 2, 0.5),
    ]
    assert cell["kind"] == "native" and cell["worst_bin"] == 3 and cell["range"] == 100.0
    shares = np.array([1 / 3, 1, 1, 0, 0.5])
    mean = shares.sum() / 5
    assert cell["deviation"] == pytest.approx(100 * (((shares - mean) ** 2).sum() / 5) ** 0.5)
    noise = (1 / 3 * 2 / 3 / 3 + 0.5 * 0.5 / 2) / 5
    assert cell["deviation_corrected"] == pytest.approx(100 * (((shares - mean) ** 2).sum() / 5 - noise) ** 0.5)
    for row in cell["bins"]:
        assert 0 <= row["wilson_low"] <= row["accuracy"] <= row["wilson_high"] <= 1


def test_a_grid_s_bins_are_its_depths() -> None:
    cell = position_statistics([0.5, 0.0, 0.5, 1.0], [True, True, False, False], grid=True)
    assert cell["kind"] == "grid" and cell["worst_bin"] == 2
    assert [(b["low"], b["high"], b["n"], b["accuracy"]) for b in cell["bins"]] == [
        (0.0, 0.0, 1, 1.0),
        (0.5, 0.5, 2, 0.5),
        (1.0, 1.0, 1, 0.0),
    ]


def test_no_evidence_no_statistics() -> None:
    assert position_statistics([], []) is None


def _simulated(accuracy: np.ndarray, runs: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw and corrected deviations [runs] of a model that is right with `accuracy` [10] in each bin."""
    found = np.random.default_rng(1).binomial(number, accuracy, (runs, 10)) / number
    counts = np.full(10, number)
    return deviation(found, counts), deviation(found, counts, noises=1)


def test_the_corrected_deviation_finds_a_known_hole() -> None:
    """0.9 everywhere, 0.4 in two of ten bins: the standard deviation is 0.5 sqrt(0.2 0.8) = 20 points."""
    accuracy = np.full(10, 0.9)
    accuracy[3:5] = 0.4
    raw, corrected = _simulated(accuracy, runs=4000, number=50)
    assert np.sqrt(np.mean(corrected**2)) == pytest.approx(20.0, abs=0.15)
    # The mean counting noise, (8 * 0.09 + 2 * 0.24) / 10 / 50, is in the raw one.
    assert np.sqrt(np.mean(raw**2)) == pytest.approx(np.sqrt(20.0**2 + 0.9 * 24.0), abs=0.15)


def test_an_even_model_has_noise_but_no_deviation() -> None:
    raw, corrected = _simulated(np.full(10, 0.5), runs=4000, number=50)
    assert np.sqrt(np.mean(raw**2)) == pytest.approx(100 * np.sqrt(0.9 * 0.25 / 50), rel=0.02)
    assert np.median(corrected) < 1.0 and np.mean(corrected) < 0.35 * np.mean(raw)


def test_a_resampled_sum_is_one_of_the_units_drawn() -> None:
    """Each draw has as many units as there are, and all columns of a draw are of the same units."""
    values = np.stack([np.ones(7), np.arange(7.0), 10.0 * np.arange(7.0)], axis=1)
    sums = resampled_sums(values, (1, 2), draws=500)
    assert sums.shape == (500, 3)
    assert (sums[:, 0] == 7).all() and np.allclose(sums[:, 2], 10 * sums[:, 1])
    assert len(set(sums[:, 1])) > 20
    assert (sums == resampled_sums(values, (1, 2), draws=500)).all()
    assert (sums != resampled_sums(values, (1, 3), draws=500)).any()


def test_the_bootstrap_of_a_mean_follows_the_normal_law() -> None:
    values = np.random.default_rng(3).gamma(2.0, 5.0, 4000)
    sums = resampled_sums(np.stack([np.ones(4000), values], axis=1), (0,))
    low, high = interval(sums[:, 1] / sums[:, 0])
    half = 1.959964 * values.std() / np.sqrt(4000)
    assert (float(low), float(high)) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)


def test_an_interval_leaves_empty_draws_out() -> None:
    draws = np.stack([np.arange(1001.0), np.where(np.arange(1001) % 2, np.nan, 5.0)], axis=1)
    low, high = interval(draws)
    assert low.tolist() == pytest.approx([25.0, 5.0]) and high.tolist() == pytest.approx([975.0, 5.0])


def test_a_grid_s_item_counts_once_in_the_standard_error() -> None:
    scores = np.random.default_rng(0).integers(0, 2, 40) * 100.0
    alone = standard_error(scores, range(40))
    assert alone == pytest.approx(scores.std(ddof=1) / np.sqrt(40))
    # The same answers at five depths are no new evidence; taken as 200 samples they would look sqrt(5) times surer.
    assert standard_error(np.repeat(scores, 5), np.repeat(range(40), 5)) == pytest.approx(alone)
    assert standard_error([100.0], ["a"]) is None
    assert standard_error([100.0, 0.0], ["a", "a"]) is None


def test_bins_know_each_observation_s_place() -> None:
    bins = make_bins([0.99, 0.01, 0.55, 0.02], grid=False)
    assert bins.index.tolist() == [2, 0, 1, 0]
    assert bins.low.tolist() == [0.0, 0.5, 0.9] and bins.high.tolist() == pytest.approx([0.1, 0.6, 1.0])
