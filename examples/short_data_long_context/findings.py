"""What a full run must show, and the paper's three findings beside what this miniature shows of each, in numbers.

Bounds stand well inside the worst of five seeds of an independent implementation of this experiment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from examples.lab.scores import Expectation, Verdict, bootstrap, gap, judge, mean_accuracy
from examples.short_data_long_context.arms import MODELS
from examples.short_data_long_context.instruments import band_ratio, response_ratio
from examples.short_data_long_context.statements import Looked, Right, about_logits, about_schedules, about_updates


@dataclass(frozen=True)
class Reading:
    """An expectation of what an instrument shows.

    Attributes:
        kind, model: what must be there for it, such as the traces of phase-kd.
        figure: of one seed.
    """

    text: str
    kind: str
    model: str
    figure: Callable[[Mapping], float]
    bound: float
    at_most: bool = False


def _trace(text: str, figure: Callable[[Mapping], float], bound: float, at_most: bool = False) -> Reading:
    return Reading(f"trace of phase KD: {text}", "traces", "phase-kd", figure, bound, at_most)


def _band(student: str, projection: str, bound: float, at_most: bool = False) -> Reading:
    text = f"{MODELS[student].title}: {projection}, change of indices 3 to 6 over that of the slow half"
    return Reading(text, "updates", student, lambda seed: band_ratio(seed, student, projection), bound, at_most)


def _above(better: str, other: str, length: int, bound: float) -> Expectation:
    text = f"{MODELS[better].title} - {MODELS[other].title}, accuracy at {length:,}"
    return Expectation(text, length, (better, other), gap, bound)


def _accurate(model: str, bound: float) -> Expectation:
    return Expectation(f"{MODELS[model].title}, accuracy at 512", 512, (model,), mean_accuracy, bound)


@dataclass(frozen=True)
class Finding:
    """One of the paper's findings.

    Attributes:
        title: what the paper finds (arXiv 2604.06070).
        expectations: on accuracies, and on the instruments' figures.
    """

    title: str
    expectations: tuple[Expectation | Reading, ...]


FINDINGS = (
    Finding(
        "Phase-wise RoPE scaling gives the best long context, under distillation too",
        (_above("phase-kd", "large-kd", 512, 0.03), _above("phase-kd", "small-kd", 512, 0.5)),
    ),
    Finding(
        "Positional information crosses through the logits of packed short data",
        (
            _accurate("teacher", 0.95),
            _accurate("phase-kd", 0.80),
            _above("phase-kd", "phase-ce", 512, 0.12),
            _above("phase-kd", "phase-ce", 1024, 0.10),
            _above("phase-kd", "phase-kd-iso", 512, 0.15),
            _above("large-kd", "large-ce", 512, 0.25),
            _trace(
                "largest change of anything before the shifted repeat",
                lambda seed: seed["traces"]["phase-kd"]["largest_before_border"], 0.0, at_most=True,
            ),
            _trace(
                "KL at a shift of 256 over that at 1, in the shifted repeat",
                lambda seed: response_ratio(seed, "phase-kd"), 10.0,
            ),
        ),
    ),
    Finding(
        "Long-context extension changes the query state in structured spans; the slow dimensions change most",
        (
            _band("phase-kd", "W_q", 1.8),
            _band("phase-kd", "W_k", 1.5),
            _band("phase-kd", "W_v", 0.85),
            _band("phase-kd", "W_v", 1.15, at_most=True),
            _band("small-kd", "W_q", 1.5, at_most=True),
        ),
    ),
)  # fmt: skip


def verdicts_of(finding: Finding, right: Right, looked: Looked) -> list[Verdict]:
    """A verdict for every expectation whose models were run, in the finding's order."""
    verdicts = []
    for expected in finding.expectations:
        if isinstance(expected, Expectation):
            verdicts += judge(right, (expected,))
        elif all(expected.model in seed[expected.kind] for seed in looked):
            verdicts.append(_judge_reading(expected, [expected.figure(seed) for seed in looked]))
    return verdicts


def _judge_reading(expected: Reading, values: Sequence[float]) -> Verdict:
    estimate = bootstrap(mean_accuracy, np.array(values)[:, None, None])
    met = estimate.value <= expected.bound if expected.at_most else estimate.value >= expected.bound
    return Verdict(expected.text, expected.bound, expected.at_most, estimate, tuple(values), met)


def findings(right: Right, looked: Looked) -> list[dict]:
    """Every finding: its title, what was measured in sentences, and its verdicts; for results.json."""
    shown = (about_schedules(right), about_logits(right, looked), about_updates(looked))
    return [
        {
            "title": finding.title,
            "shown": sentences,
            "verdicts": [
                {**dataclasses.asdict(one), "margin": one.margin} for one in verdicts_of(finding, right, looked)
            ],
        }
        for finding, sentences in zip(FINDINGS, shown, strict=True)
    ]


LIMITS = (
    "97 thousand parameters on a synthetic language, teacher and student of one size: a direction, not a magnitude.",
    "Students train with positions up to 512, so 1,024 is extrapolation in tokens and in positions.",
    "Keys come from one pool and recur in other samples of a window by chance; the samples hold needles more densely "
    "(0.20 a slot) than the exams (0.08), so that they often do. How much of the gain this carries is not measured.",
    "A base that was never extended responds to a shift of positions, too: it is no evidence of retrieval.",
    "The updates' band moves under cross-entropy as well, which fails: a band is no evidence of success.",
    "Not shown: that the teacher's response to a shift passes to the student token by token, and that W_q changes more "
    "than W_k.",
    "Not measured here: other window lengths, a teacher without long context, packing with the student's own attention "
    "cut.",
)
