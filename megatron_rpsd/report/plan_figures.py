"""Figures of plans: bars of step time and memory of the best layouts, and curves over GPUs and sequence lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from megatron_rpsd.report.figures import _clean, _png, _style

_GIB = 2**30
_TIME_COLOURS = {
    "matrix products": "#0072B2", "attention": "#56B4E9", "memory-bound": "#009E73", "TP": "#E69F00", "CP": "#D55E00",
    "PP": "#8C5A2B", "pipeline bubble": "#CC79A7", "gradients and weights over DP": "#000000", "optimizer": "#6b6b6b",
}  # fmt: skip
_MEMORY_GROUPS = {
    "weights": (("weights",), "#0072B2"),
    "gradients": (("gradients",), "#56B4E9"),
    "optimizer states": (("optimizer states",), "#009E73"),
    "activations": (("layers' activations", "rotary tables", "final norm"), "#E69F00"),
    "keys and values over CP": (("keys and values over CP",), "#D55E00"),
    "recomputed layer, backward pass": (
        ("recomputed layer", "backward pass of a layer", "tied weight's gradient"),
        "#CC79A7",
    ),
    "fused loss": (
        (
            "fused loss: hidden states and their gradients",
            "fused loss: output weight's gradient",
            "fused loss: chunk",
        ),
        "#8C5A2B",
    ),
    "kept back": (("fragmentation", "reserved"), "#b0b0b0"),
}


@dataclass(frozen=True)
class PlanBar:
    """One layout's bars.

    Attributes:
        label: of its row.
        seconds: by cause; the causes of `planning.roofline`.
        bytes: by item; the items of `planning.memory`.
    """

    label: str
    seconds: Mapping[str, float]
    bytes: Mapping[str, int]


def _stacked(axes, rows: Sequence[Mapping[str, float]], colours: Mapping[str, str]) -> None:
    lefts = [0.0] * len(rows)
    for name, colour in colours.items():
        widths = [row.get(name, 0.0) for row in rows]
        if any(widths):
            axes.barh(range(len(rows)), widths, left=lefts, color=colour, label=name, height=0.62)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, total in enumerate(lefts):
        axes.text(total, place, f" {total:.3g}", va="center", fontsize=8)
    axes.set_xlim(0, max(lefts) * 1.12)
    _clean(axes)
    axes.grid(False, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=7.5)


def layout_bars(bars: Sequence[PlanBar], capacity_bytes: int, title: str) -> bytes:
    """Step time and memory of a few layouts, the best on top, as PNG bytes.

    Raises:
        AssertionError: an item or a cause that no group knows, which would silently be left out.
    """
    grouped = {name for names, _ in _MEMORY_GROUPS.values() for name in names}
    for bar in bars:
        assert set(bar.bytes) <= grouped and set(bar.seconds) <= set(_TIME_COLOURS), bar
    figure = Figure(figsize=(12.0, 2.6 + 0.42 * len(bars)), dpi=120, layout="constrained")
    times, memories = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, fontsize=11)
    _stacked(times, [bar.seconds for bar in bars], _TIME_COLOURS)
    groups = [
        {group: sum(bar.bytes.get(name, 0) for name in names) / _GIB for group, (names, _) in _MEMORY_GROUPS.items()}
        for bar in bars
    ]
    _stacked(memories, groups, {group: colour for group, (_, colour) in _MEMORY_GROUPS.items()})
    times.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8)
    times.invert_yaxis()
    times.set_xlabel("predicted step time, s")
    memories.set_xlabel("predicted memory of the fullest rank, GiB (dashed: the GPU's)")
    memories.axvline(capacity_bytes / _GIB, color="#1a1a1a", linestyle="--", linewidth=1.2)
    memories.set_xlim(0, max(memories.get_xlim()[1], capacity_bytes / _GIB * 1.05))
    return _png(figure)


def scaling_curves(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]], x_label: str, title: str, logarithmic: Sequence[str] = ()
) -> bytes:
    """One panel per quantity (two side by side), one line per series, over an axis in powers of two, as PNG bytes.

    Args:
        panels: label of the vertical axis -> series -> x -> value; a missing x is a gap (nothing fits).
        logarithmic: panels with a logarithmic vertical axis.
    """
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10.4, 0.9 + 3.3 * rows), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    every = sorted({x for panel in panels.values() for series in panel.values() for x in series})
    all_axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    for axes, (label, panel) in zip(all_axes, panels.items(), strict=False):
        for index, (name, series) in enumerate(panel.items()):
            values = [series.get(x, float("nan")) for x in every]
            axes.plot(every, values, label=name, linewidth=1.5, markersize=5, **_style(index))
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [str(x) for x in every])
        axes.minorticks_off()
        if label in logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        _clean(axes)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return _png(figure)
