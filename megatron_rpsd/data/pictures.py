"""Pictures of data as PNG bytes: lengths of documents, and the positions of a sample's two views."""

from __future__ import annotations

import io

import numpy as np

from megatron_rpsd.data.manifest import Manifest

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#6b6b6b"  # told apart by people with colour-blindness


def _png(figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def draw_lengths(manifest: Manifest) -> bytes:
    """Documents and their tokens by length, a pair of bars for each power of two, as shares of all."""
    figure = _figure(7.2, 3.6)
    axes = figure.subplots()
    places = np.arange(len(manifest.lengths))
    documents = np.array([bucket.documents for bucket in manifest.lengths])
    tokens = np.array([bucket.tokens for bucket in manifest.lengths])
    axes.bar(places - 0.2, documents / documents.sum(), 0.4, color=_GREY, label=f"{documents.sum():,} documents")
    axes.bar(places + 0.2, tokens / tokens.sum(), 0.4, color=_BLUE, hatch="//", edgecolor="white",
             label=f"{tokens.sum():,} tokens")  # fmt: skip
    axes.set_xticks(places, [f"{bucket.low:,}" for bucket in manifest.lengths], rotation=45, ha="right", fontsize=8)
    axes.set_xlabel("tokens of a document: from this many on, to below the next power of two")
    axes.set_ylabel("share")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(f"--mode {manifest.mode}, --seq-length {manifest.seq_length:,}", fontsize=10)
    return _png(figure)


def draw_views(standard: np.ndarray, perturbed: np.ndarray, documents: np.ndarray, loss_mask: np.ndarray,
               suffix: np.ndarray, title: str) -> bytes:  # fmt: skip
    """Positions of a sample's two views against its tokens; documents as bands, the suffix of the KL as a bar.

    Args:
        standard: positions under the standard view, int64 [L]; perturbed: the same under the perturbed view.
        documents: number of each token's document, int64 [L].
        loss_mask: 1 where the CLM has a loss, [L].
        suffix: tokens at or after their split, bool [L].
    """
    length = len(standard)
    figure = _figure(8.4, 4.6)
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(9, 1))
    borders = np.flatnonzero(np.diff(documents)) + 1
    edges = [0, *borders.tolist(), length]
    for number, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        if number % 2:
            for panel in (axes, strip):
                panel.axvspan(start, stop, color="#eeeeee", linewidth=0)
    for positions, color, style, name in (
        (standard, _GREY, ":", "standard view"),
        (perturbed, _BLUE, "-", "perturbed view"),
    ):
        jumps = np.flatnonzero(np.abs(np.diff(positions)) != 1) + 1
        tokens = np.insert(np.arange(length, dtype=np.float64), jumps, np.nan)
        line = np.insert(positions.astype(np.float64), jumps, np.nan)
        axes.plot(tokens, line, color=color, linestyle=style, linewidth=1.8, label=name)
    splits = np.flatnonzero(np.diff(suffix.astype(np.int8), prepend=0) == 1)
    for number, split in enumerate(splits.tolist()):
        shift = int(perturbed[split] - standard[split])
        axes.axvline(split, color=_ORANGE, linestyle="--", linewidth=1.0, label=None if number else "split")
        if len(splits) <= 6 and shift:
            axes.annotate("", (split, perturbed[split]), (split, standard[split]),
                          arrowprops={"arrowstyle": "->", "color": _ORANGE})  # fmt: skip
            right = split < 0.7 * length
            axes.annotate(f"split {split}, shift {shift:+d}", (split, (perturbed[split] + standard[split]) / 2),
                          xytext=(6 if right else -6, 0), textcoords="offset points", fontsize=8, color=_ORANGE,
                          ha="left" if right else "right",
                          bbox={"color": "white", "alpha": 0.75, "pad": 1.5})  # fmt: skip
    for row, (mask, color) in enumerate(((loss_mask > 0, _GREY), (suffix & (loss_mask > 0), _BLUE))):
        strip.fill_between(np.arange(length), row + 0.1, row + 0.9, where=mask, color=color, step="post", linewidth=0)
    strip.set_yticks([0.5, 1.5], ["CLM", "KL"])
    strip.set_ylim(0, 2)
    strip.set_xlabel(f"token (bands: {len(edges) - 1} documents)")
    axes.set_xlim(0, length)
    axes.set_ylabel("RoPE position")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    for panel in (axes, strip):
        panel.spines[["top", "right"]].set_visible(False)
    return _png(figure)
