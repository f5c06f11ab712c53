"""Depth figures draw what they are given: lines where the accuracy is, cells as bright as it is."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from megatron_rpsd.report.depth import accuracy_by_depth, depth_heat_maps

BLUE = (0x00, 0x72, 0xB2)  # the third style


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def line(blue: float, spread: float = 0.0, seeds: int = 3) -> np.ndarray:
    levels = {"a": 0.4, "b": 0.5, "c": blue}
    offsets = np.linspace(-spread, spread, seeds)[:, None]
    panel = {name: level + offsets + np.zeros((seeds, 10)) for name, level in levels.items()}
    return pixels(accuracy_by_depth({"512": panel, "1024": panel}, ["a", "b", "c"], "depth"))


def height_of_blue(image: np.ndarray) -> float:
    top = len(image) // 5  # below the legend
    rows = np.nonzero(np.abs(image[top:] - BLUE).sum(axis=2) < 30)[0]
    assert len(rows) > 50, "the line is not there"
    return float(rows.mean() + top) / len(image)


def test_a_better_model_s_line_stands_higher() -> None:
    assert height_of_blue(line(0.95)) < height_of_blue(line(0.1)) - 0.4


def test_a_model_keeps_its_style_where_others_are_missing() -> None:
    panel = {"512": {"c": np.full((1, 10), 0.5)}}
    assert height_of_blue(pixels(accuracy_by_depth(panel, ["a", "b", "c"], "depth"))) > 0.3


def test_the_band_is_as_wide_as_the_seeds_differ() -> None:
    def coloured(image: np.ndarray) -> int:
        return int((image.max(axis=2) - image.min(axis=2) > 8).sum())

    assert coloured(line(0.7, spread=0.2)) > coloured(line(0.7, spread=0.02)) + 10_000


@pytest.mark.parametrize("count", [1, 3, 7])
def test_cells_are_as_bright_as_the_accuracy(count: int) -> None:
    def brightness(value: float) -> float:
        models = {f"m{index}": np.full((2, 10), value) for index in range(count)}
        return pixels(depth_heat_maps(models, ["512", "1,024"], "length", "depth")).mean()

    # cividis runs from a dark blue to yellow
    assert brightness(0.05) < brightness(0.5) < brightness(0.95)
