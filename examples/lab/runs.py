"""Training runs and exams on ranks, each skipped when its record is there. Both labs are made of these."""

from __future__ import annotations

import contextlib
import json
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.lab.data import exam_path, write_exam
from examples.lab.evaluate import examine
from examples.lab.launch import Finished, rank_log, run_on_ranks, train
from examples.lab.records import as_marks, last_step, read_record, read_training_log, write_record
from examples.lab.settings import Paths, fingerprint
from examples.quickstart.settings import remove

_writing_exams = threading.Lock()


@dataclass(frozen=True)
class Runs:
    """How the parts of a lab run.

    Attributes:
        settings: the lab's, for its exams.
        ranks: data-parallel ranks of a training run.
        show: is called now and then while a part runs, with where it is and for how many seconds it has run.
    """

    paths: Paths
    settings: object
    ranks: int
    show: Callable[[str, float], None]

    def trained(self, seed: int, name: str, made_from: str, arguments: list[str], steps: int) -> tuple[dict, bool]:
        """A run's record, made now if it is not there; whether it was."""
        folder = self.paths.run(seed, name)
        record = read_record(folder, made_from)
        if record is not None:
            return record, False
        remove(folder)
        log = self.paths.log(seed, name)
        last_log = rank_log(log, self.ranks - 1)  # the rank that prints Megatron's iteration lines
        finished = self.on_ranks(
            self.ranks, log, train, arguments, at=lambda: f", step {last_step(last_log)}/{steps}"
        )  # fmt: skip
        training = read_training_log(last_log)
        assert training.steps[-1] == steps, (training.steps[-1], steps)
        record = {
            "made_from": made_from,
            "steps": steps,
            "seconds_per_step": training.seconds_per_step,
            "loop_seconds": training.loop_seconds,
            "wall_seconds": finished.wall_seconds,
            "cpu_seconds": finished.cpu_seconds,
            "curve_steps": training.steps,
            "curves": training.curves,
            "command": torchrun_command(arguments, self.ranks),
        }
        write_record(folder, made_from, record)
        return json.loads(json.dumps(record)), True

    def examined(self, seed: int, name: str, record: dict, lengths: Sequence[int]) -> tuple[dict[str, list], bool]:
        """Right answers at all `lengths`, those that are missing found now; whether some were."""
        folder, data = self.paths.run(seed, name), self.paths.data(seed)
        sizes = (self.settings.exam_documents, self.settings.base_exam_documents)
        made_from = fingerprint(record["made_from"], sizes)
        kept = read_record(folder / "exam", made_from) or {"right": {}}
        missing = tuple(length for length in lengths if str(length) not in kept["right"])
        if missing:
            with _writing_exams:
                for length in missing:
                    # Written anew each time: the sizes may have changed.
                    write_exam(exam_path(data, length), self.settings, seed, length)
            log = self.paths.log(seed, f"{name}_exam")
            right = self.on_ranks(1, log, examine, folder, data, missing, at=lambda: ", exam").values[0]
            kept["right"].update({str(length): as_marks(marks) for length, marks in right.items()})
            write_record(folder / "exam", made_from, {"right": kept["right"]})
        return {str(length): kept["right"][str(length)] for length in lengths}, bool(missing)

    def on_ranks(
        self, world_size: int, log: Path, function: Callable, *arguments, at: Callable[[], str] = str
    ) -> Finished:
        """Run on ranks, showing where it is."""
        begun = time.perf_counter()
        with contextlib.closing(run_on_ranks(world_size, log, function, *arguments)) as updates:
            for update in updates:
                if update is not None:
                    return update
                self.show(at(), time.perf_counter() - begun)
        raise AssertionError("run_on_ranks ends with Finished")


def torchrun_command(arguments: Sequence[str], ranks: int) -> str:
    """The command line by which a user would start the same run."""
    command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", "megatron_rpsd.training.main"]
    return f"OMP_NUM_THREADS=1 {shlex.join([*command, *arguments])}"


def accuracy(marks: Sequence[str]) -> float:
    """Share of right answers of an exam as records keep it."""
    return sum(row.count("1") for row in marks) / sum(len(row) for row in marks)
