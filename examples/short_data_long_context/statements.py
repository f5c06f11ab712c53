"""What was measured beside each of the paper's findings, in sentences; each says what came out, either way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from examples.lab.scores import mean_accuracy
from examples.lab.settings import MODEL_FLAGS
from examples.short_data_long_context.arms import MODELS
from examples.short_data_long_context.instruments import (
    BAND,
    SHIFTS,
    SLOW,
    later_inputs_changed,
    later_response,
    shift_response,
)
from examples.short_data_long_context.settings import MIDDLE, SMALL

Right = Mapping[str, Mapping[int, np.ndarray]]
"""model -> exam length -> right answers [S, N, D]"""
Looked = Sequence[Mapping]
"""what `instruments.look_into` returned, seed by seed"""


def _accuracies(right: Right, model: str) -> str:
    return ", ".join(f"{mean_accuracy(marks):.3f} at {length:,}" for length, marks in right[model].items())


def _against(right: Right, ours: str, other: str) -> str:
    """Both accuracies at every length, and in how many seeds ours is ahead."""
    parts = []
    for length, marks in right[ours].items():
        theirs = right[other][length]
        ahead = int((marks.mean(axis=(1, 2)) > theirs.mean(axis=(1, 2))).sum())
        figures = f"{mean_accuracy(marks):.3f} against {mean_accuracy(theirs):.3f}"
        parts.append(f"{figures} at {length:,} (ahead in {ahead} of {len(marks)} seeds)")
    return ", ".join(parts)


def about_schedules(right: Right) -> list[str]:
    """Phase-wise against constant thetas."""
    lines = []
    for loss in ("kd", "ce"):
        names = [name for name in (f"phase-{loss}", f"large-{loss}", f"small-{loss}") if name in right]
        if len(names) > 1:
            length = min(right[names[0]])
            best = max(names, key=lambda name: mean_accuracy(right[name][length]))
            figures = "; ".join(f"{MODELS[name].title} {_accuracies(right, name)}" for name in names)
            lines.append(f"{figures}. Best at {length:,}: {MODELS[best].title}.")
    if {"phase-kd", "large-kd"} <= set(right):
        lines.append(f"phase KD against large KD: {_against(right, 'phase-kd', 'large-kd')}.")
    if "small-kd" in right:
        slowest = 2 * math.pi * SMALL ** (1 - 2 / MODEL_FLAGS["--kv-channels"])
        lines.append(
            f"A constant theta of {SMALL} fails by construction: its slowest pair turns once in {slowest:.0f} tokens, "
            "fewer than the window has."
        )
    if {"phase-10000-kd", "small-10000-kd"} <= set(right):
        figures = _against(right, "phase-10000-kd", "small-10000-kd")
        lines.append(f"From a small theta of {MIDDLE:,}, which covers the window, phase against constant: {figures}.")
    return lines


def about_logits(right: Right, looked: Looked) -> list[str]:
    """What the teacher's logits carry, and the traces."""
    lines = []
    for other, what in (
        ("phase-ce", "cross-entropy on the same windows"),
        ("phase-ce-kd", "cross-entropy and KD together"),
        ("phase-kd-iso", "KD from the same teacher, its attention cut at sample borders"),
    ):
        if {other, "phase-kd"} <= set(right):
            lines.append(f"phase KD against {what}: {_against(right, 'phase-kd', other)}.")
    if {"phase-kd", "phase-kd-iso"} <= set(right):
        worth = ", ".join(
            f"{mean_accuracy(marks) - mean_accuracy(right['phase-kd-iso'][length]):+.3f} at {length:,}"
            for length, marks in right["phase-kd"].items()
        )
        lines.append(f"What the teacher reads across sample borders is worth {worth}.")
    return [*lines, *_about_traces(looked)]


def _mean(looked: Looked, figure: Callable[..., float], *given) -> float:
    return float(np.mean([figure(seed, *given) for seed in looked]))


def _about_traces(looked: Looked) -> list[str]:
    lines = []
    for name in looked[0]["traces"]:
        here = ", ".join(f"{_mean(looked, shift_response, name, shift):.3f} at {shift}" for shift in SHIFTS)
        behind = ", ".join(f"{_mean(looked, later_response, name, shift):.3f}" for shift in SHIFTS)
        changed = max(later_inputs_changed(seed, name) for seed in looked)
        lines.append(
            f"Trace of {MODELS[name].title}: KL of the next token in the shifted repeat {here}; behind it {behind}, "
            f"where the first layer's queries and keys changed by {changed:g}."
        )
    base, farthest = f"base-{SMALL}", SHIFTS[-1]
    if {"phase-kd", base} <= set(looked[0]["traces"]):
        before, after = (_mean(looked, shift_response, name, farthest) for name in (base, "phase-kd"))
        more = "more" if before > after else "less"
        lines.append(
            f"The base, before any extension, is {more} sensitive to a shift of {farthest} than the student: "
            f"{before:.3f} against {after:.3f} nats."
        )
    return lines


def about_updates(looked: Looked) -> list[str]:
    """Which frequencies changed."""
    lines, band = [], {}
    for name in looked[0]["updates"]:
        curves = {
            projection: np.mean([seed["updates"][name]["mean"][projection] for seed in looked], axis=0)
            for projection in ("W_q", "W_k", "W_v")
        }
        waves = looked[0]["updates"][name]["wavelengths"]
        top = sorted(int(index) for index in np.argsort(-curves["W_q"])[:4])
        ratios = ", ".join(f"{key} {curve[BAND].mean() / curve[SLOW].mean():.2f}" for key, curve in curves.items())
        indices = ", ".join(map(str, top))
        lines.append(
            f"{MODELS[name].title}: W_q changes most at indices {indices} of 0 to {len(waves) - 1} (wavelengths "
            f"{waves[top[0]]:.0f} to {waves[top[-1]]:.0f} tokens); {_slow(curves['W_q'])}. Indices 3 to 6 over the "
            f"slow half: {ratios}."
        )
        band[name] = float(curves["W_q"][BAND].mean())
    if {"phase-kd", "phase-ce"} <= set(band):
        lines.append(
            f"Relative change of W_q at indices 3 to 6: {band['phase-kd']:.3f} under phase KD, {band['phase-ce']:.3f} "
            "under phase CE."
        )
    return lines


def _slow(curve: np.ndarray) -> str:
    """How the slow half, indices 8 to 15, stands to the rest."""
    ratio = float(curve[SLOW].mean() / curve[: SLOW.start].mean())
    verdict = "less" if ratio < 1 else "more"
    return f"the slow half (indices 8 to 15) changes {verdict} than the fast half, {ratio:.2f} of it"
