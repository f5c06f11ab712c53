"""Figures of RULER's accuracy by the position of the evidence, drawn from scores.json and compare.json alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_rpsd.report.figures import _clean, _style
from megatron_rpsd.report.ruler_figures import (
    DIFFERENCE_COLOURS,
    DOT,
    Map,
    draw_map,
    save,
    signed,
    symmetric_scale,
    wrap_title,
)
from megatron_rpsd.report.ruler_scores import (
    Row,
    Window,
    bin_label,
    cells_by_place,
    length_label,
    model_name,
    places,
    positions_of,
    trained_window,
)

POSITION = "position of the evidence, % of the prompt"
_PANELS_A_ROW = 4


def _edges(one: Mapping) -> tuple[float, float]:
    return round(one["low"], 9), round(one["high"], 9)


def all_bins(bins: Iterable[Mapping]) -> list[tuple[float, float]]:
    """(low, high) of every bin from the start of the prompt to its end, those that no entry of `bins` names included.

    scores.json leaves bins without evidence out. Native bins are equal parts of the prompt, so the width of one tells
    the others; a grid's depths (low equals high) are those that were asked for.
    """
    found = sorted({_edges(one) for one in bins})
    width = max((high - low for low, high in found), default=0.0)
    if not width:
        return found
    count = round(1.0 / width)
    parts = [(round(index / count, 9), round((index + 1) / count, 9)) for index in range(count)]
    return parts if set(found) <= set(parts) else found


def _table(
    bins_by_length: Mapping[int, Sequence[Mapping]], lengths: Sequence[int], key: str, factor: float
) -> np.ndarray:
    """[positions, lengths]: `key` of every bin times `factor`, NaN where there is none."""
    order = {edges: row for row, edges in enumerate(_rows(bins_by_length))}
    values = np.full((len(order), len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        for one in bins_by_length.get(length, ()):
            if one[key] is not None:
                values[order[_edges(one)], column] = factor * one[key]
    return values


def _rows(bins_by_length: Mapping[int, Sequence[Mapping]]) -> list[tuple[float, float]]:
    return all_bins(one for bins in bins_by_length.values() for one in bins)


def depth_map(scores: Mapping, task: str, path: str | Path, teacher_forced: bool = False) -> Figure:
    """One task's accuracy by length and position, the start of the prompt on top; mean, deviation and range below.

    Args:
        teacher_forced: greedy-exact of the teacher-forced answers instead of the generated ones' accuracy.
    """
    lengths, cells = scores["lengths"], cells_by_place(scores)
    here = {length: cells[task, length] for length in lengths if (task, length) in cells}
    found = {length: positions_of(cell, teacher_forced) for length, cell in here.items()}
    found = {length: position for length, position in found.items() if position}
    bins = {length: position["bins"] for length, position in found.items()}

    def score(length: int) -> float | None:
        cell = here.get(length)
        if cell is None or (teacher_forced and not cell["teacher_forced"]):
            return None
        return cell["teacher_forced"]["greedy_exact"] if teacher_forced else cell["score"]

    below = [Row("mean", tuple(score(length) for length in lengths))]
    for label in ("deviation", "range"):
        below.append(Row(label, tuple(found[length][label] if length in found else None for length in lengths)))
    what = "teacher-forced, greedy-exact" if teacher_forced else "accuracy"
    table = Map(
        title=f"{model_name(scores['provenance'])}, {task}: {what}",
        rows=[bin_label(low, high) for low, high in _rows(bins)],
        lengths=lengths,
        values=_table(bins, lengths, "accuracy", 100.0),
        row_label=POSITION.replace(", ", ",\n"),
        below=below,
        absent="not run, or no sample there",
        window=trained_window(scores["provenance"]),
        scale_label="accuracy, %",
    )
    figure = draw_map(table)
    return save(figure, path)


def position_difference_map(comparison: Mapping, task: str, path: str | Path) -> Figure:
    """One task's gain by length and position; blue is better, a dot where the 95 % interval excludes 0."""
    lengths = places(comparison)[1]
    cells = [cell for cell in comparison["cells"] if cell["task"] == task and cell["position_difference"]]
    bins = {cell["length"]: cell["position_difference"] for cell in cells}
    values = _table(bins, lengths, "difference", 1.0)
    ends = [_table(bins, lengths, key, 1.0) for key in ("ci_low", "ci_high")]
    names = model_name(comparison["new"]), model_name(comparison["base"])
    table = Map(
        title=f"{names[0]} minus {names[1]}, {task}: accuracy",
        rows=[bin_label(low, high) for low, high in _rows(bins)],
        lengths=lengths,
        values=values,
        row_label=POSITION.replace(", ", ",\n"),
        absent="not run, or no sample there",
        window=trained_window(comparison["new"]),
        scale=symmetric_scale(values),
        colours=DIFFERENCE_COLOURS,
        scale_label="points (blue: better)",
        text=signed,
        dots=(ends[0] > 0) | (ends[1] < 0),
        dot=DOT,
    )
    figure = draw_map(table)
    return save(figure, path)


def _curve(axes: Axes, name: str, position: Mapping, style: Mapping) -> None:
    """Accuracy at the middle of every bin and its Wilson interval, in percent; bins without a sample leave a gap."""
    known = {_edges(one): one for one in position["bins"]}
    edges_in_order = all_bins(position["bins"])
    middle = [50.0 * (low + high) for low, high in edges_in_order]
    mid, low, high = (
        np.array([100.0 * known[edges][key] if edges in known and known[edges][key] is not None else np.nan
                  for edges in edges_in_order])
        for key in ("accuracy", "wilson_low", "wilson_high")
    )  # fmt: skip
    axes.plot(middle, mid, label=name, linewidth=1.7, markersize=5, **style)
    axes.fill_between(middle, low, high, color=style["color"], alpha=0.16, linewidth=0)
    # A band has no width at a single point, and at one whose neighbours are missing.
    axes.vlines(middle, low, high, color=style["color"], linewidth=0.9, alpha=0.7)


def _title(length: int, window: Window | None) -> str:
    if window is None or length <= window.tokens:
        return length_label(length)
    return f"{length_label(length)} ({window.beyond})"


def _label_outer(grid: np.ndarray, panels: int, label: str) -> None:
    """Labels at the left of every row and under the lowest panel of every column; axes without a panel are hidden."""
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    for column in range(grid.shape[1]):
        full = (grid.shape[0] - 1) * grid.shape[1] + column < panels
        lowest = grid[-1 if full else -2, column]
        lowest.set_xlabel(POSITION, fontsize=9)
        lowest.tick_params(labelbottom=True)  # shared axes would label the last row alone
        grid[-1, column].set_visible(full)


def _legend_below(figure: Figure, lines: Mapping[str, Line2D]) -> None:
    inches = figure.get_figwidth()
    names = [wrap_title(name, inches - 0.6) for name in lines]
    beside = sum(0.6 + 0.1 * len(name) for name in names) < inches
    legend = figure.legend(lines.values(), names, loc="outside lower center", ncols=len(names) if beside else 1,
                           frameon=False)  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder's name may hold a $


def position_curves(models: Mapping[str, Mapping], task: str, path: str | Path, teacher_forced: bool = False) -> Figure:
    """Accuracy against the position of the evidence, a panel for every length, the models of `models` overlaid.

    This is the paper's Figure 1(a) (arXiv 2604.14339) for any task and length. Bands are 95 % Wilson intervals. A
    length beyond the last model's trained window says so in its title.

    Args:
        models: name -> what its scores.json holds.
        teacher_forced: greedy-exact of the teacher-forced answers instead of the generated ones' accuracy.
    """
    found = {
        name: {
            length: positions_of(cell, teacher_forced)
            for (of, length), cell in cells_by_place(scores).items()
            if of == task and positions_of(cell, teacher_forced)
        }
        for name, scores in models.items()
    }
    lengths = sorted({length for positions in found.values() for length in positions})
    lines = -(-len(lengths) // _PANELS_A_ROW)
    columns = -(-len(lengths) // lines)  # as even rows as can be
    size = (max(1.0 + 2.75 * columns, 5.0), 1.3 + 2.7 * lines)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    window = trained_window(list(models.values())[-1]["provenance"])
    for axes, length in zip(grid.ravel(), lengths, strict=False):
        for index, (name, positions) in enumerate(found.items()):
            if length in positions:
                # The last model, the one looked at, is blue, with one before it in orange.
                _curve(axes, name, positions[length], _style(2 - (len(models) - 1) + index))
        axes.set_title(_title(length, window), fontsize=10)
        axes.set_xlim(-3, 103)
        axes.set_ylim(-4, 104)
        axes.set_xticks(range(0, 101, 25))
        _clean(axes)
    _label_outer(grid, len(lengths), "answers, %" if teacher_forced else "accuracy, %")
    title = f"{next(iter(models))}: {task}" if len(models) == 1 else task
    title += ", teacher-forced greedy-exact" if teacher_forced else ""
    figure.suptitle(wrap_title(title, size[0]), fontsize=11, parse_math=False)
    if len(models) > 1:
        _legend_below(figure, {line.get_label(): line for axes in grid.ravel() for line in axes.get_lines()})
    return save(figure, path)
