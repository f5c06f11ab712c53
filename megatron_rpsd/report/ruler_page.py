"""Blocks of RULER's pages: tables, warnings, predictions and provenance of a scores dictionary as HTML."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_rpsd.report import html
from megatron_rpsd.report.ruler_scores import bin_label, cells_by_place, length_label, mean_rows, positions_of

WIDTH = "100rem"
"""The page's column: 1600 px at the usual size of letters."""
_ABSENT = "–"
_LONGEST = 4000
"""Characters of a prediction that are shown."""


def visible(text: str) -> str:
    """`text` with its invisible characters written out (`\\x00`, `\\u202e`), line breaks and tabs kept.

    A prediction may hold anything; a control or direction character must not change how the page reads.
    """
    return "".join(
        one.encode("unicode_escape").decode("ascii")
        if one not in "\n\t" and unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else one
        for one in text
    )


def folded(summary: object, *blocks: object) -> html.Markup:
    """Blocks that open on a click."""
    body = "\n".join(html.text(block) for block in blocks)
    return html.Markup(f"<details><summary>{html.text(summary)}</summary>\n{body}</details>")


def bullets(lines: Iterable[object]) -> html.Markup:
    """A list."""
    return html.Markup(f"<ul>{''.join(f'<li>{html.text(line)}</li>' for line in lines)}</ul>")


def gallery(figures: Sequence[html.Markup]) -> html.Markup:
    """Figures side by side where the window is wide enough."""
    boxes = "".join(f'<div style="flex: 1 1 36rem; max-width: 48rem">{figure}</div>' for figure in figures)
    return html.Markup(f'<div style="display: flex; flex-wrap: wrap; gap: 0 1.5rem">{boxes}</div>')


def warnings_section(warnings: Sequence[str]) -> html.Markup:
    """What a reader must know first; nothing when there is nothing."""
    return html.section("Warnings", bullets(map(visible, warnings))) if warnings else html.Markup("")


def _points(value: float | None, digits: int = 2) -> str:
    return _ABSENT if value is None else f"{value:.{digits}f}"


def _lengths_table(scores: Mapping, entry: Callable[[Mapping], str], caption: str, below: Sequence = ()) -> html.Markup:
    cells, lengths = cells_by_place(scores), scores["lengths"]
    rows = [
        [task, *(entry(cells[task, length]) if (task, length) in cells else _ABSENT for length in lengths)]
        for task in scores["tasks"]
    ]
    return html.table(["task", *map(length_label, lengths)], [*rows, *below], caption)


def score_table(scores: Mapping) -> html.Markup:
    """Scores with their standard errors, and the means below."""

    def entry(cell: Mapping) -> str:
        error = "" if cell["standard_error"] is None else f" ± {cell['standard_error']:.2f}"
        return _points(cell["score"]) + error

    below = [[html.Markup(f"<strong>{html.text(row.label)}</strong>"), *map(_points, row.values)]
             for row in mean_rows(scores)]  # fmt: skip
    caption = (
        "Scores, 0 to 100, as RULER rounds them, ± standard error over samples. A RULER mean stands only where all 13 "
        f"tasks are there; other means say of how many. {_ABSENT}: not run."
    )
    return _lengths_table(scores, entry, caption, below)


def answers_table(scores: Mapping) -> html.Markup:
    """How many answers were empty, and how many were cut at the limit of generated tokens."""
    return _lengths_table(
        scores,
        lambda cell: f"{cell['nulls']} / {cell['truncated']} of {cell['samples']}",
        "Empty answers / answers cut at the limit of generated tokens, of all samples. Few base models end an answer "
        "by themselves; RULER scores what stands before the cut.",
    )


def forced_table(scores: Mapping) -> html.Markup:
    """Teacher-forced answers: loss and the share of answers that are the model's first choice throughout."""

    def entry(cell: Mapping) -> str:
        forced = cell["teacher_forced"]
        return f"{forced['nll']:.4f} / {forced['greedy_exact']:.2f}" if forced else _ABSENT

    return _lengths_table(
        scores, entry, "Nats per answer token / greedy-exact answers in percent. No mean of RULER's includes them."
    )


def positions_table(scores: Mapping, tasks: Sequence[str], teacher_forced: bool = False) -> html.Markup:
    """The statistics over positions of every task and length that has them."""
    header = ["task", "length", "deviation", "less noise", "range", "worst position, %", "accuracy there, %", "n there"]
    cells, rows = cells_by_place(scores), []
    for task in tasks:
        for length in scores["lengths"]:
            position = positions_of(cells.get((task, length)), teacher_forced)
            if position is None:
                continue
            worst = position["bins"][position["worst_bin"]]
            low, middle, high = (100 * worst[key] for key in ("wilson_low", "accuracy", "wilson_high"))
            spread = [_points(position[key]) for key in ("deviation", "deviation_corrected", "range")]
            rows.append([
                task, length_label(length), *spread,
                bin_label(worst["low"], worst["high"]), f"{middle:.1f} [{low:.1f}, {high:.1f}]", worst["n"],
            ])  # fmt: skip
    caption = (
        "Standard deviation of the accuracy over positions in points, raw and with the noise of finite samples taken "
        "off; highest minus lowest accuracy; the worst position with its 95 % Wilson interval."
    )
    return html.table(header, rows, caption, text_columns=2)


def _prediction(entry: Mapping) -> html.Markup:
    text = entry["prediction"]
    cut = f"\n[{len(text) - _LONGEST} more characters]" if len(text) > _LONGEST else ""
    shown = visible(text[:_LONGEST]) + cut if text else "(empty)"
    expected = " | ".join(visible(output) for output in entry["outputs"])
    about = f"{entry['id']}: score {entry['score']:g}, expected: {expected}"
    return html.Markup(html.paragraph(visible(about)) + html.code_block(shown))


def worst_section(scores: Mapping) -> html.Markup:
    """The worst predictions of every cell as the model wrote them."""
    blocks = []
    for task in scores["tasks"]:
        inside = []
        for length in scores["lengths"]:
            cell = cells_by_place(scores).get((task, length))
            if cell and cell["worst"]:
                score = _points(cell["score"])
                inside.append(html.Markup(f"<h3>{html.text(f'{task} at {length_label(length)}: {score}')}</h3>"))
                inside += [_prediction(entry) for entry in cell["worst"]]
        if inside:
            blocks.append(folded(task, *inside))
    if not blocks:
        return html.section("Worst predictions", html.paragraph("No prediction lost a point."))
    note = "The lowest scores of every cell, raw, invisible characters written out."
    return html.section("Worst predictions", html.paragraph(note), *blocks)


def flatten(value: object, name: str = "") -> dict[str, str]:
    """Nested dictionaries as dotted names; lists of plain values in one line."""
    if isinstance(value, Mapping):
        inner = [flatten(one, f"{name}.{key}" if name else str(key)) for key, one in value.items()]
        return {key: text for part in inner for key, text in part.items()}
    if isinstance(value, list | tuple):
        return {name: " ".join(map(str, value))}
    return {name: _ABSENT if value is None else str(value)}


def provenance_section(provenances: Mapping[str, Mapping]) -> html.Markup:
    """Where the numbers come from, a column for every run; of several runs what differs comes first."""
    columns = {name: flatten(provenance) for name, provenance in provenances.items()}
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    differs = {key for key in keys if len({column.get(key, _ABSENT) for column in columns.values()}) > 1}
    files = [key for key in keys if key.startswith("prepared.") and key not in differs]
    header = ["", *columns] if len(columns) > 1 else ["entry", "value"]

    def rows(of: Sequence[str]) -> list[list[str]]:
        return [[key, *(visible(column.get(key, _ABSENT)) for column in columns.values())] for key in of]

    ordered = sorted((key for key in keys if key not in files), key=lambda key: key not in differs)
    note = f"The first {len(differs)} rows differ." if len(columns) > 1 else ""
    blocks = [html.table(header, rows(ordered), note, text_columns=len(header))]
    if files:
        blocks.append(
            folded("SHA-256 of the prepared files", html.table(header, rows(files), text_columns=len(header)))
        )
    return html.section("Provenance", *blocks)
