"""The figure of an attention study (`analysis.attention_study`), drawn from its JSON value alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megatron_rpsd.report.figures import _clean, _png, _style

_TITLES = {
    "evidence": "evidence",
    "sink": "first {sink} tokens",
    "local": "last {window} tokens",
    "rest": "the rest",
}
_CURVES = {"all_heads": "all heads", "evidence_heads": "the {count} evidence heads"}


def _names(study: Mapping) -> list[str]:
    """The models' folder names, or their whole paths where those are the same."""
    paths = [entry["path"] for entry in study["models"]]
    names = [Path(path).name or path for path in paths]
    return names if len(set(names)) == len(names) else paths


def _maps(figure, study: Mapping, names: list[str]) -> None:
    """A row of four maps for every model, and one of their differences under two."""
    shares = [{name: np.array(values) for name, values in entry["shares"].items()} for entry in study["models"]]
    rows = [*zip(names, shares, strict=True)]
    if len(shares) == 2:
        change = {group: shares[1][group] - shares[0][group] for group in _TITLES}
        rows.append((f"{names[1]} minus {names[0]}", change))
    grid = figure.subplots(len(rows), len(_TITLES), squeeze=False)
    for column, (group, title) in enumerate(_TITLES.items()):
        largest = max(float(share[group].max()) for share in shares)
        for row, (name, share) in enumerate(rows):
            axes, values = grid[row][column], share[group]
            if row < len(shares):
                scale = {"vmin": 0.0, "vmax": largest or 1.0, "cmap": "cividis"}
            else:
                reach = float(np.abs(values).max()) or 1.0
                scale = {"vmin": -reach, "vmax": reach, "cmap": "PuOr"}
            image = axes.imshow(values, aspect="auto", origin="lower", interpolation="nearest", **scale)
            figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02).ax.tick_params(labelsize=7)
            axes.set_title(title.format(**study["settings"]) + f": mean {values.mean():.3f}", fontsize=9)
            axes.tick_params(labelsize=7)
            for axis in (axes.xaxis, axes.yaxis):
                axis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("head", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"{name}\nlayer", fontsize=8)


def _depth_panels(figure, study: Mapping, names: list[str]) -> None:
    """Mass on the evidence by its depth: a mark for every prompt, a line for the bins' means."""
    heads = [tuple(head) for head in study["evidence_heads"]]
    for axes, (curve, title) in zip(figure.subplots(1, 2), _CURVES.items(), strict=True):
        for index, (name, entry) in enumerate(zip(names, study["models"], strict=True)):
            style = _style(index + 1)
            depth = np.array([prompt["depth"] for prompt in entry["prompts"]])
            mass = np.array([prompt["evidence_by_head"] for prompt in entry["prompts"]])
            mass = (
                mass.mean(axis=(1, 2)) if curve == "all_heads" else np.mean([mass[:, a, b] for a, b in heads], axis=0)
            )
            axes.plot(100 * depth, mass, linestyle="", marker=style["marker"], markersize=3.5, color=style["color"],
                      alpha=0.35)  # fmt: skip
            held = [one for one in entry["by_depth"]["bins"] if one["n"]]
            middle = [50 * (one["low"] + one["high"]) for one in held]
            axes.plot(middle, [one[curve] for one in held], label=name, linewidth=1.8, **style)
        uniform = [prompt["evidence_tokens"] / prompt["tokens"] for prompt in study["models"][0]["prompts"]]
        axes.axhline(float(np.mean(uniform)), color="#6b6b6b", linewidth=1.0, linestyle=":", label="uniform attention")
        axes.set_title(title.format(count=len(heads)), fontsize=10)
        axes.set_xlabel("depth of the evidence (% of the prompt)")
        axes.set_ylabel("share on the evidence")
        axes.set_xlim(-2, 102)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        _clean(axes)


def attention_figure(study: Mapping) -> bytes:
    """PNG: maps of layers and heads for the four shares of each model (and their differences), and mass by depth."""
    rows = {1: 1, 2: 3}[len(study["models"])]
    height = 1.2 + 0.07 * study["models"][0]["layers"]
    figure = Figure(figsize=(13.0, rows * height + 3.6), dpi=110, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[rows * height, 3.2])
    names, prepared = _names(study), study["prepared"]
    rows_text = f", mean over the last {study['settings']['rows']} queries" if study["settings"]["rows"] > 1 else ""
    figure.suptitle(
        f"Attention of the last query: {prepared['task']}, {prepared['length']} tokens, "
        f"{len(study['models'][0]['prompts'])} prompts{rows_text}", fontsize=11,
    )  # fmt: skip
    _maps(above, study, names)
    _depth_panels(below, study, names)
    return _png(figure)
