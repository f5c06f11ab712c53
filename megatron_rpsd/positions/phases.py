"""A run in phases: at which RoPE base, in which windows and on which data each sample of the run is read.

Phase-wise RoPE scaling (arXiv 2604.06070): a small base while windows are short, a large one while they are long, in
one run whose optimizer goes on. A sample is always a window of --seq-length tokens, L. A phase with `seq=l` reads it as
L / l sequences of l tokens, as `positions.lengths` does, so every step of a run carries as many tokens:

    --rope-phases "short:theta=10000,seq=2048,samples=20000;long:theta=500000,seq=8192"       L = 8192

    samples      0 ............ 19999 | 20000 ..............
    base         10,000               | 500,000
    read as      4 x 2048             | 1 x 8192

The phase is a function of the sample's index alone, so that a resumed run finds the same phases.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

_FLAG = "--rope-phases"
_NUMBERS = {"theta": "base", "seq": "length", "samples": "samples"}
_KEYS = (*_NUMBERS, "data")


@dataclass(frozen=True)
class Phase:
    """One stretch of a run."""

    name: str
    base: int
    """theta: RoPE base (--rotary-base), > 1."""
    length: int
    """seq: tokens of a sequence; divides --seq-length."""
    samples: int | None = None
    """Samples that the phase lasts: windows of --seq-length tokens, as --train-samples and --global-batch-size count
    them. None (the last phase alone): all that are left."""
    data: str | None = None
    """Prefix of the phase's training data; None: --data-path."""


@dataclass(frozen=True)
class PhaseSchedule:
    """The phases of a run, in order.

    Raises:
        ValueError: one line that names --rope-phases and the phase: a name twice, a value out of range, a window that
            shrinks, or a phase without `samples` before the last one.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        names = [phase.name for phase in self.phases]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"{_FLAG}: phase {twice[0]} is named {names.count(twice[0])} times; give each its own name"
            )
        for phase in self.phases:
            where = f"{_FLAG} {phase.name}"
            if phase.base <= 1:
                raise ValueError(f"{where}: theta={phase.base} must be greater than 1")
            if phase.length < 2:
                raise ValueError(f"{where}: seq={phase.length} must be at least 2 tokens")
            if phase.samples is not None and phase.samples < 1:
                raise ValueError(f"{where}: samples={phase.samples} must be at least 1: the border would run backwards")
        for earlier, later in itertools.pairwise(self.phases):
            if earlier.samples is None:
                raise ValueError(
                    f"{_FLAG} {earlier.name}: samples=N is missing; only the last phase, {names[-1]}, lasts as long as "
                    "the run"
                )
            if later.length < earlier.length:
                raise ValueError(
                    f"{_FLAG}: the window shrinks from seq={earlier.length} in {earlier.name} to seq={later.length} in "
                    f"{later.name}; put the phases in order of growing windows (equal ones may follow each other)"
                )

    @property
    def window(self) -> int:
        """Tokens of a sample: the longest phase's, which is the last one's."""
        return self.phases[-1].length

    @property
    def starts(self) -> list[int]:
        """Index of every phase's first sample."""
        return [0, *itertools.accumulate(phase.samples for phase in self.phases[:-1])]

    def at(self, sample_index: int) -> int:
        """Which phase reads the sample with this global index."""
        assert sample_index >= 0
        return bisect.bisect_right(self.starts, sample_index) - 1

    def place(self, sample_index: int) -> tuple[str | None, int]:
        """Where a sample comes from: (the phase's data, its index in that stream).

        Phases with the same data read on where the earlier one stopped, so that no sample is read twice; without any
        `data` the stream is that of a run without phases.
        """
        index = self.at(sample_index)
        phase, starts = self.phases[index], self.starts
        before = sum(other.samples for other in self.phases[:index] if other.data == phase.data)
        return phase.data, before + sample_index - starts[index]

    def streams(self, total: int) -> dict[str | None, int]:
        """Samples that a run of `total` samples reads of each data."""
        counts: dict[str | None, int] = {}
        for phase, start, stop in self._stretches(total):
            counts[phase.data] = counts.get(phase.data, 0) + stop - start
        return counts

    def check(self, window: int, unit: int, global_batch_size: int, total: int | None) -> None:
        """Refuse what the run's sizes do not carry.

        Args:
            window: --seq-length.
            unit: tokens by which a sequence must divide, 2 x CP (x TP under sequence parallelism).
            global_batch_size: samples of a step.
            total: samples of the run; None where nothing is trained.

        Raises:
            ValueError: one line with the arithmetic and the way out.
        """
        if window != self.window:
            raise ValueError(
                f"--seq-length {window} is not the longest window of {_FLAG}, seq={self.window} of "
                f"{self.phases[-1].name}: leave --seq-length out or make them equal"
            )
        for phase in self.phases:
            if window % phase.length:
                raise ValueError(
                    f"{_FLAG} {phase.name}: seq={phase.length} must divide the longest window, {window}: "
                    f"{window} % {phase.length} = {window % phase.length}; the nearest lengths are "
                    f"{_nearest_divisors(window, phase.length)}"
                )
            if phase.length % unit:
                raise ValueError(
                    f"{_FLAG} {phase.name}: seq={phase.length} must divide by 2 x CP (x TP under sequence "
                    f"parallelism) = {unit}"
                )
        self._check_borders(global_batch_size)
        if total is not None:
            self._check_total(total)

    def _check_borders(self, global_batch_size: int) -> None:
        for phase, border in zip(self.phases, self.starts[1:], strict=False):
            past = border % global_batch_size
            if past:
                start = border - phase.samples
                fits = [near - start for near in (border - past, border - past + global_batch_size) if near > start]
                raise ValueError(
                    f"{_FLAG} {phase.name}: samples={phase.samples} ends at sample {border}, inside a step: {border} % "
                    f"--global-batch-size {global_batch_size} = {past}; the nearest sizes are "
                    f"samples={' and samples='.join(map(str, fits))}"
                )

    def _check_total(self, total: int) -> None:
        last, start = self.phases[-1], self.starts[-1]
        if start >= total:
            raise ValueError(
                f"{_FLAG} {last.name}: it would start at sample {start}, and the run ends after {total}: shorten the "
                "earlier phases or raise --train-samples (or --train-iters)"
            )
        if last.samples is not None and start + last.samples != total:
            raise ValueError(
                f"{_FLAG} {last.name}: {start} + samples={last.samples} = {start + last.samples}, and the run has "
                f"{total} samples: leave samples out of the last phase, or write samples={total - start}"
            )

    def check_continues(self, earlier: PhaseSchedule, consumed: int) -> None:
        """Refuse to go on with a run under another past.

        Args:
            earlier: the schedule that the checkpoint was trained under.
            consumed: samples that it has read.

        Raises:
            ValueError: the two differ in a phase of those samples.
        """
        if not consumed:
            return
        past, mine = (tuple(schedule._past(consumed)) for schedule in (earlier, self))
        if past != mine or earlier.window != self.window:
            raise ValueError(
                f"{_FLAG}: the checkpoint has read {consumed} samples as {earlier.describe()}; phases up to there must "
                "stay as they were: leave the flag out to go on with the checkpoint's own, or change later phases alone"
            )

    def _past(self, consumed: int) -> Iterator[tuple[Phase, int, int]]:
        """(phase, first, one past last) of what was read; a name and a length that is still to come do not count."""
        for phase, start, stop in self._stretches(consumed):
            yield replace(phase, name="", samples=None), start, stop

    def _stretches(self, total: int) -> Iterator[tuple[Phase, int, int]]:
        """(phase, first sample, one past its last) of a run of `total` samples."""
        starts = self.starts
        for phase, start, stop in zip(self.phases, starts, [*starts[1:], math.inf], strict=True):
            if start < total:
                yield phase, start, min(stop, total)

    def describe(self) -> str:
        """The schedule as it is typed."""
        return ";".join(_typed(phase) for phase in self.phases)


def parse_phases(text: str) -> PhaseSchedule:
    """The schedule of NAME:theta=...,seq=...[,samples=...][,data=PREFIX];NAME:...

    Raises:
        ValueError: one line: malformed, an unknown key, a key twice, theta or seq missing; and as `PhaseSchedule`.
    """
    parts = [part.strip() for part in text.split(";")]
    if not parts[-1]:  # a semicolon at the end
        parts.pop()
    if not parts:
        raise ValueError(f'{_FLAG} "{text}" is empty; write NAME:theta=...,seq=...,samples=...;NAME:theta=...,seq=...')
    return PhaseSchedule(tuple(_parse_phase(part) for part in parts))


def _parse_phase(text: str) -> Phase:
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not colon or not name or "=" in name:
        raise ValueError(f'{_FLAG}: "{text}" is no phase; write NAME:theta=10000,seq=2048,samples=20000')
    given: dict[str, int | str] = {}
    for item in rest.split(","):
        key, equals, value = (word.strip() for word in item.partition("="))
        if not equals or not value:
            raise ValueError(f'{_FLAG} {name}: "{item.strip()}" is not KEY=VALUE; the keys are {", ".join(_KEYS)}')
        if key not in _KEYS:
            raise ValueError(f"{_FLAG} {name}: there is no key {key}; the keys are {', '.join(_KEYS)}")
        field = _NUMBERS.get(key, key)
        if field in given:
            raise ValueError(f"{_FLAG} {name}: {key} is given twice")
        given[field] = value if key == "data" else _integer(name, key, value)
    if missing := [key for key in ("theta", "seq") if _NUMBERS[key] not in given]:
        raise ValueError(f"{_FLAG} {name}: {' and '.join(missing)} missing; write {name}:theta=10000,seq=2048,...")
    return Phase(name, **given)


def _integer(name: str, key: str, value: str) -> int:
    """A whole number, also written as 5e5."""
    try:
        number = float(value)
        if not number.is_integer():
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{_FLAG} {name}: {key}={value} must be a whole number") from None
    return int(value) if value.lstrip("+-").isdigit() else int(number)


def _nearest_divisors(window: int, length: int) -> str:
    """The divisors of the window on both sides of a length that does not divide it."""
    below = next(near for near in range(length - 1, 0, -1) if window % near == 0)
    above = next(near for near in range(length + 1, window + 1) if window % near == 0)
    return " and ".join(str(near) for near in (below, above) if near > 1)


def _typed(phase: Phase) -> str:
    shown = {key: getattr(phase, _NUMBERS.get(key, key)) for key in _KEYS}
    return f"{phase.name}:" + ",".join(f"{key}={value}" for key, value in shown.items() if value is not None)
