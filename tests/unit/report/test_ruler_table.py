"""The terminal table: values exact, 120 columns, means that say of how many, warnings underneath."""

from __future__ import annotations

import re

import pytest

from megatron_rpsd.report.ruler_table import terminal_table
from tests.unit.report.ruler_results import LENGTHS, TASKS, make_scores

SEVEN = (*LENGTHS, 262144)


def lines_of(scores: dict) -> list[str]:
    return terminal_table(scores).splitlines()


def line(scores: dict, name: str) -> list[str]:
    """The words behind `name` in its only line."""
    (found,) = [row for row in lines_of(scores) if re.match(rf"{re.escape(name)}(\s|$)", row)]
    return found[len(name) :].split()


def linear(task: str, length: int, position: float) -> float:
    """20 % at the start, 80 % at the end: bins of 0.23 to 0.77, a mean of 0.5, a range of 54 points."""
    return 0.2 + 0.6 * position


def test_scores_and_deviations_stand_where_they_belong() -> None:
    scores = make_scores(["vt", "qa_1"], [4096, 131072], linear)
    for cell, value in zip(scores["cells"], (12.34, 100.0, 0.0, 7.5), strict=True):
        cell["score"] = value
    assert [word for row in lines_of(scores) if row.startswith("task") for word in row.split()] == [
        "task", "4K", "dev", "128K", "dev",
    ]  # fmt: skip
    # Ten values 0.23, 0.29, ... 0.77: the standard deviation is 0.06 sqrt((100 - 1) / 12) = 0.1723.
    assert line(scores, "vt") == ["12.34", "17.2", "100.00", "17.2"]
    assert line(scores, "qa_1") == ["0.00", "7.50"]
    assert line(scores, "mean of 2") == ["6.17", "53.75"]
    assert line(scores, "mean dev") == ["17.2", "17.2"]


def test_only_the_mean_of_all_13_is_rulers() -> None:
    whole = make_scores(lengths=[4096, 8192], missing=[("fwe", 8192)])
    whole["lengths_summary"][0]["mean"] = 71.234  # what the file says, not what the table computes
    assert line(whole, "RULER mean (13 tasks)") == ["71.23", "-"]
    rest = [cell["score"] for cell in whole["cells"] if cell["length"] == 8192]
    assert len(rest) == 12
    assert line(whole, "mean of 12") == ["-", f"{sum(rest) / 12:.2f}"]
    whole["lengths_summary"][0]["mean"] = None  # 13 tasks, but not of one edition
    assert "RULER mean (" not in terminal_table(whole)
    assert "No RULER mean" in terminal_table(whole)


def test_variants_are_never_averaged_with_rulers_tasks() -> None:
    scores = make_scores([*TASKS, "qa_1@synthetic", "niah_multikey_2@grid"], [4096], lambda *_: 1.0)
    for cell in scores["cells"][-2:]:
        cell["score"] = 10.0
    assert line(scores, "RULER mean (13 tasks)") == ["100.00"]
    assert line(scores, "mean of 1 @synthetic") == line(scores, "mean of 1 @grid") == ["10.00"]


@pytest.mark.parametrize(
    ("tasks", "lengths", "blocks"),
    [
        (TASKS, SEVEN, 1),
        (["niah_multikey_1@synthetic", "vt"], SEVEN, 1),
        (["niah_multikey_1@synthetic@grid@of-its-own", "vt"], SEVEN, 1),
        (TASKS, (*SEVEN, 524288, 1048576), 2),
        (TASKS, [1000 * 4**power for power in range(9)], 2),
        (["qa_1"], [4000], 1),
    ],
)
def test_no_line_is_wider_than_120_columns(tasks, lengths, blocks) -> None:
    scores = make_scores(tasks, lengths, lambda *_: 1.0, warnings=["many words " * 40])
    text = terminal_table(scores)
    assert max(map(len, text.splitlines())) <= 120
    heads = [row.split() for row in text.splitlines() if row.startswith("task")]
    assert len(heads) == blocks
    assert len([word for head in heads for word in head if word not in ("task", "dev")]) == len(lengths)
    for task in tasks:
        assert text.count(task) >= blocks


def test_empty_predictions_are_counted() -> None:
    scores = make_scores(["vt", "qa_1"], [4096, 8192])
    assert "empty" not in terminal_table(scores)
    scores["cells"][1]["nulls"], scores["cells"][3]["nulls"] = 3, 40
    assert line(scores, "empty predictions") == ["0", "43"]
    assert "empty predictions: vt 8K: 3 of 500; qa_1 8K: 40 of 500" in terminal_table(scores)


def test_what_was_not_run_is_a_dash_and_warnings_come_last() -> None:
    scores = make_scores(["vt", "qa_1"], [4096, 8192], missing=[("vt", 4096)], warnings=["one", "two"])
    assert line(scores, "vt")[0] == "-"
    assert lines_of(scores)[-2:] == ["warning: one", "warning: two"]


def test_averages_over_lengths_and_effective_length() -> None:
    text = terminal_table(make_scores(rule=lambda task, length, position: 0.9 if length <= 16384 else 0.6))
    # (3 * 90 + 3 * 60) / 6; weights 1..6: (6 * 90 + 15 * 60) / 21
    assert "Avg. 75.00; wAvg (increasing) 68.57; wAvg (decreasing) 81.43;" in text
    assert text.splitlines()[-1].endswith(": 16K")
    assert terminal_table(make_scores(rule=lambda *_: 0.1)).splitlines()[-1].endswith(": none")


def test_teacher_forced_answers_are_a_table_of_their_own() -> None:
    scores = make_scores(["vt", "qa_1"], [4096], linear, forced=True)
    scores["cells"][0]["teacher_forced"]["greedy_exact"] = 33.25
    above, below = terminal_table(scores).split("Teacher-forced")
    assert "33.25" not in above and re.search(r"^vt +33\.25 17\.2$", below, re.MULTILINE)
    assert "mean of" not in below
