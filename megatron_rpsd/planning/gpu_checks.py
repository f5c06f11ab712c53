"""The GPU check: every check in a process of its own, for a limited time, its rows written as they come.

A check that fails, hangs or takes the GPU's context with it leaves its rows so far and one more with the reason; the
others go on. `python -m megatron_rpsd.planning.gpu_checks` is such a process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rpsd.data.files import replace_file, write_json
from megatron_rpsd.planning.gpu_rows import Row, environment, markdown, table_line

_POLL_S = 0.3


@dataclass(frozen=True)
class Check:
    """A check: its module in this package, its generator of rows, the names of its sizes, and its limit in seconds."""

    module: str
    rows: str
    limit_s: float

    def start(self, device: str, tiny: bool) -> Iterator[Row]:
        """The rows, on `device`, at the GPU's sizes or at tiny ones."""
        module = importlib.import_module(f"megatron_rpsd.planning.{self.module}")
        return getattr(module, self.rows)(device, module.TINY_SIZES if tiny else module.GPU_SIZES)


# In the order in which they run: right first, then fast.
CHECKS = {
    "attention": Check("gpu_attention", "attention_rows", 180),
    "loss": Check("gpu_loss", "loss_rows", 420),
    "training": Check("gpu_training", "training_rows", 480),
    "plan": Check("gpu_steps", "plan_rows", 240),
    "steps": Check("gpu_steps", "step_rows", 420),
    "fp8": Check("gpu_attention", "fp8_rows", 180),
}


class Results:
    """Rows so far, in results.json and results.md of a folder, and as printed lines."""

    def __init__(self, folder: Path, machine: dict, say: Callable[[str], None]) -> None:
        self.folder, self.machine, self.say, self.rows = folder, machine, say, []

    def add(self, row: Row) -> None:
        """One more row, written at once."""
        self.rows.append(row)
        self.say(table_line(row))
        write_json(self.folder / "results.json", {"machine": self.machine, "rows": [row.record() for row in self.rows]})
        replace_file(self.folder / "results.md", markdown(self.rows, self.machine).encode())


def run_checks(
    names: Sequence[str], results: Results, device: str = "cuda", tiny: bool = False, minutes: float = 25.0,
    command: Callable[[str], list[str]] | None = None,
) -> None:  # fmt: skip
    """Run checks one after another; what they print goes to log.txt beside the results.

    Args:
        minutes: for all of them; a check that no time is left for is a row that says so.
        command: the words that start a check, given its name; default: this module.
    """
    ends = time.monotonic() + 60 * minutes
    for name in names:
        left = ends - time.monotonic()
        if left < 5:
            results.add(Row(name, f"check {name}", reason=f"no time left of --time-limit-minutes {minutes:g}"))
            continue
        words = command(name) if command else [sys.executable, "-m", __name__, name, "--device", device]
        words += ["--tiny"] * (tiny and command is None)
        _run_check(name, words, min(CHECKS[name].limit_s, left), results)


def _run_check(name: str, words: list[str], limit_s: float, results: Results) -> None:
    began = time.monotonic()
    results.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, (results.folder / "log.txt").open("ab") as log:
        log.write(f"\n===== {name}\n".encode())
        log.flush()
        start = log.tell()
        found = Path(folder) / "rows.jsonl"
        found.touch()
        process = subprocess.Popen(
            [*words, "--rows", str(found)], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=environment(), start_new_session=True,
        )  # fmt: skip
        try:
            done, late = 0, False
            while process.poll() is None and not late:
                time.sleep(_POLL_S)
                done = _take(found, done, results)
                late = time.monotonic() - began > limit_s
        finally:
            _end(process)
        _take(found, done, results)
        seconds = time.monotonic() - began
        if late:
            results.add(Row(name, f"check {name}", reason=f"ended after its limit of {limit_s:.0f} s", seconds=seconds))
        elif process.returncode:
            said = (results.folder / "log.txt").read_bytes()[start:].decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), "no output")
            reason = f"its process ended with {process.returncode}: {last[:300]}"
            results.add(Row(name, f"check {name}", reason=reason, seconds=seconds))


def _end(process: subprocess.Popen) -> None:
    """With everything that it started: torchrun ends its ranks when it is asked to, not when it is killed."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _take(found: Path, done: int, results: Results) -> int:
    """Add rows written since the first `done` ones; how many there are now."""
    lines = found.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    for line in whole[done:]:
        results.add(Row.of_record(json.loads(line)))
    return len(whole)


def write_rows(rows: Iterator[Row], path: Path) -> None:
    """Append each as a line of JSON the moment that it is found, with the seconds since the one before."""
    before = time.monotonic()
    with path.open("a") as file:
        for row in rows:
            now = time.monotonic()
            print(json.dumps(replace(row, seconds=now - before).record()), file=file, flush=True)
            before = now


def main() -> None:
    """A check's own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CHECKS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="Sizes for a look at the code itself, on any device.")
    parser.add_argument("--rows", type=Path, required=True)
    args = parser.parse_args()
    from megatron_rpsd.training.main import choose_device

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # folders of the check are taken away on the way out
    choose_device(["--device", args.device])
    write_rows(CHECKS[args.name].start(args.device, args.tiny), args.rows)


if __name__ == "__main__":
    main()
