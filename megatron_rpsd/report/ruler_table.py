"""RULER's scores as text for a terminal of 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence

from megatron_rpsd.report.ruler_scores import (
    DEVIATION,
    cells_by_place,
    headline,
    length_label,
    mean_rows,
    position_rows,
    positions_of,
)
from megatron_rpsd.ruler.tasks import RULER_TASKS

COLUMNS = 120
_NAMES = 29
"""Width kept for names at most, so that seven lengths stand beside them; a longer name gets a line of its own."""
_SCORE, _DEVIATION, _GAP = 6, 4, 2
_ABSENT = "-"


def _score(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.2f}"


def _deviation(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


class _Column:
    """A length: its scores, and beside them the deviations where any task has one."""

    def __init__(self, length: int, has_deviation: bool) -> None:
        self.length, self.label = length, length_label(length)
        self.score = max(_SCORE, len(self.label))
        self.deviation = _DEVIATION if has_deviation else 0
        self.width = _GAP + self.score + (1 + self.deviation if has_deviation else 0)

    def text(self, score: str, deviation: str = "") -> str:
        beside = f" {deviation:>{self.deviation}}" if self.deviation else ""
        return f"{'':{_GAP}}{score:>{self.score}}{beside}"


def _blocks(columns: Sequence[_Column], name_width: int) -> list[list[_Column]]:
    """Columns in order, as many in a block as fit the width."""
    blocks: list[list[_Column]] = []
    for column in columns:
        if not blocks or name_width + sum(one.width for one in (*blocks[-1], column)) > COLUMNS:
            blocks.append([])
        blocks[-1].append(column)
    return blocks


_Entry = Callable[[int], tuple[str, str]]
"""Length -> what stands in the score's and in the deviation's place."""


def _draw(columns: Sequence[_Column], rows: Sequence[tuple[str, _Entry]]) -> list[str]:
    name_width = min(_NAMES, max([len("task"), *(len(name) for name, _ in rows)]))
    lines = []
    for block in _blocks(columns, name_width):
        lines += [""] if lines else []
        lines.append(f"{'task':{name_width}}" + "".join(one.text(one.label, "dev") for one in block))
        for name, entry in rows:
            if not name:
                lines.append("-" * (name_width + sum(one.width for one in block)))
                continue
            if len(name) > name_width:
                lines.append(name)
                name = ""
            lines.append(f"{name:{name_width}}" + "".join(one.text(*entry(one.length)) for one in block))
    return [line.rstrip() for line in lines]


def _score_rows(scores: Mapping) -> list[tuple[str, _Entry]]:
    cells, lengths = cells_by_place(scores), scores["lengths"]

    def task_entry(task: str) -> _Entry:
        def entry(length: int) -> tuple[str, str]:
            cell = cells.get((task, length))
            position = positions_of(cell)
            return _score(cell["score"] if cell else None), _deviation(position["deviation"] if position else None)

        return entry

    rows = [(task, task_entry(task)) for task in scores["tasks"]]
    rows.append(("", lambda length: ("", "")))
    for row in mean_rows(scores):
        values = dict(zip(lengths, row.values, strict=True))
        rows.append((row.label, lambda length, values=values: (_score(values[length]), "")))
    for row in position_rows(scores):
        if not row.label.startswith(DEVIATION):
            continue
        values = dict(zip(lengths, row.values, strict=True))
        rows.append(
            (row.label.replace(DEVIATION, "mean dev"), lambda length, values=values: ("", _deviation(values[length])))
        )
    nulls = {length: sum(cell["nulls"] for cell in scores["cells"] if cell["length"] == length) for length in lengths}
    if any(nulls.values()):
        rows.append(("empty predictions", lambda length: (str(nulls[length]), "")))
    return rows


def _forced_table(scores: Mapping) -> list[str]:
    """The teacher-forced answers, which no mean of RULER's includes; no lines when there are none."""
    cells = {place: cell for place, cell in cells_by_place(scores).items() if cell["teacher_forced"]}
    if not cells:
        return []

    def entry_of(task: str) -> _Entry:
        def entry(length: int) -> tuple[str, str]:
            cell = cells.get((task, length))
            position = positions_of(cell, teacher_forced=True)
            exact = cell["teacher_forced"]["greedy_exact"] if cell else None
            return _score(exact), _deviation(position["deviation"] if position else None)

        return entry

    lengths = [length for length in scores["lengths"] if any(length == place[1] for place in cells)]
    columns = [
        _Column(length, any(positions_of(cell, True) for place, cell in cells.items() if place[1] == length))
        for length in lengths
    ]
    tasks = [task for task in scores["tasks"] if any(task == place[0] for place in cells)]
    title = "Teacher-forced answers, % whose every token is the model's first choice (not part of any mean above)"
    return ["", title, *_draw(columns, [(task, entry_of(task)) for task in tasks])]


def summary_sentence(scores: Mapping) -> str:
    """The averages over lengths and the effective length, or why there are none, in one line."""
    summary = scores["summary"]
    if all(entry["mean"] is None for entry in scores["lengths_summary"]):
        return f"No RULER mean and no effective length: both take all {len(RULER_TASKS)} tasks of one edition."
    names = {"avg": "Avg.", "wavg_inc": "wAvg (increasing)", "wavg_dec": "wAvg (decreasing)"}
    parts = [f"{name} {summary[key]:.2f}" for key, name in names.items() if summary.get(key) is not None]
    effective = length_label(summary["effective_length"]) if summary.get("effective_length") else "none"
    return "; ".join([*parts, f"effective length (the longest with a RULER mean of at least 85.6): {effective}"])


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, COLUMNS, subsequent_indent="  ", break_on_hyphens=False) or [""]


def terminal_table(scores: Mapping) -> str:
    """Tasks by lengths with the means below, in at most 120 columns; more lengths than fit go into further blocks.

    Beside the score of a task whose evidence has positions stands `dev`, the standard deviation of its accuracy over
    the positions, in points. `-` is a cell that was not run. Warnings stand underneath.

    Args:
        scores: what scores.json holds.
    """
    columns = [
        _Column(length, any(positions_of(cell) for cell in scores["cells"] if cell["length"] == length))
        for length in scores["lengths"]
    ]
    lines = [*_wrapped(headline(scores["provenance"])), "", *_draw(columns, _score_rows(scores)), ""]
    if any(column.deviation for column in columns):
        lines.append("dev: standard deviation of the accuracy over the evidence's positions, in points")
    nulls = [
        f"{cell['task']} {length_label(cell['length'])}: {cell['nulls']} of {cell['samples']}"
        for cell in scores["cells"]
        if cell["nulls"]
    ]
    if nulls:
        lines += _wrapped("empty predictions: " + "; ".join(nulls))
    lines += _wrapped(summary_sentence(scores))
    lines += _forced_table(scores)
    if scores["warnings"]:
        lines += ["", *(line for warning in scores["warnings"] for line in _wrapped(f"warning: {warning}"))]
    return "\n".join(lines) + "\n"
