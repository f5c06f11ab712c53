"""Predictions on the disk: a line a sample, written at once, so that a killed run goes on where it ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_rpsd.data.files import replace_file
from megatron_rpsd.evaluation.samples import Prepared, Sample


def count_lines(folder: Path, name: str) -> int:
    """Whole lines of FOLDER/NAME.jsonl, 0 where there is no such file."""
    path = folder / f"{name}.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


class PredictionFile:
    """One task at one length: OUTPUT/predictions/TASK-LENGTH.jsonl.

    Lines come in any order while the run goes on and are put into the samples' order by `finish`. A last line that a
    kill has cut is dropped when the file is opened, and its sample is asked again.
    """

    def __init__(self, folder: Path, prepared: Prepared, fields: Sequence[str]) -> None:
        """Read what is there.

        Args:
            folder: OUTPUT/predictions.
            fields: keys that a line must have.

        Raises:
            ValueError: the file holds lines of other samples, or other things than predictions.
        """
        self.path, self.samples, self.fields = folder / f"{prepared.name}.jsonl", prepared.samples, tuple(fields)
        self.lines: dict[str, dict] = {}
        self._file = None
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        ids = {sample.id for sample in self.samples}
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or any(field not in record for field in self.fields):
                raise ValueError(
                    f"{self.path}: line {number} is no prediction with {', '.join(self.fields)}: delete the file to "
                    "ask its samples again"
                )
            if record["id"] not in ids:
                raise ValueError(f"{self.path}: line {number} answers {record['id']}, none of these prompts")
            self.lines[record["id"]] = record
        if whole < len(content):
            with self.path.open("rb+") as file:
                file.truncate(whole)

    def missing(self, batch_size: int = 1) -> list[Sample]:
        """Samples to ask: every batch, counted from the first sample, of which one is missing."""
        batches = [self.samples[at : at + batch_size] for at in range(0, len(self.samples), batch_size)]
        return [sample for batch in batches if any(s.id not in self.lines for s in batch) for sample in batch]

    def append(self, line: dict) -> None:
        """Write one prediction through to the operating system."""
        assert all(field in line for field in self.fields), line
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()
        self.lines[line["id"]] = line

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Close the file, with every sample's line once and in the samples' order."""
        self.close()
        text = "".join(json.dumps(self.lines[sample.id]) + "\n" for sample in self.samples)
        if not self.path.is_file() or self.path.read_bytes() != text.encode():
            replace_file(self.path, text.encode())
