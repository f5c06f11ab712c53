"""Dictionaries as scores.json and compare.json hold them, made from a rule for each cell's accuracy by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megatron_rpsd.ruler.tasks import RULER_TASKS

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
TASKS = tuple(RULER_TASKS)
Rule = Callable[[str, int, float], float]
"""(task, length, position 0..1) -> accuracy 0..1"""


def wilson(share: float, n: int) -> tuple[float, float]:
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def lost_in_the_middle(task: str, length: int, position: float) -> float:
    """A model that loses the middle of long prompts, and hard tasks sooner."""
    hardness = (TASKS.index(task.partition("@")[0]) if task.partition("@")[0] in TASKS else 3) / 20
    depth = math.log2(length / 2048) / 8
    return min(1.0, max(0.0, 1.02 - depth * hardness - depth * depth * 2.4 * position * (1 - position)))


def position_entry(accuracies: Sequence[float | None], n: int = 50, kind: str = "native") -> dict:
    count = len(accuracies)
    bins = []
    for index, accuracy in enumerate(accuracies):
        low, high = wilson(accuracy, n) if accuracy is not None else (None, None)
        edges = (index / count, (index + 1) / count) if kind == "native" else (index / max(count - 1, 1),) * 2
        bins.append(
            {"low": edges[0], "high": edges[1], "n": n if accuracy is not None else 0, "accuracy": accuracy,
             "wilson_low": low, "wilson_high": high}
        )  # fmt: skip
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    mean = sum(known) / len(known)
    variance = sum((accuracy - mean) ** 2 for accuracy in known) / len(known)
    noise = sum(accuracy * (1 - accuracy) / n for accuracy in known) / len(known)
    return {
        "kind": kind, "bins": bins, "deviation": 100 * math.sqrt(variance),
        "deviation_corrected": 100 * math.sqrt(max(0.0, variance - noise)), "range": 100 * (max(known) - min(known)),
        "worst_bin": accuracies.index(min(known)),
    }  # fmt: skip


def cell(task: str, length: int, rule: Rule, bins: int = 10, forced: bool = False, text: str | None = None) -> dict:
    accuracies = [rule(task, length, (index + 0.5) / bins) for index in range(bins)]
    score = round(100 * sum(accuracies) / bins, 2)
    positional = task.startswith(("niah", "vt"))
    kind = "grid" if task.endswith("@grid") else "native"
    position = position_entry(accuracies, kind=kind) if positional else None
    worst = text if text is not None else f"The grass is green. The sky is blue. ({task}, {length})"
    return {
        "task": task, "length": length, "metric": "part" if task.startswith("qa") else "all", "samples": 500,
        "score": score, "standard_error": round(math.sqrt(score * (100 - score) / 500), 4), "nulls": 0, "truncated": 0,
        "position": position,
        "teacher_forced": {"nll": 2.0 - score / 60, "greedy_exact": score, "position": position} if forced else None,
        "worst": [{"id": f"{task}-{length}-{n}", "prediction": worst, "outputs": ["4271833", "9031442"], "score": 0.0}
                  for n in range(2)],
    }  # fmt: skip


def make_scores(
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = LENGTHS,
    rule: Rule = lost_in_the_middle,
    missing: Sequence[tuple[str, int]] = (),
    warnings: Sequence[str] = (),
    window: int = 65536,
    yarn_factor: float | None = 4.0,
    **options: object,
) -> dict:
    cells = [
        cell(task, length, rule, **options) for task in tasks for length in lengths if (task, length) not in missing
    ]
    summary = []
    for length in lengths:
        here = [one for one in cells if one["length"] == length]
        stock = [one["score"] for one in here if one["task"] in TASKS]
        deviations = [one["position"]["deviation"] for one in here if one["position"] and one["task"] in TASKS]
        summary.append({
            "length": length, "mean": sum(stock) / 13 if len(stock) == 13 else None, "mean_of": len(stock),
            "deviation": sum(deviations) / len(deviations) if deviations else None,
        })  # fmt: skip
    means = [entry["mean"] for entry in summary]
    whole = tuple(lengths) == LENGTHS and None not in means
    weights = range(1, len(means) + 1)
    effective = [entry["length"] for entry in summary if entry["mean"] is not None and entry["mean"] >= 85.6]
    return {
        "schema": 1,
        "provenance": {
            "dialect": "RULER", "edition": "2025-07", "seed": 42, "num_samples": 500, "tokenizer_sha256": "a" * 64,
            "model": {"path": "models/smollm2-64k", "config_sha256": "b" * 64, "weights_sha256": "c" * 64,
                      "max_position_embeddings": window, "rope": {"rope_type": "default", "rope_theta": 8.0e6}},
            "engine": {"name": "hf", "dtype": "bfloat16", "batch": 4}, "yarn_factor": yarn_factor, "bos": "none",
            "model_template": "base", "versions": {"torch": "2.14.1", "transformers": "5.23"},
            "command": ["python", "tools/run_ruler.py", "--hf", "models/smollm2-64k"], "seconds": 4211.5,
            "prepared": {f"{one['task']}-{one['length']}": "d" * 64 for one in cells},
        },
        "tasks": list(tasks), "lengths": list(lengths), "cells": cells, "lengths_summary": summary,
        "summary": {
            "avg": sum(means) / 6 if whole else None,
            "wavg_inc": sum(w * m for w, m in zip(weights, means, strict=True)) / 21 if whole else None,
            "wavg_dec": sum(w * m for w, m in zip(weights, means[::-1], strict=True)) / 21 if whole else None,
            "effective_length": max(effective, default=None),
        },
        "warnings": list(warnings),
    }  # fmt: skip


def make_comparison(base: dict, new: dict, half: float = 3.0, bound: float = 2.0) -> dict:
    """`new` against `base`; every interval reaches `half` points to both sides."""
    old = {(one["task"], one["length"]): one for one in base["cells"]}
    cells = []
    for one in new["cells"]:
        before = old[one["task"], one["length"]]
        difference = one["score"] - before["score"]
        entry = {
            "task": one["task"], "length": one["length"], "base": before["score"], "new": one["score"],
            "difference": difference, "low": difference - half, "high": difference + half, "samples": 500,
            "deviation_difference": None, "deviation_low": None, "deviation_high": None, "position_difference": None,
        }  # fmt: skip
        if one["position"]:
            change = one["position"]["deviation"] - before["position"]["deviation"]
            entry |= {"deviation_difference": change, "deviation_low": change - half, "deviation_high": change + half}
            entry["position_difference"] = []
            for now, then in zip(one["position"]["bins"], before["position"]["bins"], strict=True):
                gain = 100 * (now["accuracy"] - then["accuracy"])
                entry["position_difference"].append(
                    {
                        "low": now["low"],
                        "high": now["high"],
                        "difference": gain,
                        "ci_low": gain - 5,
                        "ci_high": gain + 5,
                    }
                )
        cells.append(entry)
    mean = []
    for then, now in zip(base["lengths_summary"], new["lengths_summary"], strict=True):
        if then["mean"] is not None and now["mean"] is not None:
            gain = now["mean"] - then["mean"]
            mean.append({"length": now["length"], "difference": gain, "low": gain - half, "high": gain + half})
    return {
        "base": base["provenance"], "new": new["provenance"], "cells": cells, "mean": mean, "bound": bound,
        "regressions": [{key: one[key] for key in ("task", "length", "difference", "low", "high")}
                        for one in cells if one["difference"] < -bound and one["high"] < 0],
    }  # fmt: skip
