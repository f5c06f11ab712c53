"""Scalars come back from event files as they were written, also from a run that was interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_rpsd.report.metrics import read_scalars


def write(folder: Path, tag: str, values: dict[int, float], wall_time: float, suffix: str = "") -> None:
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for step, value in values.items():
            writer.add_scalar(tag, value, step, walltime=wall_time + step)


def test_a_long_series_comes_back_whole(tmp_path: Path) -> None:
    # TensorBoard's reader thins series beyond 10,000 values out unless told otherwise.
    values = {step: float(np.float32(1.0 / step)) for step in range(1, 12_001)}
    write(tmp_path, "lm loss", values, 1_000.0)
    series = read_scalars(tmp_path, ["lm loss"])["lm loss"]
    assert dict(zip(series.steps, series.values, strict=True)) == values
    assert len(series) == 12_000


@pytest.mark.parametrize("first_name_sorts_last", [False, True])
def test_steps_that_ran_twice_keep_the_later_value(tmp_path: Path, first_name_sorts_last: bool) -> None:
    suffixes = (".z", ".a") if first_name_sorts_last else (".a", ".z")
    write(tmp_path, "lm loss", {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.5}, 1_000.0, suffixes[0])
    write(tmp_path, "lm loss", {3: 2.5, 4: 1.0, 5: 0.5}, 2_000.0, suffixes[1])
    series = read_scalars(tmp_path, ["lm loss"])["lm loss"]
    assert series.steps == (1, 2, 3, 4, 5)
    assert series.values == (4.0, 3.0, 2.5, 1.0, 0.5)


def test_an_empty_folder_and_an_absent_scalar_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no TensorBoard event file"):
        read_scalars(tmp_path, ["lm loss"])
    write(tmp_path, "lm loss", {1: 1.0}, 1_000.0)
    with pytest.raises(ValueError, match="no scalar 'view kl', only lm loss"):
        read_scalars(tmp_path, ["view kl"])
