"""From records to results.json, and the lines for the terminal."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from examples.lab import scores
from examples.lab.arms import ARMS
from examples.lab.records import right_answers
from examples.lab.settings import Settings
from megatron_rpsd.data.files import replace_file, write_json

LIMITS = (
    "Deviation over depths means something only where no arm is on the floor: at 512 tokens.",
    "RPSD skip and PoSE train with positions up to twice the window. 1,024 is extrapolation in tokens, not in "
    "positions; 2,048 is beyond both.",
    "97 thousand parameters on a synthetic language show a direction, not a magnitude.",
    "The gap to Standard needs data whose evidence is near: the data are biased here, on purpose. The gap to "
    "PoSE and to hard labels needs a loss on all tokens, not on answers alone.",
    "Not claimed: RPSD skip over PoSE at 512, cyclic over PoSE, anything at 2,048.",
)
RUN_FIELDS = ("steps", "seconds_per_step", "loop_seconds", "wall_seconds", "cpu_seconds", "curve_steps", "curves")

Records = Mapping[int, Mapping[str, Mapping]]


def collect_right(records: Records, lengths: Sequence[int]) -> dict[str, dict[int, np.ndarray]]:
    """Right answers, arm -> length -> float [S, N, 10]."""
    arms = [name for name in next(iter(records.values())) if name != "base"]
    return {
        arm: {
            length: np.stack([right_answers(of_seed[arm], length) for of_seed in records.values()])
            for length in lengths
        }
        for arm in arms
    }


def scored(right: np.ndarray) -> dict:
    """Accuracy, its spread over depths, and both by seed, of right answers [S, N, D] at one length."""
    estimate = scores.bootstrap
    return {
        "accuracy": dataclasses.asdict(estimate(scores.mean_accuracy, right)),
        "depth_deviation": dataclasses.asdict(estimate(scores.depth_deviation, right)),
        "worst_depth": dataclasses.asdict(estimate(scores.worst_depth, right)),
        "by_depth": scores.by_depth(right).mean(axis=0).tolist(),
        "by_seed": {"accuracy": right.mean(axis=(1, 2)).tolist(), "by_depth": scores.by_depth(right).tolist()},
    }


def run_result(
    title: str, flags: Sequence[str], records: Mapping[int, Mapping], by_length: Mapping[int, np.ndarray]
) -> dict:
    """A model's entry in results.json: its scores, and its runs by seed.

    Args:
        records: of its runs, by seed.
        by_length: its right answers [S, N, D] by exam length.
    """
    return {
        "title": title,
        "flags": list(flags),
        "exams": {str(length): scored(right) for length, right in by_length.items()},
        "runs": {str(seed): {name: record[name] for name in RUN_FIELDS} for seed, record in records.items()},
        "command": next(iter(records.values()))["command"],
    }


def base_results(records: Mapping[int, Mapping], window: int) -> dict:
    """A base's accuracy at its own window and its runs, by seed."""
    return {
        str(seed): {
            "accuracy": float(right_answers(record, window).mean()),
            **{name: record[name] for name in RUN_FIELDS},
        }
        for seed, record in records.items()
    }


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    names = ("megatron-core", "torch", "numpy")
    return {"Python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def make_results(settings: Settings, records: Records, lengths: Sequence[int]) -> dict:
    """What results.json holds: per arm, seed and length, and the verdicts."""
    right = collect_right(records, lengths)
    arms = {
        arm: {
            **run_result(ARMS[arm].title, ARMS[arm].flags, _of(records, arm), by_length),
            "time_of": ARMS[arm].time_of,
            "same_as": ARMS[arm].same_as,
        }
        for arm, by_length in right.items()
    }
    return {
        "settings": dataclasses.asdict(settings),
        "seeds": list(records),
        "lengths": list(lengths),
        "base": base_results(_of(records, "base"), settings.base.seq_length),
        "base_command": next(iter(records.values()))["base"]["command"],
        "arms": arms,
        "verdicts": [{**dataclasses.asdict(one), "margin": one.margin} for one in scores.judge(right)],
        "limits": list(LIMITS),
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _of(records: Records, name: str) -> dict[int, Mapping]:
    return {seed: of_seed[name] for seed, of_seed in records.items()}


def write_results(output: Path, settings: Settings, records: Records, lengths: Sequence[int]) -> dict:
    """results.json, report.html and its figures as PNGs; each written aside and renamed."""
    from examples.lab.report import build_page, draw_figures

    results = make_results(settings, records, lengths)
    write_report(output, results, draw_figures(results), build_page)
    return results


def write_report(
    output: Path,
    results: Mapping,
    figures: Mapping[str, bytes],
    build_page: Callable[[Mapping, Mapping[str, bytes]], str],
) -> None:
    """results.json, the page and its figures as PNGs; each written aside and renamed."""
    for name, png in figures.items():
        replace_file(output / f"{name}.png", png)
    replace_file(output / "report.html", build_page(results, figures).encode())
    write_json(output / "results.json", results)


def mean_of_runs(arm: Mapping, name: str) -> float:
    """Mean over the seeds of a number of an arm's runs."""
    return float(np.mean([run[name] for run in arm["runs"].values()]))


def failed_expectations(results: Mapping) -> list[str]:
    """A line for every expectation that does not hold."""
    return [
        f"{verdict['text']} is {verdict['estimate']['value']:.3f}, expected {bound_text(verdict)}"
        for verdict in results["verdicts"]
        if not verdict["met"]
    ]


def bound_text(verdict: Mapping) -> str:
    """The bound of a verdict, such as 'at least 0.20'."""
    return f"at {'most' if verdict['at_most'] else 'least'} {verdict['bound']:.2f}"


def seeds_text(results: Mapping) -> str:
    """How many seeds the figures are of."""
    count = len(results["seeds"])
    return f"{count} seeds" if count > 1 else "one seed"


def summary_lines(results: Mapping) -> list[str]:
    """The end of a run, for the terminal."""
    lengths = [str(length) for length in results["lengths"]]
    first = lengths[0]
    lines = [
        f"{'accuracy, ' + seeds_text(results):28}" + "".join(f"{length:>8}" for length in lengths)
        + f"{'dev ' + first:>10}{'steps':>8}{'ms/step':>9}{'loop s':>8}"
    ]  # fmt: skip
    for arm in results["arms"].values():
        exams = arm["exams"]
        lines.append(
            f"{arm['title']:28}" + "".join(f"{exams[length]['accuracy']['value']:8.3f}" for length in lengths)
            + f"{exams[first]['depth_deviation']['value']:10.3f}{mean_of_runs(arm, 'steps'):8.0f}"
            + f"{1000 * mean_of_runs(arm, 'seconds_per_step'):9.1f}{mean_of_runs(arm, 'loop_seconds'):8.1f}"
        )  # fmt: skip
    if results["verdicts"]:
        lines.append("")
    for verdict in results["verdicts"]:
        estimate = verdict["estimate"]
        lines.append(
            f"{'holds' if verdict['met'] else 'FAILS'}: {verdict['text']}: {estimate['value']:.3f} "
            f"[{estimate['low']:.3f}, {estimate['high']:.3f}], expected {bound_text(verdict)} ({seeds_text(results)})"
        )
    return lines
