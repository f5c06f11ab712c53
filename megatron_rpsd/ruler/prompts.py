"""What a family of tasks makes: a prompt that knows where its evidence stands; and the random streams it draws from."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
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
        self._start(seed)

    def _start(self, seed: int) -> None:
        self._shuffle_seed = seed
        self.random = random.Random(seed)
        self.legacy = np.random.RandomState(seed % 2**32)

    def key(self, sample: int) -> None:
        """From here on everything follows from (seed, sample), shuffles too. RULER does nothing like it."""
        digest = hashlib.sha256(f"{self.seed}/{sample}".encode()).digest()
        self._start(int.from_bytes(digest[:8], "big"))

    def private_shuffle(self, items: list) -> None:
        """Shuffle in place by a fresh generator: the permutation depends on the number of items alone."""
        random.Random(self._shuffle_seed).shuffle(items)

    def state(self) -> tuple:
        return self._shuffle_seed, self.random.getstate(), self.legacy.get_state()

    def restore(self, state: tuple) -> None:
        self._shuffle_seed = state[0]
        self.random.setstate(state[1])
        self.legacy.set_state(state[2])


@dataclass(frozen=True)
class ModelTemplate:
    """What stands around a task's text, as a chat model wants it; the answer's prefix follows behind `tail`."""

    name: str = "base"
    head: str = ""
    tail: str = ""
    has_bos: bool = False
    """`head` begins with the tokenizer's BOS."""

    def wrap(self, prompt: Prompt, prefix: str) -> Prompt:
        if self.name == "base":
            return prompt
        cut = prefix_place(prompt.text, prefix)
        text = self.head + prompt.text[:cut] + self.tail + prompt.text[cut:]
        return Prompt(text, prompt.outputs, tuple(shift(spans, len(self.head)) for spans in prompt.evidence))


class Family(ABC):
    """A task at one length: builds prompts of a wanted size, drawing from `draws` in RULER's order."""

    step: int
    """What a sample that does not fit is made smaller by, and the smallest size tried."""
    unit: str
    """What a size counts, for error messages."""
    extra_tokens = 0
    """Tokens that a probe lacks and a sample has."""
    sample_extra_tokens = 0
    """Tokens that are held against the budget beyond those that `build` gives."""
    max_samples: int | None = None
    beyond_ruler = False
    """Set once a sample had to be made in a way that RULER does not have."""

    def __init__(self, task: Task, length: int, draws: Draws) -> None:
        self.task, self.length, self.draws = task, length, draws
        self.refusal = f"--length {length} cannot hold a sample of {task.name}"
        self.reserved = task.generated_tokens
        """Tokens kept free for the answer."""
        self.template = ModelTemplate()

    def fits(self, tokens: int) -> bool:
        return tokens + self.reserved <= self.length

    def start(self, index: int) -> Any:
        """Sets the random state where samples have their own, and begins a sample."""
        if self.task.keyed:
            self.draws.key(index)
        return self.begin(index)

    def begin(self, index: int) -> Any:
        """What sample `index` keeps when it is built again at a smaller size."""
        return None

    @abstractmethod
    def probe(self, size: int, sample: Any) -> Prompt | None:
        """A prompt for the search, None when these draws cannot be used."""

    def build(self, size: int, sample: Any) -> Prompt | None:
        """A prompt for the output."""
        return self.probe(size, sample)

    def finish(self, prompt: Prompt) -> Prompt:
        """What is drawn only once a prompt fits."""
        return prompt

    def wrap(self, prompt: Prompt) -> Prompt:
        return self.template.wrap(prompt, self.task.prefix)

    def smaller(self, size: int) -> int | None:
        """The size that is tried after one that did not fit, None when there is none."""
        return size - self.step if size > self.step else None

    def first_estimate(self) -> int:
        """Size of the prompt that the search's upper end is estimated from."""
        return self.step

    def highest(self, tokens_per_unit: float) -> int:
        """The search's upper end."""
        return int((self.length / tokens_per_unit) * 3)

    def check_size(self, size: int) -> None:  # noqa: B027  (most families take any size)
        """ValueError when samples of this size cannot be made exactly."""


@dataclass(frozen=True)
class Layout:
    """One item of a position grid: all but the place of its evidence is fixed."""

    units: list[str]
    """Sentences or lines of the haystack, without the evidence."""
    block: list[str]
    """The evidence, units that stand one after another."""
    separator: str
    fill: Callable[[str], tuple[str, int]]
    """From a context to the whole prompt, and where the context starts in it."""
    outputs: tuple[str, ...]

    def at(self, depth: float) -> Prompt:
        """The prompt with the evidence behind a share `depth` (0 to 1) of the units."""
        place = int(len(self.units) * depth)
        context, starts = join_parts(self.units[:place] + self.block + self.units[place:], self.separator)
        text, offset = self.fill(context)
        spans = [(start, start + len(unit.rstrip())) for start, unit in zip(starts[place:], self.block, strict=False)]
        return Prompt(text, self.outputs, tuple((span,) for span in shift(spans, offset)))


def prefix_place(text: str, prefix: str) -> int:
    """Where RULER cuts the answer's prefix off: at the last occurrence of its first ten characters."""
    return text.rindex(prefix[:10])


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
