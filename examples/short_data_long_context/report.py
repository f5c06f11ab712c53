"""The figures and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from examples.lab.report import (
    DEPTH_LABEL,
    accuracy_table,
    cost_table,
    depth_panels,
    html_list,
    verdict_table,
    versions_section,
)
from examples.lab.results import seeds_text
from examples.short_data_long_context.arms import MODELS, STUDENTS
from examples.short_data_long_context.instruments import CHUNK, REPEATS, SHIFTED_REPEAT, SHIFTS
from examples.short_data_long_context.results import cpu_seconds
from megatron_rpsd.report import html
from megatron_rpsd.report.depth import accuracy_by_depth
from megatron_rpsd.report.instruments import divergence_curves, trace_heat_maps, update_curves

_TITLES = tuple(MODELS[name].title for name in ("teacher", *STUDENTS))
_LOGITS = ("teacher", "phase-kd", "phase-kd-iso", "phase-ce-kd", "phase-ce")
_SCHEDULES = ("phase-kd", "large-kd", "small-kd", "large-ce", "small-ce", "phase-10000-kd", "small-10000-kd")
_HEAT_MAP_SHIFT = str(SHIFTS[-2])


def _depth_figure(results: Mapping, names: Sequence[str]) -> bytes | None:
    present = [name for name in names if name in results["arms"]]
    return accuracy_by_depth(depth_panels(results, present), _TITLES, DEPTH_LABEL) if present else None


def _over_seeds(results: Mapping, kind: str, name: str, *keys: str) -> np.ndarray | None:
    """Mean over the seeds of an array in the instruments' records; None where the model was not looked into."""
    seeds = [seed[name] for seed in results[kind].values() if name in seed]
    for key in keys:
        seeds = [seed[key] for seed in seeds]
    return np.mean(seeds, axis=0) if seeds else None


def _trace_figures(results: Mapping, name: str) -> dict[str, bytes]:
    if name not in next(iter(results["traces"].values())):
        return {}
    one = next(iter(results["traces"].values()))[name]
    curves = [
        {
            f"shift {shift}": _over_seeds(results, "traces", name, "shifts", str(shift), key)
            for shift in one["settings"]["shifts"]
        }
        for key in ("kl_per_repeat", "kl_by_distance")
    ]
    maps = {
        quantity: _over_seeds(
            results, "traces", name, "shifts", _HEAT_MAP_SHIFT, "relative_change", quantity, "per_repeat"
        )
        for quantity in one["shifts"][_HEAT_MAP_SHIFT]["relative_change"]
    }
    title = f"{MODELS[name].title}: repeat {SHIFTED_REPEAT} alone shifted by {_HEAT_MAP_SHIFT}"
    return {
        "trace": divergence_curves(*curves, one["distances"]),
        "trace_layers": trace_heat_maps(maps, SHIFTED_REPEAT, title),
    }


def _update_figure(results: Mapping, name: str) -> bytes | None:
    curves = {key: _over_seeds(results, "updates", name, "mean", key) for key in ("W_q", "W_k", "W_v")}
    if any(curve is None for curve in curves.values()):
        return None
    one = next(iter(results["updates"].values()))[name]
    return update_curves(curves, np.array(one["wavelengths"]), one["window"])


def draw_figures(results: Mapping) -> dict[str, bytes]:
    """PNGs by name; those of models that were not run are left out."""
    drawn = {
        "depth_logits": _depth_figure(results, _LOGITS),
        "depth_schedules": _depth_figure(results, _SCHEDULES),
        **_trace_figures(results, "phase-kd"),
        **{f"updates_{name.replace('-', '_')}": _update_figure(results, name) for name in ("phase-kd", "small-kd")},
    }
    return {name: png for name, png in drawn.items() if png is not None}


_DEPTH = (
    "Mean over seeds; the band runs from the lowest to the highest seed. Depth 0 is the start of the document, 100 its "
    "end, where the queries stand."
)
_CAPTIONS = {
    "depth_schedules": ("Schedules", _DEPTH),
    "depth_logits": ("Losses and teachers", _DEPTH),
    "trace": (
        "A shift's way to the logits",
        f"A chunk of {CHUNK} random tokens, {REPEATS} times; the positions of repeat {SHIFTED_REPEAT} (counted from 0) "
        "alone are shifted. Left: KL of the next token by repeat. Right: by the distance from the first shifted token.",
    ),
    "trace_layers": (
        "A shift's way through the layers",
        "Behind the shifted repeat the first layer's queries and keys are those of the standard reading; what changes "
        "there was carried by attention.",
    ),
    "updates_phase_kd": (
        "Updates under phase KD",
        "Change of each projection from the base (theta 100) to the student, by RoPE index; W_v, which is not rotated, "
        "is the control. Wavelengths are those of the student's theta, 500,000.",
    ),
    "updates_small_kd": ("Updates under constant small KD", "The same at a constant theta of 100."),
}
_OF_FINDING = (
    ("depth_schedules",),
    ("depth_logits", "trace", "trace_layers"),
    ("updates_phase_kd", "updates_small_kd"),
)


def _figure(figures: Mapping[str, bytes], name: str) -> html.Markup | str:
    if name not in figures:
        return ""
    title, caption = _CAPTIONS[name]
    return html.figure(figures[name], f"{title}. {caption}", title)


def _finding(number: int, results: Mapping, figures: Mapping[str, bytes]) -> html.Markup:
    finding = results["findings"][number]
    held = sum(verdict["met"] for verdict in finding["verdicts"])
    count = len(finding["verdicts"])
    return html.section(
        f"Finding {number + 1}: {finding['title']}",
        html.paragraph("What this miniature shows:"),
        html_list(finding["shown"] or ["Nothing: its arms were not run."]),
        verdict_table(results, finding["verdicts"]) if count else "",
        html.paragraph(f"{held} of {count} expectations held.") if count else "",
        *(_figure(figures, name) for name in _OF_FINDING[number]),
    )


def _intro(results: Mapping) -> str:
    settings, bases = results["settings"], results["base"]
    accuracies = ", ".join(
        f"{np.mean([run['accuracy'] for run in of_seed.values()]):.3f} ({MODELS[name].title})"
        for name, of_seed in bases.items()
    )
    base, teacher, student = (settings[name] for name in ("base", "teacher", "student"))
    return (
        "The experiment of arXiv 2604.06070 on a two-layer model of 97 thousand parameters. Bases learn at "
        f"{base['seq_length']} tokens to look keys up (accuracy there: {accuracies}). A teacher, from a base of "
        f"its own, is extended on documents of {teacher['seq_length']} tokens in {teacher['steps']} steps. "
        f"Students are extended in {student['steps']} steps on windows of {student['seq_length']} tokens, packed "
        f"with independent samples of {settings['shortest_sample']} to {settings['longest_sample']} tokens: every "
        "query's evidence stands in its own sample. They learn by cross-entropy (CE), by the forward KL from the "
        "teacher (KD), or by both; their attention runs over the whole window. Exams ask for evidence at every "
        "depth of a long document. phase: theta 100 while windows are short and 500,000 while they are long; "
        "small, large: a constant theta of 100 or 500,000; iso: the teacher's attention is cut at sample borders. "
        f"Every run is megatron_rpsd.training.main on one CPU rank. {seeds_text(results)}."
    )


def build_page(results: Mapping, figures: Mapping[str, bytes]) -> str:
    """The report; `figures` are PNGs by name."""
    names = list(results["arms"])
    interval = f"In brackets: 95 % bootstrap intervals over seeds and documents ({seeds_text(results)})."
    cost = (
        f"Means over seeds; the teacher's and each student's own run. All training runs of the report together, bases "
        f"included: {cpu_seconds(results):,.0f} CPU seconds."
    )
    commands = [*results["base_commands"].values(), *(arm["command"] for arm in results["arms"].values())]
    return html.page(
        "Short data, long context, in miniature",
        html.paragraph(_intro(results)),
        accuracy_table(results, names, interval),
        *(_finding(number, results, figures) for number in range(len(results["findings"]))),
        html.section("Limits", html_list(results["limits"])),
        html.section("Cost", cost_table(results, names, cost)),
        html.section("The same runs from a shell", html.code_block("\n\n".join(commands))),
        versions_section(results),
    )
