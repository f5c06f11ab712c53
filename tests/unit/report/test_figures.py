"""Figures draw what they are given: PNGs whose pixels change with the data, and the arithmetic behind them."""

from __future__ import annotations

import io
import statistics

import numpy as np
import pytest
from PIL import Image

from megatron_rpsd.report.figures import (
    Panel,
    curves_over_steps,
    means_over_log_axis,
    paired_changes,
    running_mean,
    standard_error,
)
from megatron_rpsd.report.metrics import Series

BLUE = (0x00, 0x72, 0xB2)


def pixels(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    image.verify()
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def series(values: list[float]) -> Series:
    return Series(tuple(range(1, len(values) + 1)), tuple(values))


def centre_of(png: bytes, colour: tuple[int, int, int]) -> float:
    """Mean height (from the top, 0 to 1) of pixels of a colour in the lower nine tenths, below the legend."""
    image = pixels(png)
    top = len(image) // 10
    rows = np.nonzero(np.abs(image[top:] - colour).sum(axis=2) < 30)[0]
    assert len(rows) > 20, "the line is not there"
    return float((rows.mean() + top) / len(image))


def means(blue: float) -> bytes:
    models = {name: np.full((3, 4), value) for name, value in (("a", 0.5), ("b", 1.0), ("c", blue))}
    return means_over_log_axis([1, 4, 16, 64], models, "x", "y")


def test_a_larger_mean_stands_higher() -> None:
    assert centre_of(means(0.9), BLUE) < centre_of(means(0.2), BLUE) - 0.2


def test_a_larger_change_stands_higher() -> None:
    def drawn(blue: float) -> bytes:
        changes = {"control": np.array([-20.0, 20.0, 0.0]), "method": np.full(3, blue)}
        return paired_changes(changes, "%", "window", first_style=1)

    assert centre_of(drawn(15.0), BLUE) < centre_of(drawn(-15.0), BLUE) - 0.2


def test_curves_keep_their_style_over_panels() -> None:
    panels = [
        Panel("one", "nats", {"a": series([3.0, 2.0]), "b": series([3.0, 1.0])}, ["x", "a", "b"]),
        Panel("two", "nats", {"b": series([1.0, 2.0])}, ["x", "a", "b"]),
    ]
    image = pixels(curves_over_steps(panels))
    right = image[len(image) // 8 :, image.shape[1] // 2 :]
    assert (np.abs(right - BLUE).sum(axis=2) < 30).any(), "b is the third style in the second panel too"
    assert not (np.abs(right - (0xD5, 0x5E, 0x00)).sum(axis=2) < 30).any()


def test_running_mean_against_the_definition() -> None:
    values = np.random.default_rng(0).normal(size=23)
    expected = [statistics.fmean(values[max(0, stop - 4) : stop]) for stop in range(1, 24)]
    np.testing.assert_allclose(running_mean(values, 4), expected, rtol=1e-13, atol=1e-14)


def test_standard_error_against_the_statistics_module() -> None:
    values = np.random.default_rng(1).normal(size=(7, 3))
    expected = [statistics.stdev(values[:, column]) / 7**0.5 for column in range(3)]
    np.testing.assert_allclose(standard_error(values), expected, rtol=1e-13)
    assert np.isnan(standard_error(values[:1])).all()


def test_a_model_with_other_points_is_refused() -> None:
    with pytest.raises(AssertionError):
        means_over_log_axis([1, 4], {"a": np.ones((3, 3))}, "x", "y")
