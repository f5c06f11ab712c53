"""Accuracy by the place where the evidence stands, how much it varies, and how sure that is.

An observation is one piece of evidence: its position, as a share of the prompt from 0 to 1, and whether it was found.
Bins are ten equal parts of the prompt, or a grid's depths. Accuracies are shares from 0 to 1, deviations are points
from 0 to 100. Bins without an observation are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 10
LEVEL = 0.95
NORMAL_95 = 1.959963984540054
"""The normal distribution's quantile at 0.975."""
DRAWS = 10_000
# So many draws times units are counted at a time: more leave the processor's cache and take three times as long.
_WEIGHTS_AT_ONCE = 200_000


@dataclass(frozen=True)
class Bins:
    """B bins that hold observations, and the bin of each of N observations."""

    low: np.ndarray
    """[B], ascending shares of the prompt; equal to `high` in grids."""
    high: np.ndarray
    """[B]"""
    index: np.ndarray
    """[N] int, the observation's bin."""


def make_bins(positions: Sequence[float], grid: bool) -> Bins:
    """Bins of observations at `positions` [N]: ten equal parts, or each depth that occurs where they are a grid's."""
    places = np.asarray(positions, dtype=np.float64)
    if grid:
        depths, index = np.unique(places, return_inverse=True)
        return Bins(depths, depths, index)
    part = np.clip((places * BINS).astype(np.int64), 0, BINS - 1)
    held, index = np.unique(part, return_inverse=True)
    return Bins(held / BINS, (held + 1) / BINS, index)


def wilson(accuracy: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The score interval at 95 % of a share found in `number` independent trials (E. B. Wilson, JASA 22, 1927).

    Unlike accuracy +- 1.96 standard errors it stays inside [0, 1] and has a width at 0 and 1.
    """
    square = NORMAL_95**2
    shrink = 1.0 + square / number
    centre = (accuracy + square / (2 * number)) / shrink
    half = NORMAL_95 / shrink * np.sqrt(accuracy * (1 - accuracy) / number + square / (4 * number**2))
    # At shares of 0 and 1 an end is 0 or 1 exactly; rounding must not put it outside.
    return np.clip(centre - half, 0.0, 1.0), np.clip(centre + half, 0.0, 1.0)


def paired_interval(gained: np.ndarray, lost: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of the difference of two shares on the same trials (Agresti and Min, Statistics in Medicine 24,
    2005): half a trial is added to each of both right, both wrong, gained and lost. All arrays [...], in [-1, 1].

    A bin may hold few trials. Where all of them changed alike, draws with replacement have no spread at all; this
    interval always has.

    Args:
        gained: trials that the second found and the first did not.
        lost: the other way round.
        number: of all trials.
    """
    total = number + 2.0
    centre = (gained - lost) / total
    half = NORMAL_95 * np.sqrt((gained + lost + 1.0) / total - centre**2) / np.sqrt(total)
    return np.clip(centre - half, -1.0, 1.0), np.clip(centre + half, -1.0, 1.0)


def deviation(accuracy: np.ndarray, number: np.ndarray, noises: int = 0) -> np.ndarray:
    """Standard deviation of accuracy over bins, in points, less the counting noise: [..., B] twice -> [...].

    A model whose accuracy is the same everywhere still differs from bin to bin, by a variance of p (1 - p) / n in a bin
    of n observations. So: sqrt(max(0, Var_bins(p) - noises * mean_bins(p (1 - p) / n))), the variance being that of the
    bins themselves (divided by B). p (1 - p) / n takes observations as independent; several of one sample (multivalue,
    multiquery, vt) may not be.

    Args:
        accuracy: NaN where a bin is empty.
        number: observations of each bin.
        noises: 0 is the raw deviation, 1 takes the sample's noise off, 2 a resample's too.
    """
    noise = np.nanmean(accuracy * (1 - accuracy) / np.maximum(number, 1), axis=-1)
    return 100 * np.sqrt(np.maximum(0.0, np.nanvar(accuracy, axis=-1) - noises * noise))


def position_statistics(positions: Sequence[float], hits: Sequence[bool], grid: bool = False) -> dict | None:
    """What scores.json says of a cell's positions, or None without observations.

    Args:
        positions: [N], shares of the prompt; in grids the depths.
        hits: [N], whether each piece of evidence was found.
        grid: the bins are the depths themselves.

    Returns:
        kind, bins (low, high, n, accuracy, wilson_low, wilson_high), deviation, deviation_corrected, range (points) and
        worst_bin, an index of `bins`.
    """
    if not positions:
        return None
    bins = make_bins(positions, grid)
    number = np.bincount(bins.index)
    accuracy = np.bincount(bins.index, weights=np.asarray(hits, dtype=np.float64)) / number
    columns = (bins.low, bins.high, number, accuracy, *wilson(accuracy, number))
    names = ("low", "high", "n", "accuracy", "wilson_low", "wilson_high")
    return {
        "kind": "grid" if grid else "native",
        "bins": [dict(zip(names, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)],
        "deviation": float(deviation(accuracy, number)),
        "deviation_corrected": float(deviation(accuracy, number, noises=1)),
        "range": float(100 * (accuracy.max() - accuracy.min())),
        "worst_bin": int(accuracy.argmin()),
    }


def standard_error(scores: Sequence[float], units: Sequence[object]) -> float | None:
    """Standard error of the mean of `scores` [N], samples of one unit (a grid's item) counting as one draw.

    None for a single unit, which says nothing of chance.
    """
    _, index = np.unique(np.asarray(units), return_inverse=True)
    values = np.asarray(scores, dtype=np.float64)
    number = int(index.max()) + 1
    if number < 2:
        return None
    rests = np.bincount(index, weights=values - values.mean())
    return float(np.sqrt(number / (number - 1) * (rests**2).sum()) / len(values))


def resampled_sums(values: np.ndarray, seed: Sequence[int], draws: int = DRAWS) -> np.ndarray:
    """Sums over units drawn with replacement, as many as there are: [U, K] -> [draws, K].

    All K columns of a draw are of the same units, which pairs what two models did on one sample. The same `seed`
    repeats the draws.
    """
    rng, units = np.random.default_rng(list(seed)), len(values)
    at_once = max(1, _WEIGHTS_AT_ONCE // units)
    sums = []
    for start in range(0, draws, at_once):
        rows = min(at_once, draws - start)
        # A draw's weights are how often each unit came; the offset counts all rows' at once.
        drawn = rng.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        sums.append(weights.astype(np.float64) @ values)
    return np.concatenate(sums)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval of draws [draws, ...] -> two of [...]; NaN draws (an empty bin) are left out."""
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high
