"""Figures of the instruments are pictures that differ with what they show, zeros and gaps included."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_rpsd.report.instruments import divergence_curves, trace_heat_maps, update_curves, update_heat_maps

RANDOM = np.random.default_rng(0)


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return imread(io.BytesIO(png))[..., :3]


def share_of(png: bytes, colour: tuple[int, int, int]) -> float:
    return (np.abs(pixels(png) - np.array(colour) / 255).max(axis=-1) < 0.004).mean()


def test_unchanged_repeats_are_grey_and_changed_ones_are_not():
    grey = (217, 217, 217)
    values = RANDOM.random((6, 8)) + 0.1
    after = np.where(np.arange(8) >= 5, values, 0.0)
    shares = [share_of(trace_heat_maps({"queries": shown}, 5, "model"), grey) for shown in (values, after, 0 * values)]
    assert shares[0] < 0.001 < shares[1] < shares[2]
    assert shares[1] == pytest.approx(shares[2] * 5 / 8, rel=0.05)


def test_every_quantity_has_a_panel():
    one, six = (trace_heat_maps({str(n): np.ones((3, 4)) for n in range(count)}, 2, "model") for count in (1, 6))
    assert pixels(six).shape[0] > 1.5 * pixels(one).shape[0]


def test_divergences_leave_out_zeros():
    per_repeat = {"shift 1": np.array([0, 0, 0.1, 0.2]), "shift 8": np.array([0, 0, 1.0, 0.5])}
    by_distance = {"shift 1": np.array([0.1, 0.2]), "shift 8": np.array([1.0, 0.0])}
    png = divergence_curves(per_repeat, by_distance, [(0, 1), (1, 2)])
    assert share_of(png, (213, 94, 0)) > 1e-4  # the second line's colour


def test_maps_of_updates_take_undefined_values_and_a_control_beyond_the_scale():
    changes = {"W_q": RANDOM.random((4, 8)), "W_k": np.full((4, 8), np.nan), "W_v": 9 * np.ones((4, 8))}
    png = update_heat_maps(changes, control="W_v")
    assert share_of(png, (217, 217, 217)) > 0.05
    assert share_of(png, (253, 231, 37)) > 0.05  # the scale's last colour fills the control's panel
    assert pixels(update_heat_maps({"W_q": np.zeros((4, 8))}, control="W_v")).size


@pytest.mark.parametrize("window, drawn", [(100, True), (3, False), (10**7, False)])
def test_the_window_is_marked_where_it_lies_among_the_wavelengths(window, drawn):
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(16) / 16)
    curves = {"W_q": RANDOM.random(16), "W_k": RANDOM.random(16)}
    reference = pixels(update_curves(curves, wavelengths, 1))
    marked = pixels(update_curves(curves, wavelengths, window))
    assert (reference.shape != marked.shape or not np.array_equal(reference, marked)) == drawn
