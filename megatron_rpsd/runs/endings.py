"""Why each start of a run ended, pieced together from what the run, its batch script and the next start left behind."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rpsd.runs.events import json_lines
from megatron_rpsd.runs.folder import RunFolder

LOST = "no end was recorded: killed, or its node was lost"


@dataclass(frozen=True)
class Ending:
    """Of one start: why, in words, and whether it ended as it should."""

    text: str
    well: bool


@dataclass(frozen=True)
class Traces:
    """What a run folder holds on ends.

    Attributes:
        begun: when each start began, seconds since 1970.
        seen: the newest start's last sign of life; None before any start.
        error: what error.txt says and when it was written; None where there is none.
    """

    begun: tuple[float, ...]
    seen: float | None
    finished: bool
    error: tuple[str, float] | None
    events: tuple[dict, ...]
    attempts: tuple[dict, ...]

    @classmethod
    def of(cls, run: RunFolder, starts: list[dict], seen: float | None) -> Traces:
        """Read them."""
        error = None
        if run.error.is_file():
            error = run.error.read_text(encoding="utf-8").strip(), run.error.stat().st_mtime
        return cls(
            tuple(start.get("time", 0.0) for start in starts), seen, run.finished.is_file(), error,
            tuple(json_lines(run.events)), tuple(json_lines(run.attempts)),
        )  # fmt: skip

    def refused_since(self) -> bool:
        """Whether error.txt is of a start that was refused after the newest one had gone silent."""
        return self.error is not None and self.error[1] > (self.seen or 0.0)

    def ending(self, number: int) -> Ending | None:
        """Of the start with this number, from 0; None for the newest one where nothing says that it ended."""
        last = number + 1 == len(self.begun)
        if last and self.finished:
            return Ending("finished", True)
        since, until = self.begun[number], math.inf if last else self.begun[number + 1]
        ended, asked = _within(self.events, "ended", since, until), _within(self.events, "asked to stop", since, until)
        attempt = _within(self.attempts, "end", since, until)
        # A run that ends itself writes its reason and then its end; without an end the reason is another start's.
        if last and self.error is not None and ended and since <= self.error[1] <= ended["time"] + 1:
            return Ending(self.error[0], False)
        if ended and ended.get("crashed"):
            return Ending(ended["text"], False)
        if asked and (ended or attempt or not last):  # else it may still be writing
            return Ending(asked["text"], True)
        if ended:
            return Ending(ended["text"], True)
        if attempt:
            return Ending(f"the ranks left with exit code {attempt.get('code')}", attempt.get("code") == 0)
        return Ending(LOST, False) if not last or self.refused_since() else None


def _within(entries: tuple[dict, ...], kind: str, since: float, until: float) -> dict | None:
    """The last entry of this kind in a span of time."""
    found = [entry for entry in entries if entry.get("event") == kind and since <= entry.get("time", 0.0) < until]
    return found[-1] if found else None
