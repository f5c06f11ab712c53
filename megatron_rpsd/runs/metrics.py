"""A run's figures as JSON lines, one a step, beside tensorboard: what Megatron writes there is written here too.

The first line of every start gives the units. Evaluation's scores at a step are a line of their own. A step taken
twice, as a run resumed before it, is there twice; `time` tells which came later.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from megatron.training import global_vars

UNITS = {
    "time": "seconds since 1970",
    "lm loss": "nats per token",
    "view kl": "nats per suffix token",
    "view lm loss": "nats per suffix token",
    "teacher kl": "nats per token",
    "answer nll": "nats per answer token",
    "greedy exact": "share of answers",
    "longce weight": "mean weight of a token",
    "mean split": "tokens",
    "mean shift": "tokens",
    "mean length": "tokens",
    "future leak": "largest change of an earlier hidden state when later tokens change",
    "learning-rate": "1",
    "grad-norm": "L2 norm of the gradient before clipping",
    "batch-size": "sequences",
    "loss-scale": "1",
    "world-size": "processes",
    "skipped-train-samples": "sequences",
    "iteration-time": "seconds",
    "throughput": "TFLOP/s per GPU, of the views that were drawn",
    "gflop per token": "1e9 model operations per token of the standard view",
    "tokens per second": "the standard view's tokens of all ranks; without evaluation, checkpoints and the first step",
    "tflops per rank": "1e12 model operations per second and rank, by the same clock",
    "mfu": "percent of the device's dense bf16 peak, or of --peak-tflops",
    "peak memory": "GiB allocated so far by the rank that logs; on the CPU, its resident set",
    "mem-reserved-bytes": "bytes",
    "mem-allocated-bytes": "bytes",
    "mem-max-allocated-bytes": "bytes",
    "_gib": "GiB",
}
"""By the name, or the end of the name, of a metric; ` validation` behind it changes nothing."""


class MetricsFile:
    """Tensorboard's writer around another one, which keeps the scalars of a step together in a line.

    Args:
        path: lines are added to it.
        writer: tensorboard's; None where there is none.
    """

    def __init__(self, path: Path, writer) -> None:
        self._path, self._writer = path, writer
        self._step: int | None = None
        self._values: dict[str, float] = {}
        self._append({"units": UNITS})

    def add_scalar(self, name: str, value, step: int, *given, **named) -> None:
        """As tensorboard's. Megatron writes most scalars twice, by step and `vs samples`; the first counts."""
        if self._writer is not None:
            self._writer.add_scalar(name, value, step, *given, **named)
        if name.endswith(" vs samples"):
            return
        if step != self._step:
            self.flush()
            self._step = step
        self._values[name] = float(value)

    def flush(self) -> None:
        """Write the line of the step so far."""
        if self._values:
            self._append({"iteration": self._step, "time": time.time(), **self._values})
            self._values = {}
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()

    def __getattr__(self, name: str):
        """Whatever else tensorboard's writer can do."""
        return getattr(self._writer, name)

    def _append(self, line: dict) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def write_metrics(path: Path) -> None:
    """Put a metrics file around tensorboard's writer of this process. Once, on the rank that has it."""
    global_vars._GLOBAL_TENSORBOARD_WRITER = MetricsFile(path, global_vars._GLOBAL_TENSORBOARD_WRITER)


def flush_metrics() -> None:
    """Write what is held back, if this process writes metrics."""
    writer = global_vars._GLOBAL_TENSORBOARD_WRITER
    if isinstance(writer, MetricsFile):
        writer.flush()
