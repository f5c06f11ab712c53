"""The lab's parts, each skipped when its record is there: data, a base for every seed, the arms, their exams."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from examples.lab import language
from examples.lab.arms import ARMS, arm_arguments, base_arguments, equal_time_steps
from examples.lab.console import Progress
from examples.lab.data import exam_path, write_exam, write_streams
from examples.lab.evaluate import examine
from examples.lab.launch import Finished, rank_log, run_on_ranks, train
from examples.lab.records import as_marks, last_step, read_record, read_training_log, write_record
from examples.lab.settings import MODEL_FLAGS, MODEL_SWITCHES, RANKS, Paths, Settings, fingerprint
from examples.quickstart.settings import remove


class Lab:
    """All runs of some arms over some seeds."""

    def __init__(
        self, paths: Paths, settings: Settings, seeds: Sequence[int], arms: Sequence[str], lengths: Sequence[int]
    ) -> None:
        self.paths, self.settings = paths, settings
        self.seeds, self.arms, self.lengths = tuple(seeds), tuple(arms), tuple(lengths)
        self.progress = Progress([kind for seed in self.seeds for kind in ("data", "base", *self.arms)])

    def run(self) -> dict[int, dict[str, dict]]:
        """Everything that is missing; the records of base and arms, by seed and name.

        Raises:
            StageFailed: a run ended badly.
        """
        return {seed: self._seed(seed) for seed in self.seeds}

    def _seed(self, seed: int) -> dict[str, dict]:
        self._part("data", f"seed {seed}: data", lambda: self._data(seed))
        records = {"base": self._part("base", f"seed {seed}: base model", lambda: self._base(seed))}
        for arm in self.arms:
            title = f"seed {seed}: {ARMS[arm].title}"
            records[arm] = self._part(arm, title, lambda arm=arm: self._arm(seed, arm, records))
        return records

    def _part(self, kind: str, title: str, work: Callable[[], tuple[dict, bool, str]]) -> dict:
        """Do a part and say so; returns its record."""
        self.title, begun = title, time.perf_counter()
        self.progress.show(title, 0.0)
        record, fresh, said = work()
        said += "" if fresh else ", done before"
        self.progress.finish(kind, f"{title}{said}", time.perf_counter() - begun, fresh)
        return record

    # What the parts are made from.

    def _data_hash(self, seed: int) -> str:
        source = hashlib.sha256(Path(language.__file__).read_bytes()).hexdigest()
        chosen = {name: value for name, value in dataclasses.asdict(self.settings).items() if "exam" not in name}
        return fingerprint(source, chosen, seed)

    def _base_hash(self, seed: int) -> str:
        return fingerprint(self._data_hash(seed), MODEL_FLAGS, MODEL_SWITCHES, self._base_arguments(seed))

    def _base_arguments(self, seed: int) -> list[str]:
        return base_arguments(self.settings.base, seed, self.paths.data(seed), self.paths.run(seed, "base"))

    def _arm_arguments(self, seed: int, arm: str, steps: int) -> list[str]:
        paths = self.paths
        return arm_arguments(
            ARMS[arm], self.settings.adapt, steps, seed, paths.run(seed, "base"), paths.data(seed), paths.run(seed, arm)
        )

    # The parts: (record, whether something had to be done, what to say beside the title).

    def _data(self, seed: int) -> tuple[dict, bool, str]:
        folder, made_from = self.paths.data(seed), self._data_hash(seed)
        record = read_record(folder, made_from)
        if record is not None:
            return record, False, ""
        remove(folder)
        self._ranks(1, self.paths.log(seed, "data"), write_streams, folder, self.settings, seed)
        write_record(folder, made_from, {})
        return {}, True, ""

    def _base(self, seed: int) -> tuple[dict, bool, str]:
        steps = self.settings.base.steps
        record, trained = self._trained(seed, "base", self._base_hash(seed), self._base_arguments(seed), steps)
        right, examined = self._examined(seed, "base", record, (self.settings.base.seq_length,))
        accuracy = _mean(right[str(self.settings.base.seq_length)])
        said = f", accuracy {accuracy:.3f} at {self.settings.base.seq_length}"
        return {**record, "right": right}, trained or examined, said

    def _arm(self, seed: int, arm: str, records: dict[str, dict]) -> tuple[dict, bool, str]:
        steps = self._steps(arm, records)
        arguments = self._arm_arguments(seed, arm, steps)
        made_from = fingerprint(self._base_hash(seed), arguments)
        record, trained = self._trained(seed, arm, made_from, arguments, steps)
        right, examined = self._examined(seed, arm, record, self.lengths)
        accuracies = ", ".join(f"{_mean(right[str(length)]):.3f} at {length}" for length in self.lengths)
        return {**record, "right": right}, trained or examined, f", {accuracies}"

    def _steps(self, arm: str, records: dict[str, dict]) -> int:
        if ARMS[arm].time_of is None:
            return self.settings.adapt.steps
        theirs, ours = records[ARMS[arm].time_of], records[ARMS[arm].same_as]
        seconds = theirs["seconds_per_step"], ours["seconds_per_step"]
        return equal_time_steps(self.settings.adapt, *seconds, self.settings.most_steps_factor)

    def _trained(self, seed: int, name: str, made_from: str, arguments: list[str], steps: int) -> tuple[dict, bool]:
        """A run's record, made now if it is not there; whether it was."""
        folder = self.paths.run(seed, name)
        record = read_record(folder, made_from)
        if record is not None:
            return record, False
        remove(folder)
        log = self.paths.log(seed, name)
        last_log = rank_log(log, RANKS - 1)  # the rank that prints Megatron's iteration lines
        finished = self._ranks(RANKS, log, train, arguments, at=lambda: f", step {last_step(last_log)}/{steps}")
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
            "command": torchrun_command(arguments),
        }
        write_record(folder, made_from, record)
        return json.loads(json.dumps(record)), True

    def _examined(self, seed: int, name: str, record: dict, lengths: Sequence[int]) -> tuple[dict[str, list], bool]:
        """Right answers at all `lengths`, those that are missing found now; whether some were."""
        folder, data = self.paths.run(seed, name), self.paths.data(seed)
        sizes = (self.settings.exam_documents, self.settings.base_exam_documents)
        made_from = fingerprint(record["made_from"], sizes)
        kept = read_record(folder / "exam", made_from) or {"right": {}}
        missing = tuple(length for length in lengths if str(length) not in kept["right"])
        if missing:
            for length in missing:
                # Written anew each time: the sizes may have changed.
                write_exam(exam_path(data, length), self.settings, seed, length)
            log = self.paths.log(seed, f"{name}_exam")
            right = self._ranks(1, log, examine, folder, data, missing, at=lambda: ", exam").values[0]
            kept["right"].update({str(length): as_marks(marks) for length, marks in right.items()})
            write_record(folder / "exam", made_from, {"right": kept["right"]})
        return {str(length): kept["right"][str(length)] for length in lengths}, bool(missing)

    def _ranks(
        self, world_size: int, log: Path, function: Callable, *arguments, at: Callable[[], str] = str
    ) -> Finished:
        """Run on ranks, showing where it is."""
        begun = time.perf_counter()
        with contextlib.closing(run_on_ranks(world_size, log, function, *arguments)) as updates:
            for update in updates:
                if update is not None:
                    return update
                self.progress.show(self.title + at(), time.perf_counter() - begun)
        raise AssertionError("run_on_ranks ends with Finished")


def torchrun_command(arguments: Sequence[str]) -> str:
    """The command line by which a user would start the same run."""
    command = ["torchrun", "--standalone", "--nproc-per-node", str(RANKS), "-m", "megatron_rpsd.training.main"]
    return f"OMP_NUM_THREADS=1 {shlex.join([*command, *arguments])}"


def _mean(marks: Sequence[str]) -> float:
    return sum(row.count("1") for row in marks) / sum(len(row) for row in marks)
