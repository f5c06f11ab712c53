"""Figures of the two instruments: how a shift of positions travels through a model, and what training changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_rpsd.report.figures import _clean, _legend_above, _png, _style

_PANELS_A_ROW = 3
_UNTOUCHED = "#d9d9d9"
_MAP = "viridis"


def _heat_map(figure: Figure, axes, values: np.ndarray, top: float | None = None) -> None:
    """A map of values >= 0 on a scale from 0 to `top` or their largest; what is exactly 0, or undefined, is grey."""
    colours = colormaps[_MAP].with_extremes(bad=_UNTOUCHED)
    shown = np.ma.masked_where(~(values > 0), values)
    image = axes.imshow(shown, vmin=0.0, vmax=top, cmap=colours, aspect="auto", interpolation="nearest", origin="lower")
    axes.tick_params(length=0, labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    beyond = "max" if top is not None and shown.size and shown.max() > top else "neither"
    bar = figure.colorbar(image, ax=axes, pad=0.02, extend=beyond)
    bar.ax.tick_params(labelsize=8)


def trace_heat_maps(changes: Mapping[str, np.ndarray], shift_repeat: int, title: str) -> bytes:
    """A panel for every quantity: relative change by layer (upwards) and repeat, each with its own scale.

    Args:
        changes: quantity -> [layers, repeats]; exact zeros are grey.
        shift_repeat: the first shifted repeat; a line stands before it.
    """
    lines = -(-len(changes) // _PANELS_A_ROW)
    figure = Figure(figsize=(4.1 * _PANELS_A_ROW, 0.6 + 3.1 * lines), dpi=130, layout="constrained")
    grid = figure.subplots(lines, _PANELS_A_ROW, squeeze=False).ravel()
    for axes in grid[len(changes) :]:
        axes.set_visible(False)
    for index, (axes, (name, values)) in enumerate(zip(grid, changes.items(), strict=False)):
        _heat_map(figure, axes, values)
        axes.axvline(shift_repeat - 0.5, color="#D55E00", linewidth=1.6, linestyle="--")
        axes.set_title(name, fontsize=10)
        if index + _PANELS_A_ROW >= len(changes):
            axes.set_xlabel("repeat", fontsize=9)
        if index % _PANELS_A_ROW == 0:
            axes.set_ylabel("layer", fontsize=9)
    figure.suptitle(f"{title}; relative change |x' - x| / |x|, grey: exactly 0", fontsize=11)
    return _png(figure)


def divergence_curves(
    per_repeat: Mapping[str, np.ndarray], by_distance: Mapping[str, np.ndarray], distances: Sequence[tuple[int, int]]
) -> bytes:
    """KL of the next token by repeat, and by distance from the first shifted token, a line for every shift.

    Args:
        per_repeat: name -> [repeats]; zeros have no place on the logarithmic axis and are left out.
        by_distance: name -> [ranges].
        distances: half-open ranges in tokens.
    """
    figure = Figure(figsize=(10.6, 4.0), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    middles = [(low + high - 1) / 2 + 1 for low, high in distances]  # counted from 1 for the logarithmic axis
    for index, (name, values) in enumerate(per_repeat.items()):
        left.plot(np.arange(len(values)), np.where(values > 0, values, np.nan), label=name, **_line(index))
        behind = by_distance[name]
        right.plot(middles, np.where(behind > 0, behind, np.nan), **_line(index))
    left.set_yscale("log")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_xlim(-0.4, len(values) - 0.6)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_xlabel("repeat (none drawn: exactly 0)")
    left.set_ylabel("KL(shifted || standard), nats per token")
    right.set_xscale("log", base=2)
    right.set_xlabel("token, counted from the first shifted one (1)")
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in (left, right):
        _clean(axes)
    _legend_above(figure, left)
    return _png(figure)


def _line(index: int) -> dict:
    return {**_style(index), "linewidth": 1.7, "markersize": 5}


def update_heat_maps(changes: Mapping[str, np.ndarray], control: str) -> bytes:
    """A panel for every projection: relative change by layer (upwards) and RoPE frequency, all on one scale.

    Args:
        changes: name -> [layers, d/2], mean over heads.
        control: a projection that the scale is not made for; what it has beyond it takes the last colour.
    """
    scaled = [values for name, values in changes.items() if name != control]
    top = max(float(np.nanmax(values, initial=0.0)) for values in scaled) or None
    figure = Figure(figsize=(4.3 * len(changes), 4.2), dpi=130, layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(changes), squeeze=False)[0], changes.items(), strict=True):
        _heat_map(figure, axes, values, top)
        axes.set_title(f"{name}: |ΔW| / |W|", fontsize=10)
        axes.set_xlabel("RoPE frequency index (0 turns fastest)", fontsize=9)
        axes.set_ylabel("layer", fontsize=9)
    return _png(figure)


def update_curves(curves: Mapping[str, np.ndarray], wavelengths: np.ndarray, window: int) -> bytes:
    """Mean relative change by frequency; above, the frequencies' wavelengths, and where the window ends among them.

    Args:
        curves: name -> [d/2].
        wavelengths: [d/2] in tokens, rising.
        window: tokens; a line stands where a frequency turns once in it. It is left out beyond both ends.
    """
    figure = Figure(figsize=(8.4, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    indices = np.arange(len(wavelengths))
    for index, (name, values) in enumerate(curves.items()):
        axes.plot(indices, values, label=name, **{**_line((2, 1, 0)[index % 3]), "markersize": 4})
    place = np.interp(np.log(window), np.log(wavelengths), indices)
    if wavelengths[0] <= window <= wavelengths[-1]:
        axes.axvline(
            place, color="#1a1a1a", linewidth=1.2, linestyle=(0, (6, 3)), label=f"one turn in {window:,} tokens"
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("RoPE frequency index (0 turns fastest)")
    axes.set_ylabel("mean |ΔW| / |W| over layers and heads")
    _clean(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    above = axes.secondary_xaxis("top")
    ticks = np.unique(np.linspace(0, len(indices) - 1, 9).round().astype(int))
    above.set_xticks(ticks, [_short(wavelengths[tick]) for tick in ticks])
    above.set_xlabel("wavelength, tokens")
    _legend_above(figure, axes)
    return _png(figure)


def _short(tokens: float) -> str:
    """A number of tokens in few characters."""
    for size, letter in ((1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return f"{tokens:.3g}"
