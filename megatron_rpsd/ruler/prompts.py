"""What a family of tasks makes: a prompt that knows where its evidence stands; and the random streams it draws from."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from megatron_rpsd.ruler.tasks import Task

Span = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """A whole prompt, answer prefix included."""

    text: str
    outputs: tuple[str, ...]
    """The references."""
    evidence: tuple[tuple[Span, ...], ...]
    """For each reference the half-open character spans in `text` that hold its evidence, ascending."""


class Draws:
    """RULER's random state: one Python stream, one legacy numpy stream, and shuffles that touch neither."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.legacy = np.random.RandomState(seed)

    def private_shuffle(self, items: list) -> None:
        """Shuffle in place by a fresh generator: the permutation depends on the number of items alone."""
        random.Random(self.seed).shuffle(items)

    def state(self) -> tuple:
        return self.random.getstate(), self.legacy.get_state()

    def restore(self, state: tuple) -> None:
        self.random.setstate(state[0])
        self.legacy.set_state(state[1])


class Family(ABC):
    """A task at one length: builds prompts of a wanted size, drawing from `draws` in RULER's order."""

    step: int
    """What a sample that does not fit is made smaller by, and the smallest size tried."""
    unit: str
    """What a size counts, for error messages."""
    extra_tokens = 0
    """Tokens that a sample has beyond a probe's."""
    max_samples: int | None = None

    def __init__(self, task: Task, length: int, draws: Draws) -> None:
        self.task, self.length, self.draws = task, length, draws
        self.refusal = f"--length {length} cannot hold a sample of {task.name}"

    def begin(self, index: int) -> Any:
        """What sample `index` keeps when it is built again at a smaller size."""
        return None

    @abstractmethod
    def probe(self, size: int, sample: Any) -> Prompt | None:
        """A prompt for the search, None when these draws cannot be used."""

    def build(self, size: int, sample: Any) -> Prompt | None:
        """A prompt for the output."""
        return self.probe(size, sample)

    def first_estimate(self) -> int:
        """Size of the prompt that the search's upper end is estimated from."""
        return self.step

    def highest(self, tokens_per_unit: float) -> int:
        """The search's upper end."""
        return int((self.length / tokens_per_unit) * 3)

    def check_size(self, size: int) -> None:  # noqa: B027  (most families take any size)
        """ValueError when samples of this size cannot be made exactly."""


def join_parts(parts: Sequence[str], separator: str) -> tuple[str, list[int]]:
    """The parts joined, and where each starts in the result."""
    starts = accumulate((len(part) + len(separator) for part in parts[:-1]), initial=0)
    return separator.join(parts), list(starts)


def shift(spans: Iterable[Span], by: int) -> tuple[Span, ...]:
    return tuple((start + by, stop + by) for start, stop in spans)


def fill(template: str, context: str, **fields: str) -> tuple[str, int]:
    """`template` with `context` in it, and where the context starts; no text is read for braces but the template."""
    before, after = template.split("{context}")
    before = before.format(**fields)
    return before + context + after.format(**fields), len(before)
