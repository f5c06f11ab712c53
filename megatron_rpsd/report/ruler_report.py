"""RULER's pages: one run's report from its scores.json, and two runs side by side from compare.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_rpsd.data.files import replace_file
from megatron_rpsd.report import html
from megatron_rpsd.report.ruler_figures import (
    deviation_difference_map,
    difference_map,
    score_map,
    teacher_forced_map,
)
from megatron_rpsd.report.ruler_page import (
    WIDTH,
    answers_table,
    bullets,
    folded,
    forced_table,
    gallery,
    positions_table,
    provenance_section,
    score_table,
    warnings_section,
    worst_section,
)
from megatron_rpsd.report.ruler_positions import depth_map, position_curves, position_difference_map
from megatron_rpsd.report.ruler_scores import headline, length_label, model_name, positional_tasks
from megatron_rpsd.report.ruler_table import summary_sentence


class _Figures:
    """Draws figures beside the page and puts them into it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, []

    def add(self, name: str, draw: Callable[[Path], object], caption: str, alternative: str) -> html.Markup:
        """The figure that `draw` writes to the path it is given, as a block."""
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9_@.-]', '_', name)}.png"
        draw(path)
        self.paths.append(path)
        return html.figure(path.read_bytes(), caption, alternative)


def _require_cells(found: Mapping, name: str) -> None:
    if not found["cells"]:
        raise ValueError(f"{name} holds no cell: no task was run at any length, so there is nothing to draw")


_WINDOW = "Right of a dashed line, where there is one, lengths are beyond the trained window."
_BANDS = "Bands are 95 % Wilson intervals of each position by itself."


def _position_section(scores: Mapping, figures: _Figures, teacher_forced: bool = False) -> html.Markup:
    tasks = positional_tasks(scores, teacher_forced)
    if not tasks:
        return html.Markup("")
    prefix = "forced_" if teacher_forced else ""
    name = model_name(scores["provenance"])
    heading = "Positions, teacher-forced" if teacher_forced else "Positions"
    maps = [
        figures.add(f"{prefix}depth_{task}", lambda path, task=task: depth_map(scores, task, path, teacher_forced),
                    "", f"{heading}: accuracy of {task} by length and position")
        for task in tasks
    ]  # fmt: skip
    curves = [
        figures.add(f"{prefix}curves_{task}",
                    lambda path, task=task: position_curves({name: scores}, task, path, teacher_forced),
                    "", f"{heading}: accuracy of {task} against position, a panel for every length")
        for task in tasks
    ]  # fmt: skip
    return html.section(
        heading,
        html.paragraph(f"The start of the prompt is 0. {_WINDOW} {_BANDS}"),
        gallery(maps),
        *curves,
        folded("Statistics over positions", positions_table(scores, tasks, teacher_forced)),
    )


def _forced_section(scores: Mapping, figures: _Figures) -> html.Markup:
    if not any(cell["teacher_forced"] for cell in scores["cells"]):
        return html.Markup("")
    text = (
        "One reading of prompt and gold answer: the loss on the answer, and the share of answers of which every token "
        "is the model's first choice. Not RULER's score, and in none of its means."
    )
    maps = [
        figures.add(f"forced_{quantity}", lambda path, quantity=quantity: teacher_forced_map(scores, quantity, path),
                    "", f"Teacher-forced {quantity} by task and length")
        for quantity in ("greedy_exact", "nll")
    ]  # fmt: skip
    return html.section("Teacher-forced answers", html.paragraph(text), gallery(maps), forced_table(scores))


def write_report(scores: Mapping, output: Path) -> list[Path]:
    """`output`/report.html, self-contained, and its figures beside it in `output`/figures.

    Args:
        scores: what scores.json holds; nothing else is read.

    Returns:
        The written paths, the page first.

    Raises:
        ValueError: `scores` holds no cell.
    """
    _require_cells(scores, "scores.json")
    figures = _Figures(Path(output) / "figures")
    overview = figures.add("scores", lambda path: score_map(scores, path), f"{_WINDOW} Grey: not run.",
                           "Scores by task and length, with means below")  # fmt: skip
    page = html.page(
        f"RULER: {model_name(scores['provenance'])}",
        warnings_section(scores["warnings"]),
        html.section("Scores", html.paragraph(headline(scores["provenance"])), overview, score_table(scores),
                     html.paragraph(summary_sentence(scores)), folded("Empty and cut answers", answers_table(scores))),
        _position_section(scores, figures),
        _forced_section(scores, figures),
        _position_section(scores, figures, teacher_forced=True),
        worst_section(scores),
        provenance_section({"run": scores["provenance"]}),
        width=WIDTH,
    )  # fmt: skip
    path = Path(output) / "report.html"
    replace_file(path, page.encode("utf-8", errors="backslashreplace"))
    return [path, *figures.paths]


def _interval(entry: Mapping, names: tuple[str, str, str]) -> str:
    value, low, high = (entry[name] for name in names)
    if value is None:
        return "–"
    ends = "" if low is None or high is None else f" [{low:+.2f}, {high:+.2f}]"
    return f"{value:+.2f}{ends}"


_SCORE = ("difference", "low", "high")
_DEVIATION = ("deviation_difference", "deviation_low", "deviation_high")


def _regressions(comparison: Mapping) -> html.Markup:
    bound, found = comparison["bound"], comparison["regressions"]
    if bound is None:
        text = "No bound was given, so none were looked for."
    else:
        text = (
            f"{len(found)} fell by more than the bound of {bound:g} points, with a 95 % interval below 0."
            if found
            else f"None: nothing fell by more than the bound of {bound:g} points with a 95 % interval below 0."
        )
    lines = [f"{one['task']} at {length_label(one['length'])}: {_interval(one, _SCORE)} points" for one in found]
    return html.section("Regressions", html.paragraph(text), bullets(lines) if lines else "")


def _difference_tables(comparison: Mapping) -> list[html.Markup]:
    caption = (
        "New minus base in points, with 95 % paired bootstrap intervals: both models answered the same samples. "
        "Deviations over positions have the noise of finite samples taken off."
    )
    rows = [
        [cell["task"], length_label(cell["length"]), f"{cell['base']:.2f}", f"{cell['new']:.2f}",
         _interval(cell, _SCORE), _interval(cell, _DEVIATION), cell["samples"]]
        for cell in comparison["cells"]
    ]  # fmt: skip
    header = ["task", "length", "base", "new", "score", "deviation over positions", "samples"]
    tables = [folded("Every cell", html.table(header, rows, caption, text_columns=2))]
    if comparison["mean"]:
        means = [[length_label(entry["length"]), _interval(entry, _SCORE)] for entry in comparison["mean"]]
        tables.insert(0, html.table(["length", "RULER mean, new minus base"], means, caption))
    return tables


def _difference_figures(comparison: Mapping, figures: _Figures) -> list[html.Markup]:
    note = "Blue is better for the new model. The dashed line is the new model's trained window."
    blocks = [figures.add("differences", lambda path: difference_map(comparison, path), note,
                          "Differences of the scores by task and length")]  # fmt: skip
    if any(cell["deviation_difference"] is not None for cell in comparison["cells"]):
        blocks.append(figures.add(
            "deviation_differences", lambda path: deviation_difference_map(comparison, path),
            "Blue: the new model's accuracy depends less on the position. The noise of finite samples is taken off.",
            "Differences of the deviation over positions by task and length",
        ))  # fmt: skip
    return blocks


def _position_comparison(
    comparison: Mapping, models: Mapping[str, Mapping], figures: _Figures, teacher_forced: bool = False
) -> html.Markup:
    tasks = list(dict.fromkeys(t for scores in models.values() for t in positional_tasks(scores, teacher_forced)))
    if not tasks:
        return html.Markup("")
    prefix = "forced_" if teacher_forced else ""
    curves = [
        figures.add(f"{prefix}curves_{task}",
                    lambda path, task=task: position_curves(models, task, path, teacher_forced),
                    "", f"Accuracy of {task} against position, both models, a panel for every length")
        for task in tasks
    ]  # fmt: skip
    have = {cell["task"] for cell in comparison["cells"] if cell["position_difference"]}
    maps = [
        figures.add(f"position_differences_{task}",
                    lambda path, task=task: position_difference_map(comparison, task, path),
                    "", f"Differences of the accuracy of {task} by length and position")
        for task in tasks if task in have and not teacher_forced
    ]  # fmt: skip
    heading = "Positions, teacher-forced" if teacher_forced else "Positions"
    return html.section(heading, html.paragraph(f"The start of the prompt is 0. {_BANDS}"), *curves, gallery(maps))


def write_comparison(comparison: Mapping, base_scores: Mapping, new_scores: Mapping, output: Path) -> list[Path]:
    """`output`/comparison.html, self-contained, and its figures beside it in `output`/comparison_figures.

    Args:
        comparison: what compare.json holds.
        base_scores, new_scores: what the two runs' scores.json hold.

    Returns:
        The written paths, the page first.

    Raises:
        ValueError: the comparison holds no cell.
    """
    _require_cells(comparison, "compare.json")
    figures = _Figures(Path(output) / "comparison_figures")
    names = [f"base: {model_name(comparison['base'])}", f"new: {model_name(comparison['new'])}"]
    models = dict(zip(names, (base_scores, new_scores), strict=True))
    warnings = list(comparison.get("warnings", ()))
    for name, scores in models.items():
        warnings += [f"{name}: {warning}" for warning in scores["warnings"]]
    page = html.page(
        f"RULER: {model_name(comparison['new'])} against {model_name(comparison['base'])}",
        warnings_section(warnings),
        _regressions(comparison),
        html.section("Differences", *_difference_figures(comparison, figures), *_difference_tables(comparison)),
        _position_comparison(comparison, models, figures),
        _position_comparison(comparison, models, figures, teacher_forced=True),
        *(html.section(f"Scores, {name}", score_table(scores)) for name, scores in models.items()),
        worst_section(new_scores),
        provenance_section({"base": comparison["base"], "new": comparison["new"]}),
        width=WIDTH,
    )
    path = Path(output) / "comparison.html"
    replace_file(path, page.encode("utf-8", errors="backslashreplace"))
    return [path, *figures.paths]
