"""From records to results.json and the report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.lab.results import Records, base_results, collect_right, run_result, versions, write_report
from examples.short_data_long_context.arms import BASES, MODELS
from examples.short_data_long_context.findings import LIMITS, findings
from examples.short_data_long_context.instruments import SHIFTED_REPEAT
from examples.short_data_long_context.settings import Settings


def make_results(settings: Settings, records: Records, lengths: Sequence[int]) -> dict:
    """What results.json holds: per model, seed and length accuracy by depth; traces, updates, findings."""
    names = [name for name in next(iter(records.values())) if name in MODELS]
    of = {name: {seed: of_seed[name] for seed, of_seed in records.items()} for name in names}
    examined = [name for name in names if name not in BASES]
    right = collect_right(
        {seed: {name: of_seed[name] for name in examined} for seed, of_seed in records.items()}, lengths
    )
    looked = [of_seed["instruments"] for of_seed in records.values()]
    found = findings(right, looked)
    return {
        "settings": dataclasses.asdict(settings),
        "seeds": list(records),
        "lengths": list(lengths),
        "base": {name: base_results(of[name], settings.base.seq_length) for name in names if name in BASES},
        "base_commands": {name: next(iter(of[name].values()))["command"] for name in names if name in BASES},
        "arms": {
            name: {
                **run_result(MODELS[name].title, MODELS[name].objective, of[name], right[name]),
                "theta_before": MODELS[MODELS[name].start].theta,
                "theta": MODELS[name].theta,
            }
            for name in examined
        },
        "shifted_repeat": SHIFTED_REPEAT,
        "traces": {str(seed): seen["traces"] for seed, seen in zip(records, looked, strict=True)},
        "updates": {str(seed): seen["updates"] for seed, seen in zip(records, looked, strict=True)},
        "findings": found,
        "verdicts": [verdict for finding in found for verdict in finding["verdicts"]],
        "limits": list(LIMITS),
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)),
    }


def write_results(output: Path, settings: Settings, records: Records, lengths: Sequence[int]) -> dict:
    """results.json, report.html and its figures; each written aside and renamed."""
    from examples.short_data_long_context.report import build_page, draw_figures

    results = make_results(settings, records, lengths)
    write_report(output, results, draw_figures(results), build_page)
    return results


def cpu_seconds(results: Mapping) -> float:
    """Of all training runs."""
    runs = [*results["base"].values(), *(arm["runs"] for arm in results["arms"].values())]
    return sum(run["cpu_seconds"] for of_seed in runs for run in of_seed.values())
