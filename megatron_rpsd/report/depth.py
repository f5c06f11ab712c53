"""Figures of accuracy by the depth at which the evidence stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from megatron_rpsd.report.figures import _clean, _legend_above, _png, _style

_PANELS_A_ROW = 3


def _depth_ticks(depths: int) -> list[str]:
    """Labels of the depth ranges' lower ends, in percent."""
    return [f"{100 * index // depths}" for index in range(depths)]


def accuracy_by_depth(panels: Mapping[str, Mapping[str, np.ndarray]], styles: Sequence[str], depth_label: str) -> bytes:
    """Panels side by side, a line for every model: mean over seeds, the band from the lowest to the highest seed.

    Args:
        panels: title -> model -> accuracy [S, D], seeds by depth ranges of equal width, the furthest first.
        styles: the name of every model of the report, in the order in which styles are given out.
        depth_label: of the horizontal axis.
    """
    figure = Figure(figsize=(1.0 + 3.9 * len(panels), 4.2), dpi=130, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, models) in zip(all_axes, panels.items(), strict=True):
        for name, accuracy in models.items():
            depths = (np.arange(accuracy.shape[1]) + 0.5) * 100.0 / accuracy.shape[1]
            style = _style(list(styles).index(name))
            axes.plot(depths, accuracy.mean(axis=0), label=name, linewidth=1.7, markersize=5, **style)
            if len(accuracy) > 1:
                axes.fill_between(depths, accuracy.min(axis=0), accuracy.max(axis=0), color=style["color"],
                                  alpha=0.12, linewidth=0)  # fmt: skip
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(depth_label)
        axes.set_xticks(range(0, 101, 20))
        axes.set_ylim(-0.03, 1.03)
        _clean(axes)
    all_axes[0].set_ylabel("accuracy")
    figure.get_layout_engine().set(wspace=0.05)  # the last tick of a panel must not touch the next one's first
    _legend_above(figure, all_axes[0])
    return _png(figure)


def depth_heat_maps(models: Mapping[str, np.ndarray], rows: Sequence[str], row_label: str, depth_label: str) -> bytes:
    """A map for every model: accuracy of each row (a length) at each depth, the number in every cell.

    Args:
        models: name -> accuracy [len(rows), D], the furthest depth first.
    """
    columns = min(_PANELS_A_ROW, len(models))
    lines = -(-len(models) // columns)
    height = 0.95 + 0.34 * len(rows)
    figure = Figure(figsize=(0.6 + 4.6 * columns, 0.5 + height * lines), dpi=130, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.ravel()[len(models) :]:
        axes.set_visible(False)
    for index, (name, accuracy) in enumerate(models.items()):
        axes = grid[index // columns][index % columns]
        image = axes.imshow(accuracy, vmin=0.0, vmax=1.0, cmap="cividis", aspect="auto")
        for row, column in np.ndindex(*accuracy.shape):
            value = accuracy[row, column]
            # Without the leading zero, so that the number fits its cell.
            text = "1.0" if value > 0.995 else f"{value:.2f}"[1:]
            colour = "white" if value < 0.55 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
        axes.set_title(name, fontsize=10)
        axes.set_yticks(range(len(rows)), rows if index % columns == 0 else [""] * len(rows))
        below = index + columns >= len(models)
        axes.set_xticks(range(accuracy.shape[1]), _depth_ticks(accuracy.shape[1]) if below else [])
        axes.tick_params(length=0, labelsize=8)
    figure.supxlabel(depth_label, fontsize=10)
    figure.supylabel(row_label, fontsize=10)
    figure.colorbar(image, ax=grid, label="accuracy", shrink=0.9, pad=0.01)
    return _png(figure)
