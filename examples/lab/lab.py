"""The lab's parts, each skipped when its record is there: data, a base for every seed, the arms, their exams."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from examples.lab import language
from examples.lab.arms import ARMS, arm_arguments, base_arguments, equal_time_steps
from examples.lab.console import Progress
from examples.lab.data import write_streams
from examples.lab.records import read_record, write_record
from examples.lab.runs import Runs, accuracy
from examples.lab.settings import MODEL_FLAGS, MODEL_SWITCHES, RANKS, Paths, Settings, fingerprint
from examples.quickstart.settings import remove


class Lab:
    """All runs of some arms over some seeds."""

    def __init__(
        self, paths: Paths, settings: Settings, seeds: Sequence[int], arms: Sequence[str], lengths: Sequence[int]
    ) -> None:
        self.paths, self.settings = paths, settings
        self.seeds, self.arms, self.lengths = tuple(seeds), tuple(arms), tuple(lengths)
        self.progress, self.title = Progress([kind for seed in self.seeds for kind in ("data", "base", *self.arms)]), ""
        self.runs = Runs(paths, settings, RANKS, lambda at, seconds: self.progress.show(self.title + at, seconds))

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
        self.runs.on_ranks(1, self.paths.log(seed, "data"), write_streams, folder, self.settings, seed)
        write_record(folder, made_from, {})
        return {}, True, ""

    def _base(self, seed: int) -> tuple[dict, bool, str]:
        steps = self.settings.base.steps
        record, trained = self.runs.trained(seed, "base", self._base_hash(seed), self._base_arguments(seed), steps)
        right, examined = self.runs.examined(seed, "base", record, (self.settings.base.seq_length,))
        window = self.settings.base.seq_length
        said = f", accuracy {accuracy(right[str(window)]):.3f} at {window}"
        return {**record, "right": right}, trained or examined, said

    def _arm(self, seed: int, arm: str, records: dict[str, dict]) -> tuple[dict, bool, str]:
        steps = self._steps(arm, records)
        arguments = self._arm_arguments(seed, arm, steps)
        made_from = fingerprint(self._base_hash(seed), arguments)
        record, trained = self.runs.trained(seed, arm, made_from, arguments, steps)
        right, examined = self.runs.examined(seed, arm, record, self.lengths)
        accuracies = ", ".join(f"{accuracy(right[str(length)]):.3f} at {length}" for length in self.lengths)
        return {**record, "right": right}, trained or examined, f", {accuracies}"

    def _steps(self, arm: str, records: dict[str, dict]) -> int:
        if ARMS[arm].time_of is None:
            return self.settings.adapt.steps
        theirs, ours = records[ARMS[arm].time_of], records[ARMS[arm].same_as]
        seconds = theirs["seconds_per_step"], ours["seconds_per_step"]
        return equal_time_steps(self.settings.adapt, *seconds, self.settings.most_steps_factor)
