"""From right answers to figures: accuracy by depth, its spread, bootstrap intervals, and what must hold.

Right answers of an arm are bool or float [S, N, D]: seeds, exam documents, depth deciles. Arms of one seed take the
same exam, so documents are resampled for both sides of a difference at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def by_depth(right: np.ndarray) -> np.ndarray:
    """Accuracy of every seed at every depth, [S, N, D] -> [S, D]."""
    return right.mean(axis=1)


def mean_accuracy(right: np.ndarray) -> float:
    """Mean over seeds, documents and depths of [S, N, D]."""
    return float(right.mean())


def depth_deviation(right: np.ndarray) -> float:
    """Standard deviation of accuracy over the depths, the mean over seeds; [S, N, D]."""
    return float(by_depth(right).std(axis=1).mean())


def worst_depth(right: np.ndarray) -> float:
    """Accuracy at the worst depth, the mean over seeds; [S, N, D]."""
    return float(by_depth(right).min(axis=1).mean())


def resampled(arrays: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """One draw: seeds with replacement, then documents with replacement within each, the same for all arrays."""
    seeds, documents = arrays[0].shape[:2]
    rows = rng.integers(0, seeds, seeds)[:, None]
    columns = rng.integers(0, documents, (seeds, documents))
    return [array[rows, columns] for array in arrays]


def bootstrap(statistic: Callable[..., float], *arrays: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """`statistic(*arrays)` and its 95 % percentile interval over seeds and documents.

    With one seed the interval holds the documents' chance alone.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(*resampled(arrays, rng)) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(float(statistic(*arrays)), float(low), float(high))


@dataclass(frozen=True)
class Expectation:
    """Something that a full run must show.

    Attributes:
        text: what, for a reader.
        length: exam length in tokens.
        arms: whose right answers the statistic takes, in its order.
        statistic: of one [S, N, D] an arm.
        bound: what it must reach, or must not exceed.
        at_most: the bound is from above.
    """

    text: str
    length: int
    arms: tuple[str, ...]
    statistic: Callable[..., float]
    bound: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def gap(better: np.ndarray, other: np.ndarray) -> float:
    """How much more accurate one arm is than another; both [S, N, D]."""
    return mean_accuracy(better) - mean_accuracy(other)


def _deviation_ratio(ours: np.ndarray, other: np.ndarray) -> float:
    return depth_deviation(ours) / max(depth_deviation(other), 1e-9)


EXPECTATIONS = (
    Expectation("RPSD skip - Standard, accuracy at 512", 512, ("rpsd-skip", "standard"), gap, 0.20),
    Expectation("RPSD skip, accuracy at 512", 512, ("rpsd-skip",), mean_accuracy, 0.90),
    Expectation("deviation over depths at 512, RPSD skip / Standard", 512, ("rpsd-skip", "standard"),
                _deviation_ratio, 0.50, at_most=True),
    Expectation("RPSD skip - Standard, accuracy at 1,024", 1024, ("rpsd-skip", "standard"), gap, 0.30),
    Expectation("RPSD skip - PoSE, accuracy at 1,024", 1024, ("rpsd-skip", "pose"), gap, 0.03),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """An expectation beside what was measured."""

    text: str
    bound: float
    at_most: bool
    estimate: Estimate
    by_seed: tuple[float, ...]
    met: bool

    @property
    def margin(self) -> float:
        """How far inside the bound the figure lies; negative where it fails."""
        return (self.bound - self.estimate.value) if self.at_most else (self.estimate.value - self.bound)


def judge(
    right: Mapping[str, Mapping[int, np.ndarray]], expectations: Sequence[Expectation] = EXPECTATIONS
) -> list[Verdict]:
    """A verdict for every expectation whose arms and length were run; `right` is arm -> length -> [S, N, D]."""
    verdicts = []
    for expected in expectations:
        if all(expected.length in right.get(arm, {}) for arm in expected.arms):
            arrays = [right[arm][expected.length] for arm in expected.arms]
            estimate = bootstrap(expected.statistic, *arrays)
            seeds = range(len(arrays[0]))
            alone = tuple(expected.statistic(*(array[seed : seed + 1] for array in arrays)) for seed in seeds)
            met = expected.met(estimate.value)
            verdicts.append(Verdict(expected.text, expected.bound, expected.at_most, estimate, alone, met))
    return verdicts
