"""Malformed command lines, drawn from a seed: what is typed, what was done to the files, and what the refusal names."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.soak.forked import TRAIN

HERE = "{here}"
"""Stands in words and in what a refusal names for the folder that the command line is run on."""


@dataclass(frozen=True)
class Malformed:
    """One configuration.

    Attributes:
        family: what kind of mistake it is.
        program: TRAIN, or a tool's name.
        words: the command line; of TRAIN what stands behind a sound one, and wins over it.
        names: parts that the one line on stderr must hold: the flag, and the value or the file.
        ranks: size of the job.
        prepare: what is done to the folder first.
        whole: `words` is all of the command line, of TRAIN too.
    """

    family: str
    program: str
    words: tuple[str, ...]
    names: tuple[str, ...]
    ranks: int = 1
    prepare: Callable[[Path, random.Random], None] | None = None
    whole: bool = False

    def typed(self, here: Path, sound: list[str]) -> list[str]:
        """The command line; `sound` is one of the training that runs."""
        words = self.words if self.whole or self.program != TRAIN else (*sound, *self.words)
        return [word.replace(HERE, str(here)) for word in words]

    def __str__(self) -> str:
        done = f" after {self.prepare.__name__}" if self.prepare else ""
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.family}: {self.program} {' '.join(self.words)}{done}{ranks}"

    def fault(self, here: Path, code: int | None, errors: str) -> str | None:
        """What the refusal lacks, or None."""
        if code is None:
            return "it was still running when its time was up"
        lines = errors.splitlines()
        if "Traceback" in errors:
            return f"a traceback, exit code {code}: {lines[-1]}"
        if code != 2:
            return f"exit code {code}: {errors[-300:]!r}"
        if len(lines) != 1 or not lines[0].startswith("error: "):
            return f"{len(lines)} lines: {errors[:600]!r}"
        absent = [part for part in self.names if part.replace(HERE, str(here)) not in lines[0]]
        return f"{lines[0]!r} does not name {', '.join(absent)}" if absent else None


Family = Callable[[random.Random], Malformed]


def draw(seed: int, quotas: dict[Family, int]) -> Iterator[Malformed]:
    """`quotas[family]` different configurations of every family."""
    dice, seen = random.Random(seed), set()
    for family, count in quotas.items():
        for _ in range(count):
            for _ in range(1000):
                one = family(dice)
                key = (one.program, one.words, one.ranks, one.prepare and one.prepare.__name__)
                if key not in seen:
                    break
            else:
                raise AssertionError(f"{family.__name__} has no {count} different members")
            seen.add(key)
            yield one


def table(family: str, rows: list[tuple[str, str]], program: str = TRAIN, ranks: int = 1, before: str = "") -> Family:
    """A family whose members are written out: (words, parts that the line names), both split at blanks."""

    def member(dice: random.Random) -> Malformed:
        words, names = dice.choice(rows)
        return Malformed(family, program, (*before.split(), *words.split()), tuple(names.split()), ranks)

    member.__name__ = family
    return member
