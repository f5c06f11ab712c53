"""Tokens and operations a second, the share of the device's peak and memory, beside what Megatron logs.

Megatron's own figure counts one view of --seq-length tokens. Here the operations of what a step read come with its
losses (`WORK`, a mean over all ranks and micro-batches), so a step of a late split counts less than one of an early
split. The seconds are Megatron's `interval-time`, after its barrier: without evaluation and checkpoints. The first
step of a start is not timed: allocations and compilation are no throughput.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, get_tensorboard_writer, get_timers, get_wandb_writer, training

from megatron_rpsd.runs.metrics import flush_metrics

WORK = "gflop per token"
"""What a micro-batch logs as [model operations / 1e9, the standard view's tokens]."""

PEAK_TFLOPS = (
    (r"H100 PCIe", 756.0, "NVIDIA H100 data sheet, PCIe"),
    (r"H100( 80GB HBM3| SXM)", 989.4, "NVIDIA H100 data sheet, SXM"),
    (r"\bH200\b(?! NVL)", 989.4, "NVIDIA H200 data sheet, SXM"),
    (r"\bA100\b", 312.0, "NVIDIA A100 data sheet"),
    (r"\bB200\b", 2250.0, "NVIDIA DGX B200 data sheet, an eighth of its eight GPUs"),
)
"""(part of the device's name, dense bf16 TFLOP/s, source). The data sheets print twice that, with sparsity."""


def known_peak(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by the name that torch gives it; None where the table has none."""
    return next((peak for pattern, peak, _ in PEAK_TFLOPS if re.search(pattern, device_name)), None)


@dataclass
class Meter:
    """Adds up the steps between two lines of the log.

    Attributes:
        world_size: ranks of the job.
        peak: TFLOP/s of a rank's device, or None.
    """

    world_size: int
    peak: float | None = None
    _tokens: int = 0
    _gflop: float | torch.Tensor = 0.0
    _steps: int = 0
    _since: float | None = None

    def add(self, gflop_per_token: float | torch.Tensor, tokens: int) -> None:
        """A step that read `tokens` tokens of the standard view, over all ranks."""
        self._gflop = self._gflop + gflop_per_token * tokens  # a tensor stays on its device until it is reported
        self._tokens += tokens
        self._steps += 1

    def flops_per_step(self) -> float:
        """Mean over the steps since the last report."""
        return 1e9 * float(self._gflop) / max(self._steps, 1)

    def report(self, now: float) -> dict[str, float]:
        """Name -> value of the steps since the last report; none at the first.

        Args:
            now: seconds that the job has trained so far.
        """
        figures = {}
        if self._since is not None and now > self._since:
            seconds = now - self._since
            rate = float(self._gflop) / 1e3 / seconds / self.world_size
            figures = {"tokens per second": self._tokens / seconds, "tflops per rank": rate}
            if self.peak is not None:
                figures["mfu"] = 100 * rate / self.peak
        self._tokens, self._gflop, self._steps, self._since = 0, 0.0, 0, now
        return figures


def describe(figures: dict[str, float]) -> str:
    """As the end of Megatron's line."""
    words = {"tokens per second": "tokens/s: {:.5g} |", "tflops per rank": "TFLOP/s per rank: {:.4g} |"}
    words |= {"mfu": "MFU: {:.2f}% |", "peak memory": "peak memory: {:.4g} GiB |"}
    return "".join(" " + words[name].format(value) for name, value in figures.items())


def log_throughput(meter: Meter) -> None:
    """Let Megatron's line, tensorboard, wandb and metrics.jsonl hold the meter's figures. Once a process.

    A rank without losses (every pipeline stage but the last) logs nothing, and is left as it is.
    """
    original = training.training_log

    @functools.wraps(original)
    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *given, **named):
        if WORK not in loss_dict:
            return original(loss_dict, total_loss_dict, learning_rate, iteration, *given, **named)
        args = get_args()
        samples = args.micro_batch_size * args.data_parallel_size * get_num_microbatches()
        meter.add(loss_dict[WORK].detach(), samples * args.seq_length)
        figures: dict[str, float] = {}

        def operations(*_, **__) -> float:  # Megatron asks right after it has read the clock
            counted = meter.flops_per_step()
            figures.update(meter.report(get_timers()("interval-time").active_time()))
            figures["peak memory"] = torch.cuda.max_memory_allocated() / 2**30
            return counted

        with _replaced("num_floating_point_operations", operations), _line_completed(figures):
            answer = original(loss_dict, total_loss_dict, learning_rate, iteration, *given, **named)
        _write(figures, iteration)
        return answer

    training.training_log = training_log


class _replaced:
    """A function of Megatron's `training`, replaced for a while."""

    def __init__(self, name: str, function: Callable) -> None:
        self._name, self._function, self._original = name, function, getattr(training, name)

    def __enter__(self) -> None:
        setattr(training, self._name, self._function)

    def __exit__(self, *_) -> None:
        setattr(training, self._name, self._original)


def _line_completed(figures: dict[str, float]) -> _replaced:
    """Let the line of a step, which is printed after the clock was read, end with the figures."""
    say = training.print_rank_last
    return _replaced("print_rank_last", lambda text: say(text + (describe(figures) if " iteration " in text else "")))


def _write(figures: dict[str, float], iteration: int) -> None:
    for writer in (get_tensorboard_writer(), get_wandb_writer()):
        for name, value in figures.items() if writer is not None else ():
            if hasattr(writer, "add_scalar"):
                writer.add_scalar(name, value, iteration)
            else:
                writer.log({name: value}, iteration)
    if figures:
        flush_metrics()  # the step's line is whole now, and whoever looks need not wait for the next one
