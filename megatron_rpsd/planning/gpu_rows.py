"""Rows of the GPU check: what was found, what it may be, and the table, JSON and Markdown made of them."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# Without a network the names of machines do not resolve, and one process has nobody else to talk to.
_LOOPBACK = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}


def environment() -> dict[str, str]:
    """Of a process that a check starts: it finds the repository, and is alone on a machine without a network."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    # Not of this process: a job that started it would otherwise be joined.
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**kept, **_LOOPBACK, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        check: which check it belongs to.
        what: in words.
        figure: what was found; None: it could not be found, for `reason`.
        unit: of the figure.
        reference: what the bound or the figure is to be read against, in words.
        bound: lowest and highest figure that is right; None: a measurement without one.
        reason: why there is no figure.
        seconds: that finding it took.
    """

    check: str
    what: str
    figure: float | None = None
    unit: str = ""
    reference: str = ""
    bound: tuple[float, float] | None = None
    reason: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """good, bad, measured (no bound), or not run."""
        if self.figure is None:
            return "not run"
        if self.bound is None:
            return "measured"
        return "good" if self.bound[0] <= self.figure <= self.bound[1] else "bad"  # nan is bad

    def record(self) -> dict:
        """As JSON, which knows neither nan nor infinity."""
        found = dataclasses.asdict(self) | {"verdict": self.verdict}
        if self.figure is not None and not math.isfinite(self.figure):
            found["figure"] = str(self.figure)
        if self.bound is not None:
            found["bound"] = [value if math.isfinite(value) else None for value in self.bound]
        return found

    @staticmethod
    def of_record(record: dict) -> Row:
        """The inverse of `record`."""
        fields = {name: value for name, value in record.items() if name != "verdict"}
        fields["figure"] = None if record["figure"] is None else float(record["figure"])
        if record["bound"] is not None:
            low, high = record["bound"]
            fields["bound"] = (-math.inf if low is None else low, math.inf if high is None else high)
        return Row(**fields)


def guarded(check: str, what: str, make: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """The rows of one case, or one that says why there are none: other cases go on."""
    try:
        yield from make()
    except Exception as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        yield Row(check, what, reason=text[:400])


def release(device: str) -> None:
    """Give back what earlier cases held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_of(work: Callable[[], object], device: str, repetitions: int = 5, warm_up: int = 2) -> float:
    """Median seconds of `work()`: between CUDA events on a GPU, by the host's clock on a CPU.

    The `warm_up` calls before them, which compile and allocate, do not count.
    """
    for _ in range(warm_up):
        work()
    found = []
    for _ in range(repetitions):
        if device == "cuda":
            started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            started.record()
            work()
            ended.record()
            torch.cuda.synchronize()
            found.append(started.elapsed_time(ended) / 1e3)
        else:
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _bound(row: Row) -> str:
    if row.bound is None:
        return row.reference
    low, high = row.bound
    if low == high:
        said = f"= {low:.4g}"
    elif math.isinf(low):
        said = f"<= {high:.4g}"
    else:
        said = f">= {low:.4g}" if math.isinf(high) else f"{low:.4g} to {high:.4g}"
    return f"{said} ({row.reference})" if row.reference else said


def table_line(row: Row) -> str:
    """One line of the printed table."""
    said = row.reason or _bound(row)
    return f"{row.verdict:8s} {row.what:66s} {_figure(row.figure):>10s} {row.unit:10s} {row.seconds:6.1f} s  {said}"


def markdown(rows: Sequence[Row], machine: dict) -> str:
    """The README's table, with the machine above it."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if value)
    head = ["| what | figure | unit | reference or bound | verdict | seconds |", "|---|---|---|---|---|---|"]
    body = [
        f"| {row.what} | {_figure(row.figure)} | {row.unit} | {row.reason or _bound(row)} | {row.verdict} | "
        f"{row.seconds:.1f} |"
        for row in rows
    ]
    return "\n".join([f"`make gpu-check`, one run on: {facts}.", "", *head, *body, ""])


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine_facts(device: str) -> dict[str, str | None]:
    """The GPU, its driver, versions, and the state of the repository; None where there is none."""
    git = ("git", "-c", "safe.directory=*", "-C", str(ROOT))
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    state = None if changed is None else "clean" if not changed else f"{len(changed.splitlines())} files changed"
    cuda = device == "cuda"
    return {
        "GPU": torch.cuda.get_device_name() if cuda else f"none ({platform.machine()})",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": str(torch.backends.cudnn.version()) if cuda else None,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "megatron-core": _version("megatron-core"),
        "Transformer Engine": _version("transformer-engine", "transformer-engine-torch"),
        "flash-attn": _version("flash-attn", "flash-attn-3", "flash_attn_3"),
        "commit": _output(*git, "rev-parse", "--short=12", "HEAD"),
        "tree": state,
    }
