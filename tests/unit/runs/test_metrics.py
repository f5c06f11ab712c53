"""The JSON lines beside tensorboard."""

from __future__ import annotations

import json
import time

import torch

from megatron_rpsd.runs.metrics import UNITS, MetricsFile


class Recorder:
    """A writer that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []
        self.colour = "blue"

    def add_scalar(self, *given) -> None:
        self.told.append(given)

    def flush(self) -> None:
        self.told.append(("flush",))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_a_line_and_tensorboard_hears_everything(tmp_path):
    path, recorder, before = tmp_path / "run" / "metrics.jsonl", Recorder(), time.time()
    metrics = MetricsFile(path, recorder)
    metrics.add_scalar("lm loss", torch.tensor(2.5), 1)
    metrics.add_scalar("lm loss vs samples", torch.tensor(2.5), 4)
    metrics.add_scalar("grad-norm", 0.5, 1)
    assert lines(path) == [{"units": UNITS}]  # the step is not over
    metrics.add_scalar("lm loss", 2.25, 2)
    metrics.flush()
    metrics.flush()
    first, second = lines(path)[1:]
    assert before <= first.pop("time") <= second.pop("time") <= time.time()
    assert first == {"iteration": 1, "lm loss": 2.5, "grad-norm": 0.5}
    assert second == {"iteration": 2, "lm loss": 2.25}
    scalars = [told for told in recorder.told if told != ("flush",)]
    assert [(name, step) for name, _, step in scalars] == [
        ("lm loss", 1), ("lm loss vs samples", 4), ("grad-norm", 1), ("lm loss", 2)
    ]  # fmt: skip
    assert metrics.colour == "blue"


def test_a_run_resumed_adds_its_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for value in (1.0, 2.0):
        metrics = MetricsFile(path, None)
        metrics.add_scalar("view kl", value, 7)
        metrics.flush()
    assert [line["view kl"] for line in lines(path) if "iteration" in line] == [1.0, 2.0]


def test_a_figure_that_is_not_finite_is_kept(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", None)
    metrics.add_scalar("grad-norm", float("inf"), 1)
    metrics.flush()
    assert lines(tmp_path / "metrics.jsonl")[1]["grad-norm"] == float("inf")
