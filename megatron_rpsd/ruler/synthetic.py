"""Texts for machines that have none of RULER's: made-up prose, paragraphs and questions, the same everywhere.

Tasks that read them carry @synthetic in their names: their scores are no RULER scores and never enter its averages.
"""

from __future__ import annotations

import hashlib
import json
import random
from functools import cached_property
from itertools import product

from megatron_rpsd.ruler.words import word_lists

# Goes up with every change of a text.
VERSION = "1"
PROSE_WORDS = 120_000
ARTICLES, PARAGRAPHS = 300, 5
BRIDGES, DOCUMENTS = 600, 10
_ONSETS = "b br c d dr f fl g gr h k l m n p r s st t tr v w".split()
_RIMES = "a an ar e el en i in o on or u".split()
_FRAMES = (
    "The {0} {1} will {2} the {3}.",
    "Nobody could {2} a {0} {1} before the {3} came.",
    "Near the {3} there was a {0} {1}, and it did {2}.",
    "A {1} and a {3} seldom {2} when the day is {0}.",
    "If the {1} is {0}, then {2} it and leave the {3} alone.",
)


class _Writer:
    """Sentences and names from one seeded stream, drawn by methods whose results no Python version changes."""

    def __init__(self, seed: str) -> None:
        self.stream = random.Random(seed)
        lists = word_lists()
        # Words that could end a sentence early or start it anew are left out.
        self.words = {
            kind: [word for word in words if word.isalpha() and word.islower()] for kind, words in lists.items()
        }

    def sentence(self) -> str:
        pick = self.stream.choice
        noun, adjective, verb = (self.words[kind] for kind in ("noun", "adjective", "verb"))
        return pick(_FRAMES).format(pick(adjective), pick(noun), pick(verb), pick(noun))

    def sentences(self, number: int) -> list[str]:
        return [self.sentence() for _ in range(number)]

    def names(self, number: int) -> list[str]:
        """Different invented names of three syllables."""
        syllables = [onset + rime for onset, rime in product(_ONSETS, _RIMES)]
        found: dict[str, None] = {}
        while len(found) < number:
            found["".join(self.stream.choice(syllables) for _ in range(3)).capitalize()] = None
        return list(found)


class SyntheticSources:
    """The same properties as `Sources`, and the same layouts."""

    def __init__(self) -> None:
        self.used: dict[str, str] = {}

    def _note(self, name: str, content: object) -> None:
        self.used[name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def essay_words(self) -> list[str]:
        writer, words = _Writer("prose"), []
        while len(words) < PROSE_WORDS:
            words += writer.sentence().split(" ")
        self._note("synthetic prose", words)
        return words

    @cached_property
    def squad(self) -> dict:
        """One person and one place a paragraph; every question has its answer in one paragraph alone."""
        writer = _Writer("paragraphs")
        names = iter(writer.names(2 * ARTICLES * PARAGRAPHS))
        articles = []
        for _ in range(ARTICLES):
            paragraphs = []
            for _ in range(PARAGRAPHS):
                person, place = next(names), next(names)
                before, after = writer.sentences(writer.stream.randint(3, 7)), writer.sentences(5)
                question = {
                    "question": f"Where was {person} born?",
                    "answers": [{"text": place}],
                    "is_impossible": False,
                }
                context = " ".join([*before, f"{person} was born in {place}.", *after])
                paragraphs.append({"context": context, "qas": [question]})
            articles.append({"paragraphs": paragraphs})
        self._note("synthetic paragraphs", articles)
        return {"data": articles}

    @cached_property
    def hotpotqa(self) -> list[dict]:
        """Questions over two documents: a person's names a town, and the town's names a river."""
        writer = _Writer("bridges")
        names = iter(writer.names(3 * BRIDGES * DOCUMENTS // 2))
        items = []
        for _ in range(BRIDGES):
            context = []
            for _ in range(DOCUMENTS // 2):
                person, town, river = next(names), next(names), next(names)
                context.append([person, [f"{person} grew up in {town}. ", " ".join(writer.sentences(4))]])
                context.append([town, [f"{town} lies on the river {river}. ", " ".join(writer.sentences(4))]])
            person, town = context[0][0], context[1][0]
            river = context[1][1][0].removesuffix(". ").rsplit(" ", 1)[1]
            question = f"On which river lies the town where {person} grew up?"
            facts = [[person, 0], [town, 0]]
            items.append({"question": question, "answer": river, "context": context, "supporting_facts": facts})
        self._note("synthetic bridges", items)
        return items
