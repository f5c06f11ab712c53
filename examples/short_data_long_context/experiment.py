"""All models of some seeds: trained, examined, and looked into with the two instruments."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from examples.lab import language
from examples.lab.console import FIRST_GUESS_SECONDS
from examples.lab.records import read_record, write_record
from examples.lab.runs import Runs, accuracy
from examples.lab.settings import MODEL_FLAGS, MODEL_SWITCHES, Paths, fingerprint
from examples.quickstart.settings import remove
from examples.short_data_long_context import data
from examples.short_data_long_context.arms import BASES, MODELS, arguments, needed_models, phase_of
from examples.short_data_long_context.instruments import comparisons, look_into, traced
from examples.short_data_long_context.settings import Settings
from examples.short_data_long_context.workers import Part, run_parts

Show = Callable[[str, float], None]
Outcome = tuple[dict, bool, str]
"""a part's record, whether something had to be done, what to say beside the title"""

RANKS = 1
"""of every run: two runs side by side do more on two cores than one run on two ranks"""


class Experiment:
    """The runs of some students over some seeds."""

    def __init__(
        self, paths: Paths, settings: Settings, seeds: Sequence[int], students: Sequence[str], lengths: Sequence[int]
    ) -> None:
        self.paths, self.settings = paths, settings
        self.seeds, self.lengths = tuple(seeds), tuple(lengths)
        self.models = needed_models(tuple(students))

    def run(self) -> dict[int, dict[str, dict]]:
        """Everything that is missing; the records of the models and of "instruments", by seed and name.

        Raises:
            StageFailed: a run ended badly.
        """
        parts = [part for seed in self.seeds for part in self._parts(seed)]
        records = run_parts(parts, workers=len(os.sched_getaffinity(0)))
        names = (*self.models, "instruments")
        return {seed: {name: records[f"{seed}/{name}"] for name in names} for seed in self.seeds}

    def _parts(self, seed: int) -> list[Part]:
        """Of one seed, in an order in which they could run one after the other."""
        made = [self._made("data", seed, "data", "data", (), self._data)]
        for name in self.models:
            kind = "base" if name in BASES else "teacher" if name == "teacher" else f"student {MODELS[name].distils}"
            work = functools.partial(self._model, name=name)
            made.append(self._made(name, seed, kind, MODELS[name].title, ("data", *MODELS[name].needs), work))
        kept = tuple(dict.fromkeys([*traced(self.models), *sum(comparisons(self.models).values(), ())]))
        made.append(self._made("instruments", seed, "instruments", "traces and updates", kept, self._instruments))
        return made

    def _made(self, name: str, seed: int, kind: str, title: str, needs: tuple[str, ...], work: Callable) -> Part:
        needs = tuple(f"{seed}/{need}" for need in needs)
        return Part(f"{seed}/{name}", kind, f"seed {seed}: {title}", needs, functools.partial(work, seed))

    def _runs(self, show: Show) -> Runs:
        return Runs(self.paths, self.settings, RANKS, show)

    def _data(self, seed: int, records: Mapping[str, dict], show: Show) -> Outcome:
        folder = self.paths.data(seed)
        sources = [hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() for module in (language, data)]
        chosen = {name: value for name, value in dataclasses.asdict(self.settings).items() if "exam" not in name}
        made_from = fingerprint(sources, chosen, seed)
        record = read_record(folder, made_from)
        if record is not None:
            return record, False, ""
        remove(folder)
        self._runs(show).on_ranks(1, self.paths.log(seed, "data"), data.write_streams, folder, self.settings, seed)
        write_record(folder, made_from, {})
        return {"made_from": made_from}, True, ""

    def _model(self, seed: int, records: Mapping[str, dict], show: Show, name: str) -> Outcome:
        command = arguments(name, self.settings, seed, self.paths.seed(seed), self.paths.data(seed))
        before = [record["made_from"] for record in records.values()]
        made_from = fingerprint(MODEL_FLAGS, MODEL_SWITCHES, before, command)
        runs, steps = self._runs(show), phase_of(name, self.settings).steps
        record, trained = runs.trained(seed, name, made_from, command, steps)
        lengths = (self.settings.base.seq_length,) if name in BASES else self.lengths
        right, examined = runs.examined(seed, name, record, lengths)
        said = ", ".join(f"{accuracy(right[str(length)]):.3f} at {length}" for length in lengths)
        return {**record, "right": right}, trained or examined, f", {said}"

    def _instruments(self, seed: int, records: Mapping[str, dict], show: Show) -> Outcome:
        folder = self.paths.run(seed, "instruments")
        before = [record["made_from"] for record in records.values()]
        made_from = fingerprint(before, self.settings.trace_sequences)
        record = read_record(folder, made_from)
        if record is not None:
            return record, False, ""
        remove(folder)
        finished = self._runs(show).on_ranks(
            1, self.paths.log(seed, "instruments"), look_into, self.paths.seed(seed), folder, self.models,
            self.settings.trace_sequences,
        )  # fmt: skip
        write_record(folder, made_from, finished.values[0])
        return finished.values[0], True, ""


FIRST_GUESS_SECONDS.update({"teacher": 60.0, "instruments": 45.0})
