"""Differences of two runs whose truth is known: their size, their intervals, and what must not be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_rpsd.evaluation.compare import compare, compare_cell
from megatron_rpsd.evaluation.samples import Prepared
from megatron_rpsd.ruler.tasks import RULER_TASKS
from tests.unit.evaluation.made_samples import Made, answers, prepared, write_run


def _rows(positions: Sequence[float], hits: Sequence[bool]) -> list[dict]:
    """samples.jsonl's rows of samples of one reference each."""
    return [
        {"id": str(number), "score": 100.0 * bool(hit), "references": [{"position": place, "hit": bool(hit)}]}
        for number, (place, hit) in enumerate(zip(positions, hits, strict=True))
    ]


def _both(folder: Path, files: list[Prepared], base: dict, new: dict) -> tuple[Path, Path]:
    """Two runs with these answers by task, all right where a task is not named."""
    write_run(folder / "base", files, answers(files, base))
    write_run(folder / "new", files, answers(files, new))
    return folder / "base", folder / "new"


def _vt(folder: Path, number: int = 60, **changed: object) -> Prepared:
    return prepared(folder, "vt", [Made(["AAAAA"], [(37 * n) % 1000]) for n in range(number)], **changed)


def test_a_run_equals_itself(tmp_path: Path) -> None:
    texts = {"vt": ["AAAAA"] * 40 + ["no"] * 20}
    result = compare(*_both(tmp_path, [_vt(tmp_path)], texts, texts), bound=0.0)
    cell = result["cells"][0]
    assert (cell["task"], cell["length"], cell["base"], cell["new"], cell["samples"]) == ("vt", 4096, 66.67, 66.67, 60)
    assert [cell[k] for k in ("difference", "low", "high")] == [0.0, 0.0, 0.0]
    assert [cell[k] for k in ("deviation_difference", "deviation_low", "deviation_high")] == [0.0, 0.0, 0.0]
    assert len(cell["position_difference"]) == 10
    assert all(row["difference"] == 0 and row["ci_low"] < 0 < row["ci_high"] for row in cell["position_difference"])
    assert result["mean"] == [] and result["regressions"] == [] and result["bound"] == 0.0
    assert result["base"]["model"] == {"path": "base"} and result["new"]["model"] == {"path": "new"}
    json.dumps(result, allow_nan=False)


def test_the_interval_is_that_of_paired_differences() -> None:
    """Against the normal law on 3,000 samples; unpaired, the interval would be 2.3 times as wide."""
    rng = np.random.default_rng(5)
    hard = rng.random(3000)
    base, new = hard < 0.6, np.where(rng.random(3000) < 0.9, hard < 0.65, rng.random(3000) < 0.5)
    cell, draws = compare_cell("vt", 4096, _rows(rng.random(3000), base), _rows(rng.random(3000), new))
    pairs = 100.0 * (new.astype(float) - base)
    error = pairs.std() / np.sqrt(3000)
    assert cell["difference"] == pytest.approx(pairs.mean())
    assert cell["low"] == pytest.approx(pairs.mean() - 1.96 * error, abs=0.12 * error)
    assert cell["high"] == pytest.approx(pairs.mean() + 1.96 * error, abs=0.12 * error)
    assert draws.shape == (10_000,) and draws.std() == pytest.approx(error, rel=0.03)


def test_a_grid_s_items_are_drawn_whole() -> None:
    """All depths of an item change alike here, so that 400 answers are 80 draws."""
    rng = np.random.default_rng(6)
    item_base, item_new = rng.random((2, 80)) < 0.5
    depths = np.tile(np.linspace(0, 1, 5), 80)
    base, new = (_rows(depths, np.repeat(hits, 5)) for hits in (item_base, item_new))
    for number, row in enumerate(base + new):
        row |= {"item": number % 400 // 5, "depth": row["references"][0]["position"]}
    cell, _ = compare_cell("vt@grid", 4096, base, new)
    error = (100.0 * (item_new.astype(float) - item_base)).std() / np.sqrt(80)
    assert (cell["high"] - cell["low"]) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert [row["low"] for row in cell["position_difference"]] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_deviation_s_difference_is_found_where_there_is_one_and_not_where_there_is_none() -> None:
    """Ten bins, 500 samples. A hole of 25.4 points against an even model; then two even models, at 97 and at 50 %.

    The second is the trap: the raw deviations of these differ by 4 points from counting alone, and their plain
    bootstrap excludes 0 in nearly every one of these 20 comparisons.
    """
    rng = np.random.default_rng(7)
    hole = np.array([0.9, 0.9, 0.9, 0.5, 0.3, 0.3, 0.5, 0.9, 0.9, 0.9])
    places = rng.random(500)
    base, new = rng.random(500) < hole[(10 * places).astype(int)], rng.random(500) < 0.8
    cell, _ = compare_cell("vt", 4096, _rows(places, base), _rows(places, new))
    assert cell["deviation_low"] < -25.4 < cell["deviation_high"] < -10
    assert cell["deviation_low"] <= cell["deviation_difference"] <= cell["deviation_high"]
    middle = cell["position_difference"][4]
    assert (middle["low"], middle["high"]) == (0.4, 0.5) and 20 < middle["difference"] < 80 and middle["ci_low"] > 0
    wrong = 0
    for _ in range(20):
        places = rng.random(500)
        base, new = rng.random(500) < 0.97, rng.random(500) < 0.5
        cell, _ = compare_cell("vt", 4096, _rows(places, base), _rows(places, new))
        wrong += not cell["deviation_low"] <= 0 <= cell["deviation_high"]
    assert wrong <= 3


def test_a_fall_beyond_the_bound_and_beyond_chance_is_a_regression(tmp_path: Path) -> None:
    few = prepared(tmp_path, "fwe", [Made(["abcdef"], [1])] * 4)
    files = [_vt(tmp_path), few]
    base, new = {"vt": ["AAAAA"] * 60}, {"vt": ["AAAAA"] * 48 + ["no"] * 12, "fwe": ["abcdef"] * 3 + ["no"]}
    folders = _both(tmp_path, files, base, new)
    result = compare(*folders, bound=19.9)
    assert [cell["difference"] for cell in result["cells"]] == [-20.0, -25.0]
    # fwe fell by more, but by one answer of four: its interval reaches 0.
    assert result["cells"][1]["high"] == 0.0 and result["cells"][1]["position_difference"] is None
    assert result["cells"][1]["deviation_difference"] is None
    vt = result["cells"][0]
    assert result["regressions"] == [{k: vt[k] for k in ("task", "length", "difference", "low", "high")}]
    assert vt["low"] < -20 < vt["high"] < 0
    assert compare(*folders, bound=20.0)["regressions"] == []
    assert compare(*folders)["regressions"] == [] and compare(*folders)["bound"] is None
    assert compare(*reversed(folders), bound=0.0)["regressions"] == []
    for bound in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--max-regression"):
            compare(*folders, bound=bound)


def test_the_mean_of_13_has_its_own_interval_and_may_fall_alone(tmp_path: Path) -> None:
    """Every task loses 5 of 50 samples: each interval is wide, their mean's is sqrt(13) times narrower."""
    made = [Made(["1111111"], [(37 * n) % 1000]) for n in range(50)]
    files = [prepared(tmp_path, task, made) for task in RULER_TASKS]
    files.append(prepared(tmp_path, "niah_single_2@synthetic", made))
    lost = {task: ["no"] * 5 + ["1111111"] * 45 for task in RULER_TASKS}
    folders = _both(tmp_path, files, {}, lost | {"niah_single_2@synthetic": ["no"] * 50})
    result = compare(*folders, bound=9.0)
    mean = result["mean"][0]
    assert mean["length"] == 4096 and mean["difference"] == pytest.approx(-10.0)
    error = 100 * np.sqrt(0.1 * 0.9 / 50 / 13)
    assert mean["low"] == pytest.approx(-10 - 1.96 * error, abs=0.2 * error)
    assert mean["high"] == pytest.approx(-10 + 1.96 * error, abs=0.2 * error)
    assert {row["task"] for row in result["regressions"]} == {*RULER_TASKS, "niah_single_2@synthetic", "mean of 13"}
    told = []
    assert compare(*folders, bound=9.0, progress=lambda *counts: told.append(counts)) == result
    assert told == [(done, 14) for done in range(1, 15)]


def _edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


REFUSALS = {
    "another tokenizer": ("another tokenizer to count prompts, cafe and beef", {"tokenizer_sha256": "beef"}, {}),
    "another edition": ("another edition of RULER, 2025-07 and 2024-12", {"edition": "2024-12"}, {}),
    "another dialect": ("another dialect, RULER and HELMET", {"dialect": "HELMET"}, {}),
    "other prompts": ("vt-4096 has other prompts, sha256", {}, {"more": "x"}),
    "fewer samples": ("vt-4096 has other prompts, sha256", {}, {"number": 3}),
    "another length": ("new has no vt-4096", {}, {"length": 8192}),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_other_questions_are_not_compared(tmp_path: Path, case: str) -> None:
    message, changed, other = REFUSALS[case]
    first = [prepared(tmp_path / "a", "vt", [Made(["AAAAA"], [1])] * 4)]
    made = [Made(["AAAAA"], [1], other.get("more", ""))] * other.get("number", 4)
    second = [prepared(tmp_path / "b", "vt", made, other.get("length", 4096), **changed)]
    folders = [
        write_run(tmp_path / "base", first, answers(first))[0],
        write_run(tmp_path / "new", second, answers(second))[0],
    ]
    with pytest.raises(ValueError) as caught:
        compare(*folders)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(folders[0]) in str(caught.value) and str(folders[1]) in str(caught.value)


DAMAGES = {
    "no scores.json": lambda run: (run / "scores.json").unlink(),
    "no samples.jsonl": lambda run: (run / "samples.jsonl").unlink(),
    "scores.json' is no JSON": lambda run: (run / "scores.json").write_text("{"),
    "has schema 7": lambda run: _edit(run / "scores.json", '"schema": 1', '"schema": 7'),
    "no JSON object": lambda run: (run / "samples.jsonl").write_bytes((run / "samples.jsonl").read_bytes()[:-9]),
    "differ on vt": lambda run: _edit(run / "samples.jsonl", '"score": 0.0', '"score": 100.0'),
    "samples.jsonl holds 2 cells": lambda run: _edit(
        run / "samples.jsonl", '4096/3", "task": "vt"', '4096/3", "task": "x"'
    ),
    "in one place": lambda run: _edit(run / "samples.jsonl", '"position": 0.7', '"position": 0.6'),
    "vt/4096/1 in one place, vt/4096/9 in the other": lambda run: _edit(run / "samples.jsonl", "4096/1", "4096/9"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_unfinished_or_mixed_runs_are_one_clear_line(tmp_path: Path, message: str) -> None:
    files = [prepared(tmp_path, "vt", [Made(["AAAAA"], [place]) for place in (1, 300, 700, 900)])]
    texts = {"vt": ["AAAAA", "no", "AAAAA", "no"]}
    base, new = _both(tmp_path, files, texts, texts)
    DAMAGES[message](new)
    with pytest.raises(ValueError) as caught:
        compare(base, new)
    assert message.replace("'", "") in str(caught.value) and "\n" not in str(caught.value)
