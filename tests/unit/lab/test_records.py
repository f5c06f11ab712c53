"""Reading a run's log, and records that are trusted only for the settings they were made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.lab.records import (
    as_marks,
    last_step,
    read_record,
    read_training_log,
    right_answers,
    write_record,
)

LINE = (
    " [2026-11-22 03:17:36.9] iteration {step:8d}/      30 | consumed samples:  32 | elapsed time per iteration (ms): "
    "{ms} | learning rate: 1.500000E-04 | global batch size:    32 | lm loss: {loss:.6E} |{more} loss scale: 1.0 | "
    "grad norm: 0.361 | number of skipped iterations:   0 | number of nan iterations:   0 |"
)


def write_log(path: Path, more: str = "") -> Path:
    rows = [(1, 900.0, 5.5), (10, 100.0, 5.0), (20, 40.0, 4.0), (30, 60.0, 3.5)]
    lines = [LINE.format(step=step, ms=ms, loss=loss, more=more) for step, ms, loss in rows]
    path.write_text("\n".join(["loading checkpoint at iteration 1200", *lines, "done"]))
    return path


def test_the_first_step_s_extra_line_does_not_count(tmp_path: Path) -> None:
    log = read_training_log(write_log(tmp_path / "x.log"))
    assert log.steps == (10, 20, 30) and log.curves == {"lm loss": (5.0, 4.0, 3.5)}
    assert log.seconds_per_step == pytest.approx(0.060)  # the median, whatever happened to the first line
    assert log.loop_seconds == pytest.approx(10 * (0.100 + 0.040 + 0.060))


def test_the_view_s_loss_is_read_where_it_was_logged(tmp_path: Path) -> None:
    log = read_training_log(write_log(tmp_path / "x.log", " view kl: 2.500000E-01 | mean split: 1.0E+00 |"))
    assert log.curves["view kl"] == (0.25, 0.25, 0.25)


def test_progress_is_the_newest_step(tmp_path: Path) -> None:
    assert last_step(tmp_path / "none.log") == 0
    assert last_step(write_log(tmp_path / "x.log")) == 30


def test_a_record_of_other_settings_is_not_read(tmp_path: Path) -> None:
    write_record(tmp_path, "abc", {"steps": 3})
    assert read_record(tmp_path, "abc")["steps"] == 3
    assert read_record(tmp_path, "abd") is None and read_record(tmp_path / "other", "abc") is None


def test_answers_survive_their_record() -> None:
    right = np.random.default_rng(0).random((4, 10)) < 0.5
    record = {"right": {"512": as_marks(right)}}
    assert (right_answers(record, 512) == right).all()
