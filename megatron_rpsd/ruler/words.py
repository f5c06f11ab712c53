"""RULER's words: those of the package wonderwords, 3.0.1, and all their adjective-noun pairs without building them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from importlib import resources
from itertools import accumulate

# SHA-256 of the sorted distinct nouns, adjectives and verbs of 3.0.1, a newline between two.
WORDS_SHA256 = "393572555cfe9c15fd065aa9df0e9e91368cff81418b4d78025e9a4f57fe2ac4"
VERSION = "3.0.1"


@cache
def word_lists() -> dict[str, list[str]]:
    """noun, adjective and verb lists, in the files' order; ValueError when they are absent or another version's."""
    try:
        assets = resources.files("wonderwords") / "assets"
    except ModuleNotFoundError:
        raise ValueError(f"RULER's words need wonderwords: pip install wonderwords=={VERSION}") from None
    # Blanks behind a word are no part of it; blank lines there are none.
    lists = {
        kind: [line.rstrip() for line in (assets / f"{kind}list.txt").read_text(encoding="utf-8").splitlines()]
        for kind in ("noun", "adjective", "verb")
    }
    found = hashlib.sha256("\n".join(sorted(set().union(*lists.values()))).encode()).hexdigest()
    if found != WORDS_SHA256:
        raise ValueError(f"other words give other samples: pip install wonderwords=={VERSION}")
    return lists


@cache
def all_words() -> tuple[str, ...]:
    """Every distinct word, sorted: what CWE shuffles."""
    return tuple(sorted(set().union(*word_lists().values())))


class WordPairs(Sequence):
    """The sorted distinct "adjective-noun" strings, 6,171,620 of them, found by index in a few lists.

    All pairs of one adjective stand together, in the nouns' order, unless "adjective-" begins another adjective
    ("well-", "well-to-do-"): such adjectives form one group, whose pairs are written out and sorted.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        groups: list[list[str]] = []
        for stem in sorted({f"{adjective}-" for adjective in adjectives}):
            if groups and stem.startswith(groups[-1][0]):
                groups[-1].append(stem)
            else:
                groups.append([stem])
        self._groups: list[str | list[str]] = [
            group[0] if len(group) == 1 else sorted({stem + noun for stem in group for noun in self._nouns})
            for group in groups
        ]
        sizes = (len(self._nouns) if isinstance(group, str) else len(group) for group in self._groups)
        self._stops = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect_right(self._stops, index)
        group = self._groups[place]
        inside = index - (self._stops[place - 1] if place else 0)
        return group + self._nouns[inside] if isinstance(group, str) else group[inside]


@cache
def word_pairs() -> WordPairs:
    """What NIAH's word keys are drawn from."""
    lists = word_lists()
    return WordPairs(lists["adjective"], lists["noun"])
