"""CWE and FWE: the words that stand most often in a list."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rpsd.ruler.prompts import Draws, Family, Prompt, Span, fill, shift
from megatron_rpsd.ruler.sources import Sources
from megatron_rpsd.ruler.tasks import CWE_PREFIX, CWE_TEMPLATE, FWE_PREFIX, FWE_TEMPLATE, Task
from megatron_rpsd.ruler.words import all_words

COMMON = 10


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


class CommonWords(Family):
    """Sizes count the distinct words of the list; ten of them stand 30 times, the others 3 times."""

    unit, step, example_joint = "words", 10, " "

    def __init__(self, task: Task, length: int, draws: Draws, sources: Sources) -> None:
        super().__init__(task, length, draws)
        self.sources = sources
        self.words = list(all_words())
        draws.private_shuffle(self.words)

    def first_estimate(self) -> int:
        return 4096

    def highest(self, tokens_per_unit: float) -> int:
        return int(self.length // tokens_per_unit) * 2

    def _list(self, size: int, often: int, seldom: int) -> tuple[str, list[str], tuple[tuple[Span, ...], ...]]:
        """The numbered list, its ten common words, and where each of those stands in it."""
        words = self.words if size <= len(self.words) else self.sources.english_words
        chosen = self.draws.random.sample(words, size)
        common = chosen[:COMMON]
        items = common * often + chosen[COMMON:] * seldom
        self.draws.private_shuffle(items)
        places: dict[str, list[Span]] = {word: [] for word in common}
        parts, at = [], 0
        for number, word in enumerate(items, start=1):
            part = f"{number}. {word}"
            if word in places:
                places[word].append((at + len(part) - len(word), at + len(part)))
            parts.append(part)
            at += len(part) + 1
        return " ".join(parts), common, tuple(tuple(places[word]) for word in common)

    def probe(self, size: int, sample: Any) -> Prompt:
        short = self.length < 4096
        example, answer, _ = self._list(*((20, 3, 1) if short else (40, 10, 3)))
        context, common, evidence = self._list(size, *((6, 1) if short else (30, 3)))
        template = CWE_TEMPLATE + CWE_PREFIX
        before = fill(template, example)[0] + self.example_joint + numbered(answer) + "\n"
        text, offset = fill(template, context)
        return Prompt(before + text, tuple(common), tuple(shift(spans, len(before) + offset) for spans in evidence))


class FrequentWords(Family):
    """Sizes count the words of the text; how often a word stands there falls as one over its rank squared."""

    unit = "words"

    def __init__(self, task: Task, length: int, draws: Draws, reserved: int) -> None:
        super().__init__(task, length, draws)
        self.reserved, self.room = reserved, length - reserved
        self.vocabulary_size, self.step = self.room // 50, self.room // 32
        if self.vocabulary_size < 4:
            raise ValueError(f"--length {length} cannot hold a sample of fwe: it leaves fewer than 4 different words")

    def begin(self, index: int) -> list[str]:
        """A new vocabulary; its first entry is the noise."""
        drawn: set[str] = set()
        while len(drawn) < self.vocabulary_size:
            drawn.add("".join(self.draws.random.choices(string.ascii_lowercase, k=6)))
        vocabulary = sorted(drawn)
        self.draws.private_shuffle(vocabulary)
        vocabulary[0] = "..."
        return vocabulary

    def probe(self, size: int, sample: list[str]) -> Prompt:
        ranks = np.arange(1, len(sample) + 1)
        counts = size * (ranks**-2.0) / (math.pi**2 / 6)
        words = [word for word, count in zip(sample, counts, strict=True) for _ in range(int(count))]
        self.draws.private_shuffle(words)
        text, offset = fill(FWE_TEMPLATE + FWE_PREFIX, " ".join(words))
        asked = sample[1:4]
        places: dict[str, list[Span]] = {word: [] for word in asked}
        at = offset
        for word in words:
            if word in places:
                places[word].append((at, at + len(word)))
            at += len(word) + 1
        return Prompt(text, tuple(asked), tuple(tuple(places[word]) for word in asked))
