"""What the user sees: which part runs now, which of how many, and how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from examples.quickstart.console import clock

_SECONDS_BETWEEN_LINES = 20.0
"""where the output is a file"""

# Until a part of the kind has been timed.
FIRST_GUESS_SECONDS = {"data": 12.0, "base": 75.0, "exam": 5.0}
FIRST_GUESS_ARM_SECONDS = 25.0


@dataclass
class Progress:
    """Counts parts and guesses the time that is left from the times of the parts of the same kind.

    Attributes:
        parts: kinds of all parts, in order; those that were done before count as parts of no time.
        done: parts that are over.
        started: the clock at the start, seconds.
        seconds: measured times by kind.
        lines_of_part: lines shown about the current part.
    """

    parts: Sequence[str]
    done: int = 0
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    lines_of_part: int = 0

    def guess(self, kind: str) -> float:
        """Seconds that a part of this kind takes."""
        measured = self.seconds.get(kind)
        if measured:
            return sum(measured) / len(measured)
        return FIRST_GUESS_SECONDS.get(kind, FIRST_GUESS_ARM_SECONDS)

    def left(self, running_seconds: float) -> float:
        """Seconds until everything is done, while the current part has run for `running_seconds`."""
        guesses = [self.guess(kind) for kind in self.parts[self.done :]]
        return sum(guesses[1:]) + max(0.0, guesses[0] - running_seconds) if guesses else 0.0

    def show(self, text: str, running_seconds: float) -> None:
        """One line about the current part: rewritten in place on a terminal, elsewhere a new one now and then."""
        line = f"[{self.done + 1}/{len(self.parts)}] {text}; about {clock(self.left(running_seconds))} left"
        if sys.stdout.isatty():
            print(f"\r{line:<110}", end="", flush=True)
        elif running_seconds >= _SECONDS_BETWEEN_LINES * (self.lines_of_part + 1):
            self.lines_of_part += 1
            print(line, flush=True)

    def finish(self, kind: str, text: str, seconds: float, fresh: bool = True) -> None:
        """The current part is over: its line, for good. Parts that were done before say nothing about the others."""
        if fresh:
            self.seconds.setdefault(kind, []).append(seconds)
        self.done += 1
        self.lines_of_part = 0
        elapsed = clock(time.perf_counter() - self.started)
        line = (
            f"[{self.done}/{len(self.parts)}] {elapsed}  {text} ({seconds:.0f} s); about {clock(self.left(0.0))} left"
        )
        print(f"\r{line:<110}" if sys.stdout.isatty() else line, flush=True)
