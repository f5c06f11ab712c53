"""Where a run keeps its things."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run; nothing is made by naming them."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Megatron's --save and --load."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def arguments(self) -> Path:
        """Every resolved argument, as JSON."""
        return self.path / "arguments.json"

    @property
    def origins(self) -> Path:
        """One JSON object a line and start: time, iteration, command, versions, git state, host, Slurm's variables."""
        return self.path / "starts.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object a line: what befell the run; see `runs.events`."""
        return self.path / "events.jsonl"

    @property
    def wandb_id(self) -> Path:
        """The wandb run that every start goes on with."""
        return self.path / "wandb_id"

    @property
    def attempts(self) -> Path:
        """One JSON object a line: an attempt's begin or end, written by the batch script."""
        return self.path / "attempts.jsonl"

    @property
    def command(self) -> Path:
        """The arguments of the newest attempt, each ended by a zero byte."""
        return self.path / "command"

    @property
    def script(self) -> Path:
        """A copy of the batch script of the newest attempt."""
        return self.path / "submitted.sbatch"

    @property
    def stop(self) -> Path:
        """Whoever makes this file asks the run to write a checkpoint at the next step's border and to leave."""
        return self.path / "stop"

    @property
    def error(self) -> Path:
        """One line: why the run ended where another attempt would end alike, such as a refused command line."""
        return self.path / "error.txt"

    @property
    def finished(self) -> Path:
        """Written when the last step is done."""
        return self.path / "finished.json"
