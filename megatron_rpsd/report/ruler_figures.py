"""Maps of RULER's scores over tasks and lengths, drawn from scores.json and compare.json alone.

Every function writes a PNG and returns the figure. Scores have one scale everywhere, 0 to 100 in cividis, which people
with colour-blindness read as others do; the number stands in every cell, and a cell without one is grey.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from megatron_rpsd.data.files import replace_file
from megatron_rpsd.report.figures import _png
from megatron_rpsd.report.ruler_scores import (
    RULER_MEAN,
    Row,
    Window,
    cells_by_place,
    first_beyond,
    headline,
    length_label,
    mean_rows,
    model_name,
    places,
    position_rows,
    trained_window,
)

SCORE_SCALE, SCORE_COLOURS = (0.0, 100.0), "cividis"
DIFFERENCE_COLOURS = "RdBu"
_GREY, _INK = "#c8c8c8", "#1a1a1a"
_CELL_WIDTH, _CELL_HEIGHT = 0.82, 0.33
"""Inches; the figure grows with its cells, so that numbers and labels never meet."""
_LEAST_WIDTH = 4.6
"""Inches, so that the legend has room."""
_FEW_ROWS = 5
_LEAST_SPAN = 10.0
"""Points: the colours of a difference map reach at least so far, so that noise does not look like a result."""


def save(figure: Figure, path: str | Path) -> Figure:
    """The figure, which is written as a PNG at `path`."""
    replace_file(path, _png(figure))
    return figure


def number(value: float) -> str:
    """A score in points as a cell shows it: one decimal, without one for 0 and 100."""
    return f"{value:.0f}" if value in (0, 100) else f"{value:.1f}"


def signed(value: float) -> str:
    """A difference in points as a cell shows it."""
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}"


def wrap_title(title: str, inches: float) -> str:
    """`title` in lines that fit a figure of that width."""
    return "\n".join(textwrap.wrap(title, int((inches - 0.2) / 0.095), break_on_hyphens=False))


@dataclass(frozen=True)
class Map:
    """A coloured table.

    Attributes:
        values: [len(rows), len(columns)], NaN where there is nothing.
        below: rows of numbers without a colour, under the map.
        absent: what a grey cell means.
        window: the trained window; `lengths` beyond it stand right of a dashed line.
        dots: [len(rows), len(columns)] bool, cells that get a dot; None for no dots.
        dot: what a dot means.
    """

    title: str
    rows: Sequence[str]
    lengths: Sequence[int]
    values: np.ndarray
    row_label: str = ""
    below: Sequence[Row] = ()
    absent: str = "not run"
    window: Window | None = None
    scale: tuple[float, float] = SCORE_SCALE
    colours: str = SCORE_COLOURS
    scale_label: str = "score, 0 to 100"
    text: Callable[[float], str] = number
    dots: np.ndarray | None = None
    dot: str = ""


def _draw_cells(axes: Axes, table: Map):
    colours = colormaps[table.colours].with_extremes(bad=_GREY)
    low, high = table.scale
    image = axes.imshow(np.ma.masked_invalid(table.values), vmin=low, vmax=high, cmap=colours, aspect="auto")
    for row, column in np.ndindex(*table.values.shape):
        value = table.values[row, column]
        if np.isnan(value):
            continue
        red, green, blue, _ = colours((value - low) / (high - low))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        axes.text(column, row, table.text(value), ha="center", va="center", fontsize=9, color=ink)
        if table.dots is not None and table.dots[row, column]:
            axes.plot(column + 0.42, row - 0.33, marker="o", markersize=3.5, color=ink, linestyle="", label=table.dot)
    axes.set_yticks(range(len(table.rows)), table.rows)
    axes.set_xticks(range(len(table.lengths)), [length_label(length) for length in table.lengths])
    axes.tick_params(length=0, labelsize=9)
    axes.set_ylabel(table.row_label, fontsize=9)
    axes.set_xticks(np.arange(len(table.lengths) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(table.rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    return image


def _draw_rows(axes: Axes, table: Map) -> None:
    """Numbers on white, column under column."""
    for row, entry in enumerate(table.below):
        for column, value in enumerate(entry.values):
            words = "–" if value is None else table.text(value)
            axes.text(column, row, words, ha="center", va="center", fontsize=9, color=_INK)
    axes.set_xlim(-0.5, len(table.lengths) - 0.5)
    axes.set_ylim(len(table.below) - 0.5, -0.5)
    axes.set_yticks(range(len(table.below)), [entry.label for entry in table.below])
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=9)
    axes.spines[["left", "right", "bottom"]].set_visible(False)
    axes.spines["top"].set_color("#888888")


def _draw_window(all_axes: Sequence[Axes], table: Map) -> None:
    beyond = first_beyond(table.lengths, table.window)
    if beyond is None:
        return
    for axes in all_axes:
        axes.axvline(beyond - 0.5, color="#D55E00", linestyle="--", linewidth=1.8, clip_on=False)
    for words, shift, side in ((f"trained to {length_label(table.window.tokens)}", -4, "right"),
                               (table.window.beyond, 4, "left")):  # fmt: skip
        all_axes[0].annotate(
            words, (beyond - 0.5, 1.0), xycoords=("data", "axes fraction"), xytext=(shift, 4),
            textcoords="offset points", ha=side, fontsize=8.5, color="#a34700",
        )  # fmt: skip


def _legend(figure: Figure, table: Map) -> None:
    handles = []
    if np.isnan(table.values).any():
        handles.append(Patch(color=_GREY, label=table.absent))
    if table.dots is not None:
        handles.append(Line2D([], [], marker="o", markersize=3.5, color=_INK, linestyle="", label=table.dot))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower right",
            ncols=1 if figure.get_figwidth() < 6 else 2,
            frameon=False,
            fontsize=8.5,
        )


def draw_map(table: Map) -> Figure:
    """The map, its rows of numbers below, and a colour bar. Axes: map, rows (when there are any), colour bar."""
    below = len(table.below)
    names = 0.075 * max(len(name) for name in (*table.rows, *(entry.label for entry in table.below)))
    width = max(names + 1.6 + _CELL_WIDTH * len(table.lengths), _LEAST_WIDTH)
    title = wrap_title(table.title, width)
    height = 1.4 + 0.2 * (1 + title.count("\n")) + _CELL_HEIGHT * (len(table.rows) + below)
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    ratios = [len(table.rows), below] if below else [len(table.rows)]
    all_axes = figure.subplots(len(ratios), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    image = _draw_cells(all_axes[0], table)
    if below:
        _draw_rows(all_axes[1], table)
    all_axes[0].set_xlabel("length, tokens", fontsize=9)
    _draw_window(all_axes, table)
    figure.suptitle(title, fontsize=11, parse_math=False)
    few = len(table.rows) < _FEW_ROWS  # the bar then runs along the numbers below too, or its label would not fit
    bar = figure.colorbar(image, ax=list(all_axes) if few else all_axes[0], pad=0.015, aspect=25)
    bar.set_label(table.scale_label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    _legend(figure, table)
    return figure


def _values(tasks: Sequence[str], lengths: Sequence[int], value: Callable[[str, int], float | None]) -> np.ndarray:
    found = [[value(task, length) for length in lengths] for task in tasks]
    return np.array(found, dtype=np.float64).reshape(len(tasks), len(lengths))  # None becomes NaN


def score_map(scores: Mapping, path: str | Path) -> Figure:
    """Tasks by lengths, with the means, the mean deviation and the mean range over positions below."""
    cells = cells_by_place(scores)
    values = _values(
        scores["tasks"], scores["lengths"], lambda task, length: cells.get((task, length), {}).get("score")
    )
    below = [*mean_rows(scores), *position_rows(scores)]
    window = trained_window(scores["provenance"])
    figure = draw_map(
        Map(headline(scores["provenance"]), scores["tasks"], scores["lengths"], values, below=below, window=window)
    )
    return save(figure, path)


def teacher_forced_map(scores: Mapping, quantity: str, path: str | Path) -> Figure:
    """Tasks by lengths of the teacher-forced answers, which no mean of RULER's includes.

    Args:
        quantity: greedy_exact (share of answers whose every token is the model's first choice, 0 to 100) or nll
            (nats per answer token; the colours reach from 0 to the largest).
    """
    cells = {place: cell["teacher_forced"] for place, cell in cells_by_place(scores).items() if cell["teacher_forced"]}
    values = _values(
        scores["tasks"], scores["lengths"], lambda task, length: cells.get((task, length), {}).get(quantity)
    )
    name = model_name(scores["provenance"])
    window = trained_window(scores["provenance"])
    if quantity == "greedy_exact":
        below = position_rows(scores, teacher_forced=True)
        table = Map(f"{name}: teacher-forced answers, greedy-exact", scores["tasks"], scores["lengths"], values,
                    below=below, window=window, scale_label="answers, %")  # fmt: skip
    else:
        largest = float(np.nanmax(values, initial=0.0)) or 1.0
        table = Map(f"{name}: teacher-forced answers, loss", scores["tasks"], scores["lengths"], values,
                    window=window, scale=(0.0, largest), colours="cividis_r", scale_label="nats per answer token",
                    text="{:.3f}".format)  # fmt: skip
    figure = draw_map(table)
    return save(figure, path)


def symmetric_scale(values: np.ndarray) -> tuple[float, float]:
    """Colours around 0 that reach the largest difference, and `_LEAST_SPAN` points at least."""
    span = max(_LEAST_SPAN, float(np.nanmax(np.abs(values), initial=0.0)))
    return -span, span


DOT = "dot: the 95 % interval excludes 0"


def _difference(comparison: Mapping, names: tuple[str, str, str], **options: object) -> Figure:
    """A map of one difference of every cell; `names` are the keys of the value and of its interval's two ends."""
    tasks, lengths = places(comparison)
    cells = cells_by_place(comparison)
    tasks = [task for task in tasks if any(cell["task"] == task and cell[names[0]] is not None
                                           for cell in comparison["cells"])]  # fmt: skip
    value, low, high = (
        _values(tasks, lengths, lambda task, length, key=key: cells.get((task, length), {}).get(key)) for key in names
    )
    dots = (low > 0) | (high < 0)
    return draw_map(
        Map(rows=tasks, lengths=lengths, values=value, window=trained_window(comparison["new"]),
            scale=symmetric_scale(value), text=signed, dots=dots, dot=DOT, **options)
    )  # fmt: skip


def difference_map(comparison: Mapping, path: str | Path) -> Figure:
    """Scores of the new model minus the base's, tasks by lengths; blue is a gain. Means with intervals below."""
    lengths = places(comparison)[1]
    below = []
    if comparison["mean"]:
        mean = {entry["length"]: entry for entry in comparison["mean"]}
        names = {"difference": RULER_MEAN, "low": "95 % interval, low", "high": "95 % interval, high"}
        below = [
            Row(label, tuple(mean[length][key] if length in mean else None for length in lengths))
            for key, label in names.items()
        ]
    title = f"{model_name(comparison['new'])} minus {model_name(comparison['base'])}: score"
    figure = _difference(comparison, ("difference", "low", "high"), title=title, below=below,
                         colours=DIFFERENCE_COLOURS, scale_label="points (blue: better)")  # fmt: skip
    return save(figure, path)


def deviation_difference_map(comparison: Mapping, path: str | Path) -> Figure:
    """The change of the deviation over positions, less noise, tasks by lengths; blue is less of it."""
    title = f"{model_name(comparison['new'])} minus {model_name(comparison['base'])}: deviation over positions"
    keys = ("deviation_difference", "deviation_low", "deviation_high")
    figure = _difference(comparison, keys, title=title, colours=f"{DIFFERENCE_COLOURS}_r", absent="no positions",
                         scale_label="points (blue: more even)")  # fmt: skip
    return save(figure, path)
