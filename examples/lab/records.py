"""What a finished part leaves beside its checkpoint: a record that later runs trust as long as its settings hold."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rpsd.data.files import write_json

_ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) \|")
_FIELD = re.compile(r" ([a-z][a-z ()]*?): +([-+0-9.eE]+|nan|inf) \|")
CURVES = ("lm loss", "view kl", "teacher kl")


@dataclass(frozen=True)
class TrainingLog:
    """The `iteration N/M` lines of a run.

    Attributes:
        steps: the last step of every line.
        milliseconds: a step, mean since the line before.
        curves: of CURVES, those that the run logged; means since the line before, nats per token.
    """

    steps: tuple[int, ...]
    milliseconds: tuple[float, ...]
    curves: Mapping[str, tuple[float, ...]]

    @property
    def seconds_per_step(self) -> float:
        """Median over the lines: what another process does to a few of them does not count."""
        return statistics.median(self.milliseconds) / 1000.0

    @property
    def loop_seconds(self) -> float:
        """Time in the training loop, without start and checkpoint."""
        lengths = np.diff(np.array([0, *self.steps]))
        return float((lengths * np.array(self.milliseconds)).sum() / 1000.0)


def last_step(log: Path) -> int:
    """The newest step that a run's log names; 0 before the first."""
    if not log.exists():
        return 0
    found = _ITERATION.findall(log.read_text(errors="replace"))
    return int(found[-1][0]) if found else 0


def read_training_log(log: Path) -> TrainingLog:
    """The iteration lines of a finished run's log, that of its last rank."""
    lines = [line for line in log.read_text().splitlines() if _ITERATION.search(line)]
    assert lines, f"{log} holds no iteration line"
    # Megatron adds a line for the first step, whose time and loss the next line covers again.
    lines = lines[1:] if len(lines) > 1 else lines
    steps, milliseconds, curves = [], [], {name: [] for name in CURVES}
    for line in lines:
        fields = {name.strip(): float(value) for name, value in _FIELD.findall(line)}
        steps.append(int(_ITERATION.search(line).group(1)))
        milliseconds.append(fields["elapsed time per iteration (ms)"])
        for name in CURVES:
            if name in fields:
                curves[name].append(fields[name])
    kept = {name: tuple(values) for name, values in curves.items() if values}
    assert all(len(values) == len(steps) for values in kept.values())
    return TrainingLog(tuple(steps), tuple(milliseconds), kept)


def write_record(folder: Path, made_from: str, record: Mapping) -> None:
    """Keep `record` as the folder's, with the fingerprint of what it was made from."""
    write_json(folder / "record.json", {"made_from": made_from, **record})


def read_record(folder: Path, made_from: str) -> dict | None:
    """The folder's record if it was made from the same settings, else None."""
    path = folder / "record.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if record.get("made_from") == made_from else None


def right_answers(record: Mapping, length: int) -> np.ndarray:
    """Right answers of a record at an exam length, float64 [N, D]."""
    return np.array([[int(mark) for mark in row] for row in record["right"][str(length)]], dtype=np.float64)


def as_marks(right: np.ndarray) -> list[str]:
    """Bool [N, D] as N strings of 0 and 1, which is how a record keeps them."""
    return ["".join("1" if mark else "0" for mark in row) for row in right]
