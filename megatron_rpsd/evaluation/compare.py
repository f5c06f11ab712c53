"""Two runs on the same samples: what changed, by how much, and whether that is more than the samples' chance.

Both models answered the same questions, so samples are drawn with replacement for both at once (a paired bootstrap):
what makes a question hard for both falls out of the difference. Differences are NEW - BASE, in points from 0 to 100.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rpsd.evaluation.position_statistics import (
    Bins,
    deviation,
    interval,
    make_bins,
    paired_interval,
    resampled_sums,
)
from megatron_rpsd.evaluation.samples import json_lines
from megatron_rpsd.evaluation.scores import SCHEMA, units
from megatron_rpsd.ruler.tasks import RULER_TASKS

SEED = 42
_SAME = {"dialect": "dialect", "edition": "edition of RULER", "tokenizer_sha256": "tokenizer to count prompts"}


@dataclass(frozen=True)
class Run:
    """A run's folder, read."""

    folder: Path
    scores: dict
    rows: dict[tuple[str, int], list[dict]]
    """(task, length) -> lines of samples.jsonl, in the prepared file's order."""


def read_run(folder: str | Path) -> Run:
    """FOLDER/scores.json and FOLDER/samples.jsonl; ValueError where one is missing, torn, or not of the other."""
    folder = Path(folder)
    for name in ("scores.json", "samples.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give the --output folder of a finished tools/evaluate.py run")
    try:
        scores = json.loads((folder / "scores.json").read_bytes())
    except ValueError:
        raise ValueError(f"{folder / 'scores.json'} is no JSON: run the evaluation again, it resumes") from None
    if scores.get("schema") != SCHEMA:
        raise ValueError(f"{folder / 'scores.json'} has schema {scores.get('schema')}, this version reads {SCHEMA}")
    rows: dict[tuple[str, int], list[dict]] = {}
    for _, row in json_lines(folder / "samples.jsonl"):
        rows.setdefault((row["task"], row["length"]), []).append(row)
    if len(rows) != len(scores["cells"]):
        raise ValueError(f"{folder}: samples.jsonl holds {len(rows)} cells, scores.json {len(scores['cells'])}")
    for cell in scores["cells"]:
        found = rows.get((cell["task"], cell["length"]), [])
        # The mean of rounded hundredths may round to the next one.
        if len(found) != cell["samples"] or abs(np.mean([row["score"] for row in found]) - cell["score"]) > 0.02:
            raise ValueError(
                f"{folder}: samples.jsonl and scores.json differ on {cell['task']} at {cell['length']}, they are not "
                "of one run: run the evaluation again, it resumes"
            )
    return Run(folder, scores, rows)


def check_comparable(base: Run, new: Run) -> None:
    """ValueError unless both runs answered the same prompts."""
    either = f"{base.folder} and {new.folder} cannot be compared"
    ours, theirs = base.scores["provenance"], new.scores["provenance"]
    for field, words in _SAME.items():
        if ours[field] != theirs[field]:
            raise ValueError(f"{either}: another {words}, {ours[field]} and {theirs[field]}")
    for name in sorted(ours["prepared"].keys() ^ theirs["prepared"].keys()):
        lacking = new.folder if name in ours["prepared"] else base.folder
        raise ValueError(f"{either}: {lacking} has no {name}; run both on the same tasks and lengths")
    for name, digest in ours["prepared"].items():
        if digest != theirs["prepared"][name]:
            raise ValueError(f"{either}: {name} has other prompts, sha256 {digest} and {theirs['prepared'][name]}")
    for cell, rows in base.rows.items():
        for row, other in zip(rows, new.rows.get(cell, []), strict=True):
            if row["id"] != other["id"] or _positions([row]) != _positions([other]):
                raise ValueError(
                    f"{either}: {cell[0]} at {cell[1]} has {row['id']} in one place, {other['id']} in the other"
                )


def _positions(rows: Sequence[Mapping]) -> list[float]:
    return [r["position"] for row in rows for r in row["references"] if r["position"] is not None]


def _hits(rows: Sequence[Mapping]) -> np.ndarray:
    found = [r["hit"] for row in rows for r in row["references"] if r["position"] is not None]
    return np.array(found, dtype=np.float64)


def _sums_by_unit(base: Sequence[Mapping], new: Sequence[Mapping]) -> tuple[np.ndarray, Bins | None]:
    """[U, 2 + 3 B]: a unit's samples, its score difference, then by bin: pieces of evidence, found by base, by new."""
    _, unit = np.unique(units(base), return_inverse=True)
    number = int(unit.max()) + 1
    difference = [after["score"] - before["score"] for before, after in zip(base, new, strict=True)]
    parts = [np.bincount(unit), np.bincount(unit, weights=difference)]
    positions = _positions(base)
    if not positions:
        return np.stack(parts, axis=1).astype(np.float64), None
    bins = make_bins(positions, grid="depth" in base[0])
    owner = np.repeat(unit, [len(_positions([row])) for row in base])
    place = owner * len(bins.low) + bins.index
    for weights in (np.ones(len(place)), _hits(base), _hits(new)):
        table = np.bincount(place, weights=weights, minlength=number * len(bins.low))
        parts += list(table.reshape(number, -1).T)
    return np.stack(parts, axis=1), bins


def _spread_difference(sums: np.ndarray, noises: int) -> np.ndarray:
    """[R, 2 + 3 B] -> the difference of the deviations over bins [R], in points."""
    number, base, new = np.split(sums[:, 2:], 3, axis=1)
    held = np.where(number > 0, number, np.nan)
    return deviation(new / held, number, noises) - deviation(base / held, number, noises)


def _by_bin(bins: Bins, base: np.ndarray, new: np.ndarray) -> list[dict]:
    """What changed in each bin, in points; `base` and `new` [N] are what each model found."""
    number, gained, lost = (np.bincount(bins.index, weights=w) for w in (np.ones(len(base)), new > base, base > new))
    ends = paired_interval(gained, lost, number)
    columns = (bins.low, bins.high, *(100 * share for share in ((gained - lost) / number, *ends)))
    names = ("low", "high", "difference", "ci_low", "ci_high")
    return [dict(zip(names, row, strict=True)) for row in zip(*(column.tolist() for column in columns), strict=True)]


def compare_cell(task: str, length: int, base: Sequence[Mapping], new: Sequence[Mapping]) -> tuple[dict, np.ndarray]:
    """A cell of compare.json without its scores, and the mean difference of every draw [DRAWS], in points.

    The deviation's difference is that of the noise-corrected deviations. Drawing samples again adds the counting noise
    once more, so that the draws' deviations have it taken off twice. Without that, a model with half of the answers
    right looks more uneven than one with nearly all right, though both are even: the interval of the raw deviations'
    difference then excludes 0 nearly always.
    """
    sums, bins = _sums_by_unit(base, new)
    draws = resampled_sums(sums, (SEED, length, zlib.crc32(task.encode())))
    whole = sums.sum(axis=0, keepdims=True)
    means = draws[:, 1] / draws[:, 0]
    low, high = interval(means)
    cell = {
        "difference": float(whole[0, 1] / whole[0, 0]),
        "low": float(low),
        "high": float(high),
        "samples": len(base),
        "deviation_difference": None,
        "deviation_low": None,
        "deviation_high": None,
        "position_difference": None,
    }
    if bins is None:
        return cell, means
    spread = float(_spread_difference(whole, 1)[0])
    low, high = interval(_spread_difference(draws, 2))
    # Where a corrected deviation is cut off at 0 the estimate can fall just outside of the draws' interval.
    cell |= {
        "deviation_difference": spread,
        "deviation_low": float(min(low, spread)),
        "deviation_high": float(max(high, spread)),
        "position_difference": _by_bin(bins, _hits(base), _hits(new)),
    }
    return cell, means


def _length_means(base: Run, new: Run, cells: Sequence[Mapping], draws: Mapping[tuple[str, int], np.ndarray]) -> list:
    """The 13 tasks' mean difference at every length where both runs have RULER's mean. Tasks are drawn apart."""
    rows = []
    for before, after in zip(base.scores["lengths_summary"], new.scores["lengths_summary"], strict=True):
        if before["mean"] is None or after["mean"] is None:
            continue
        length = before["length"]
        stock = [cell for cell in cells if cell["length"] == length and cell["task"] in RULER_TASKS]
        low, high = interval(np.mean([draws[cell["task"], length] for cell in stock], axis=0))
        difference = sum(cell["difference"] for cell in stock) / len(stock)
        rows.append({"length": length, "difference": difference, "low": float(low), "high": float(high)})
    return rows


def _regressions(cells: Sequence[Mapping], means: Sequence[Mapping], bound: float) -> list[dict]:
    rows = [*cells, *({"task": "mean of 13"} | row for row in means)]
    fields = ("task", "length", "difference", "low", "high")
    return [{f: row[f] for f in fields} for row in rows if row["difference"] < -bound and row["high"] < 0]


def compare(
    base_dir: str | Path,
    new_dir: str | Path,
    bound: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """compare.json of two runs.

    Args:
        base_dir: --output folder of the first run, with scores.json and samples.jsonl.
        new_dir: that of the second.
        bound: points; a cell or a length's mean is a regression where it fell by more, and the 95 % interval of its
            difference lies below 0. None asks for no regressions.
        progress: told the cells done and all cells, after each.

    Returns:
        base and new (provenances), cells, mean, regressions (task "mean of 13" for a length's mean), bound. A caller
        exits with 1 where there are regressions.

    Raises:
        ValueError: the runs are of other prompts, editions, tokenizers or sets of samples, or unfinished.
    """
    if bound is not None and not (math.isfinite(bound) and bound >= 0):
        raise ValueError(f"--max-regression {bound}: give the points that a score may fall, 0 or more")
    base, new = read_run(base_dir), read_run(new_dir)
    check_comparable(base, new)
    cells, draws = [], {}
    after = {(cell["task"], cell["length"]): cell["score"] for cell in new.scores["cells"]}
    for before in base.scores["cells"]:
        key = before["task"], before["length"]
        cell, draws[key] = compare_cell(*key, base.rows[key], new.rows[key])
        cells.append({"task": key[0], "length": key[1], "base": before["score"], "new": after[key], **cell})
        progress(len(cells), len(base.scores["cells"]))
    means = _length_means(base, new, cells, draws)
    return {
        "base": base.scores["provenance"],
        "new": new.scores["provenance"],
        "cells": cells,
        "mean": means,
        "regressions": [] if bound is None else _regressions(cells, means, bound),
        "bound": bound,
    }
