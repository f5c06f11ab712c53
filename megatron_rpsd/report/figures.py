"""Figures as PNG bytes. Plain data in, no files, no display.

Colours are Okabe and Ito's, which people with colour-blindness tell apart; every line has a marker or dash of its own.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_rpsd.report.metrics import Series

_STYLES = (
    {"color": "#6b6b6b", "marker": "s", "linestyle": ":"},
    {"color": "#D55E00", "marker": "o", "linestyle": "--"},
    {"color": "#0072B2", "marker": "D", "linestyle": "-"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": "#E69F00", "marker": "P", "linestyle": (0, (1, 1))},
    {"color": "#56B4E9", "marker": "X", "linestyle": (0, (7, 2))},
    {"color": "#000000", "marker": "<", "linestyle": (0, (3, 1, 1, 1))},
    {"color": "#8C5A2B", "marker": ">", "linestyle": (0, (2, 2))},
)


@dataclass(frozen=True)
class Panel:
    """Curves over steps that share one axis.

    Attributes:
        label: of the vertical axis, with its unit.
        curves: by name; drawn with the style of their place in `styles`, or in this mapping without it.
        styles: the name of every curve of the figure, in the order in which styles are given out.
    """

    title: str
    label: str
    curves: Mapping[str, Series]
    styles: Sequence[str] = ()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _style(index: int) -> dict:
    return dict(_STYLES[index % len(_STYLES)])


def _clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend_above(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False)


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of the last `window` values up to each one (fewer at the start), float64 [len(values)]."""
    assert window >= 1
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return (sums[stop] - sums[start]) / (stop - start)


def curves_over_steps(panels: Sequence[Panel], smooth: int = 1) -> bytes:
    """Panels side by side: each step's value in faint, the running mean over `smooth` steps on top."""
    figure = Figure(figsize=(5.2 * len(panels), 3.6), dpi=130, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        order = list(panel.styles or panel.curves)
        for name, series in panel.curves.items():
            style = _style(order.index(name))
            if smooth > 1:
                axes.plot(series.steps, series.values, linestyle="", marker=style["marker"], markersize=3.5,
                          color=style["color"], alpha=0.35)  # fmt: skip
            style.pop("marker")
            axes.plot(series.steps, running_mean(series.values, smooth), linewidth=1.8, label=name, **style)
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(panel.label)
        _clean(axes)
    _legend_above(figure, max(all_axes, key=lambda axes: len(axes.get_lines())))
    return _png(figure)


def means_over_log_axis(points: Sequence[float], models: Mapping[str, np.ndarray], x_label: str, y_label: str) -> bytes:
    """One line per model: mean over rows, with the standard error of the mean as bars; horizontal axis in powers of 2.

    Args:
        points: positive, S values of the horizontal axis.
        models: name -> [N, S], one row per window.
    """
    figure = Figure(figsize=(7.2, 4.0), dpi=130, layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(models.items()):
        assert values.shape[1] == len(points)
        # Bars of lines that nearly coincide would hide each other.
        shifted = np.asarray(points, dtype=np.float64) * 2.0 ** (0.09 * (index - (len(models) - 1) / 2))
        axes.errorbar(shifted, values.mean(axis=0), yerr=standard_error(values), label=name, linewidth=1.6,
                      markersize=5, capsize=3, elinewidth=1.0, **_style(index))  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(points), [f"{point:g}" for point in points])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _clean(axes)
    _legend_above(figure, axes)
    return _png(figure)


def standard_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first axis; NaN for a single row, which says nothing about spread."""
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    return values.std(axis=0, ddof=1) / np.sqrt(len(values))


def paired_changes(changes: Mapping[str, np.ndarray], y_label: str, x_label: str, first_style: int = 0) -> bytes:
    """One column of marks per window and one mark per model: what changed in the same window.

    Args:
        changes: name -> [N] in percent.
        first_style: style of the first model, so that a model looks alike in every figure of a report.
    """
    figure = Figure(figsize=(7.2, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(changes.items()):
        style = _style(first_style + index)
        windows = np.arange(1, len(values) + 1)
        axes.plot(windows, values, linestyle="", marker=style["marker"], color=style["color"], markersize=7, label=name)
        axes.axhline(float(np.mean(values)), color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
    axes.axhline(0.0, color="#1a1a1a", linewidth=0.8)
    axes.set_xticks(np.arange(1, max(len(values) for values in changes.values()) + 1))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _clean(axes)
    axes.grid(False, axis="x")
    _legend_above(figure, axes)
    return _png(figure)
