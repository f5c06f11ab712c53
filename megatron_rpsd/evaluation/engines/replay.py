"""Answers that were made before: this library's own prediction files, or the files that RULER's scripts write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_rpsd.evaluation.engines.base import Completion, Engine
from megatron_rpsd.evaluation.samples import Sample, json_lines


class Replay(Engine):
    """Answers read from a file, or from the folder that holds TASK-LENGTH.jsonl (or a folder `predictions` that does).

    Lines {"id", "prediction"} are found by id. RULER's own lines {"pred", "outputs", ...} carry no usable id (a NIAH
    line's `index` is an offset into the text), so they are matched by their order, and only where `by_line` says so;
    their references must then be the sample's.
    """

    name = "replay"

    def __init__(self, source: Path, by_line: bool = False) -> None:
        if not source.exists():
            raise ValueError(f"--predictions {source} does not exist")
        self.source, self.by_line = source, by_line
        self._read: dict[Path, dict] = {}

    def describe(self) -> dict:
        return {"name": self.name, "predictions": str(self.source), "by_line": self.by_line}

    def _file(self, sample: Sample) -> Path:
        if self.source.is_file():
            return self.source
        name = f"{sample.task}-{sample.length}.jsonl"
        for path in (self.source / name, self.source / "predictions" / name):
            if path.is_file():
                return path
        raise ValueError(f"--predictions {self.source} holds no {name}")

    def _lines(self, path: Path) -> dict:
        """id or line number -> record."""
        if path not in self._read:
            records = [record for _, record in json_lines(path)]
            if self.by_line:
                self._read[path] = dict(enumerate(records))
            elif any("id" not in record for record in records):
                raise ValueError(
                    f"{path}: not every line has an id; RULER's own files are matched by their order, which "
                    "--predictions-order lines says"
                )
            else:
                self._read[path] = {record["id"]: record for record in records}
        return self._read[path]

    def _record(self, sample: Sample) -> dict:
        path = self._file(sample)
        found = self._lines(path).get(sample.number if self.by_line else sample.id)
        if found is None:
            where = f"line {sample.number + 1}" if self.by_line else f"id {sample.id}"
            raise ValueError(f"{path} has no {where}: it belongs to other prompts, or is not complete")
        if self.by_line and "outputs" in found and tuple(found["outputs"]) != sample.outputs:
            raise ValueError(
                f"{path}: line {sample.number + 1} answers {found['outputs']}, {sample.id} asks for "
                f"{list(sample.outputs)}: other prompts, or another order"
            )
        return found

    def complete(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Completion]]:
        for sample in samples:
            record = self._record(sample)
            text = record.get("prediction", record.get("pred"))
            if not isinstance(text, str):
                raise ValueError(f"{self._file(sample)}: the line of {sample.id} has neither prediction nor pred")
            yield sample, Completion(text, int(record.get("tokens", 0)), record.get("finish", "stop"))
