"""What the quickstart runs, and where its files lie."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_rpsd.data.files import write_json

ARMS = ("rpsd", "standard")


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on. A folder made with other settings is made again."""

    seq_length: int = 256
    """tokens of a window, in training and in the probes"""
    steps: int = 24
    """optimizer steps of each arm"""
    learning_rate: float = 4e-5
    """at its peak; a tenth of it at the end (cosine)"""
    warmup_steps: int = 4
    global_batch_size: int = 2
    """windows a step, one on each rank"""
    split_granule: int = 1
    """tokens; a coarse one would round many of so short a window's splits down to 0, where both views are the same"""
    seed: int = 1234
    held_out_fraction: float = 0.1
    """of the documents"""
    windows: int = 10
    """held-out windows, each of another document"""
    window_offset: int = 256
    """tokens of a held-out document before its window: past licence and imports"""
    shifts: tuple[int, ...] = (1, 16, 256)
    """of the probed views, in positions; the last is the one in the headline"""

    @property
    def split(self) -> int:
        """First token that the probed views move."""
        return self.seq_length // 2


@dataclass(frozen=True)
class Paths:
    """Files and folders under the output folder."""

    output: Path

    @property
    def model(self) -> Path:
        return self.output / "smollm2"

    @property
    def train_text(self) -> Path:
        return self.output / "data" / "train.jsonl"

    @property
    def train(self) -> Path:
        """prefix of .bin and .idx"""
        return self.output / "data" / "train"

    @property
    def cache(self) -> Path:
        return self.output / "data" / "cache"

    @property
    def windows(self) -> Path:
        return self.output / "data" / "held_out.npy"

    @property
    def imported(self) -> Path:
        return self.output / "checkpoints" / "imported"

    def checkpoint(self, arm: str) -> Path:
        return self.output / "checkpoints" / arm

    def exported(self, arm: str) -> Path:
        return self.output / "models" / arm

    def tensorboard(self, arm: str) -> Path:
        return self.output / "tensorboard" / arm

    def probe(self, name: str) -> Path:
        return self.output / "probes" / f"{name}.json"

    @property
    def check(self) -> Path:
        return self.output / "check.json"

    @property
    def settings(self) -> Path:
        return self.output / "settings.json"

    @property
    def timings(self) -> Path:
        return self.output / "timings.json"

    def log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.log"

    def derived(self) -> list[Path]:
        """All that the settings decide; the fetched model is not among them."""
        names = ("data", "checkpoints", "models", "tensorboard", "probes", "logs", "check.json", "timings.json",
                 "results.json", "report.html")  # fmt: skip
        return [self.output / name for name in names]


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prepare_output(paths: Paths, settings: Settings) -> bool:
    """Make the output folder ready for these settings; False if another run's work had to go.

    Removes what interrupted stages left aside and, where the settings or the folder's place changed, all derived files.

    Raises:
        ValueError: the folder is something else's.
    """
    output = paths.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is not a folder")
    output.mkdir(parents=True, exist_ok=True)
    own = {path.name for path in paths.derived()} | {paths.model.name, paths.settings.name, ".lock"}
    foreign = [
        entry.name for entry in sorted(output.iterdir()) if not _is_aside(entry.name, own) and entry.name not in own
    ]
    if foreign and not paths.settings.exists():
        raise ValueError(f"--output {output} holds other things ({foreign[0]}); name a new or an empty folder")
    _remove_aside(paths, own)
    # The checkpoints name the tokenizer's folder, so a folder that was moved is made again as well.
    wanted = {**json.loads(json.dumps(dataclasses.asdict(settings))), "output": str(output.resolve())}
    unchanged = True
    if any(path.exists() for path in paths.derived()):
        unchanged = paths.settings.exists() and json.loads(paths.settings.read_text()) == wanted
    if not unchanged:
        for path in paths.derived():
            remove(path)
    write_json(paths.settings, wanted)
    return unchanged


def _is_aside(name: str, own: set[str]) -> bool:
    return any(name.startswith(f".{final}.") for final in own)


def _remove_aside(paths: Paths, own: set[str]) -> None:
    for entry in paths.output.iterdir():
        if _is_aside(entry.name, own):
            remove(entry)
    for folder in ("data", "checkpoints", "models", "probes"):
        if (paths.output / folder).is_dir():
            for entry in (paths.output / folder).glob(".*"):
                remove(entry)


def threads_per_rank(ranks: int) -> int:
    """Threads for each of `ranks` processes that share the cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)
