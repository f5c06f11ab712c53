"""Rates out of steps and seconds, and the peaks that MFU is a share of."""

from __future__ import annotations

import pytest

from megatron_rpsd.runs.throughput import Meter, describe, known_peak


def test_rates_are_of_the_steps_since_the_last_report():
    meter = Meter(world_size=4, peak=50.0)
    meter.add(1e6, 1000)  # the first step is not timed
    assert meter.report(100.0) == {}
    meter.add(1e6, 1000)  # 1e6 GFLOP a token: 1e6 TFLOP a step
    meter.add(3e6, 1000)
    assert meter.flops_per_step() == pytest.approx(2e18)
    figures = meter.report(110000.0)
    seconds = 110000.0 - 100.0
    assert figures["tokens per second"] == pytest.approx(2000 / seconds)
    assert figures["tflops per rank"] == pytest.approx(4e6 / seconds / 4)
    assert figures["mfu"] == pytest.approx(100 * 4e6 / seconds / 4 / 50)
    meter.add(1e6, 1000)
    assert meter.report(110001.0)["tokens per second"] == pytest.approx(1000)


def test_without_a_peak_there_is_no_mfu():
    meter = Meter(world_size=1)
    meter.report(0.0)
    meter.add(2.0, 100)
    assert meter.report(2.0) == {"tokens per second": 50.0, "tflops per rank": 0.1}
    assert describe({"tokens per second": 50.0, "tflops per rank": 0.1}) == " tokens/s: 50 | TFLOP/s per rank: 0.1 |"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A1000", None),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_peak_is_of_that_device_and_of_no_other(name, peak):
    assert known_peak(name) == peak
