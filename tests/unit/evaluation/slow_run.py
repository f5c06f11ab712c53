"""A run in a process of its own, slow enough to be killed in the middle: python slow_run.py FOLDER SECONDS."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_rpsd.evaluation.engines.base import Completion
from megatron_rpsd.evaluation.engines.reference import RandomAnswers
from megatron_rpsd.evaluation.ruler_run import ask, check_run, only_run, write_run
from megatron_rpsd.evaluation.samples import Sample

PROVENANCE = {"model": {"path": "m"}, "engine": {"name": "random"}, "command": ["x"], "prepared": {}}


class SlowAnswers(RandomAnswers):
    """Random answers in batches, backwards within each, with a pause before every one."""

    batch_size = 3
    fixed_batches = True

    def __init__(self, seconds: float) -> None:
        super().__init__(7)
        self.seconds = seconds

    def complete(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Completion]]:
        for sample, answer in super().complete(samples[::-1]):
            time.sleep(self.seconds)
            yield sample, answer


def run(folder: Path, seconds: float) -> None:
    """Answer all prompts of FOLDER/prompts into FOLDER/output."""
    output = folder / "output"
    paths = sorted(path for path in (folder / "prompts").glob("*.jsonl") if "evidence" not in path.name)
    with only_run(output):
        write_run(output, check_run(output, PROVENANCE))
        ask(SlowAnswers(seconds), paths, sum(len(path.read_bytes().splitlines()) for path in paths), output)


if __name__ == "__main__":
    run(Path(sys.argv[1]), float(sys.argv[2]))
