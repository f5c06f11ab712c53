"""NIAH: needles in essays, in one repeated sentence, or among other needles."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_rpsd.ruler.prompts import Draws, Family, Layout, Prompt, Span, fill, join_parts, shift
from megatron_rpsd.ruler.sources import Sources, english_sentences
from megatron_rpsd.ruler.synthetic import SyntheticSources
from megatron_rpsd.ruler.tasks import NEEDLE, NIAH_PREFIX, NIAH_TEMPLATE, NOISE, Task
from megatron_rpsd.ruler.words import word_pairs

# 40 depths in percent, 0 to 100, rounded half to even.
DEPTHS = [round(100 * number / 39) for number in range(40)]
# Up to here the sentence splitter equals NLTK's on the essays; see DECISIONS.md.
PROVEN_ESSAY_WORDS = 329_500


class Needles(Family):
    def __init__(self, task: Task, length: int, draws: Draws, sources: Sources | SyntheticSources) -> None:
        super().__init__(task, length, draws)
        self.essay_words = sources.essay_words if task.source == "essay" else []
        self.step = 500 if task.source == "essay" else 5 if length < 4096 else 25
        self.unit = "words" if task.source == "essay" else "lines"

    def check_size(self, size: int) -> None:
        if self.task.source == "essay" and not self.task.synthetic and size > PROVEN_ESSAY_WORDS:
            raise ValueError(
                f"--length {self.length} needs {size} words of the essays; sentences beyond {PROVEN_ESSAY_WORDS} words "
                "are not proven equal to RULER's: take a shorter length or a noise or needle task"
            )

    def _drawer(self, kind: str) -> Callable[[], str]:
        """Draws one word, number or UUID at every call."""
        stream = self.draws.random
        if kind == "words":
            return partial(stream.choice, word_pairs())
        if kind == "numbers":
            return lambda: str(stream.randint(1_000_000, 9_999_999))
        return lambda: str(uuid.UUID(int=stream.getrandbits(128), version=4))

    def _draw_needles(self) -> tuple[list[str], list[list[str]], list[tuple[tuple[int, int], str]]]:
        """Keys, values of each, and the needles in the order they stand in, each behind the numbers of both."""
        task = self.task
        key, value = self._drawer(task.keys), self._drawer(task.values)
        keys, values, needles = [], [], []
        for number in range(task.num_keys):
            keys.append(key())
            values.append([value() for _ in range(task.num_values)])
            for which, drawn in enumerate(values[-1]):
                needles.append(((number, which), NEEDLE.format(values=task.values, key=keys[-1], value=drawn)))
        self.draws.private_shuffle(needles)
        return keys, values, needles

    def probe(self, size: int, sample: Any) -> Prompt:
        task = self.task
        keys, values, needles = self._draw_needles()
        sentences = [sentence for _, sentence in needles]
        context, spans = self._in_essay(size, sentences) if self.essay_words else self._in_lines(size, sentences)
        asked = self.draws.random.sample(range(task.num_keys), task.num_queries)
        outputs = tuple(value for number in asked for value in values[number])
        text, offset = _question(task, context, [keys[number] for number in asked])
        place = {names: span for (names, _), span in zip(needles, shift(spans, offset), strict=True)}
        evidence = tuple((place[number, which],) for number in asked for which in range(task.num_values))
        return Prompt(text, outputs, evidence)

    def layout(self, size: int) -> Layout:
        """One item of a position grid: the needles asked for move together, all others keep their places."""
        task, stream = self.task, self.draws.random
        keys, values, needles = self._draw_needles()
        asked = stream.sample(range(task.num_keys), task.num_queries)
        moving = [(number, which) for number in asked for which in range(task.num_values)]
        sentences = dict(needles)
        units = self._sentences(size) if self.essay_words else self._lines(size)
        for names, sentence in needles:
            if names not in moving:
                units.insert(stream.randrange(len(units) + 1), sentence)
        queries = [keys[number] for number in asked]
        return Layout(
            units,
            [sentences[names] for names in moving],
            " " if self.essay_words else "\n",
            lambda context: _question(task, context, queries),
            tuple(values[number][which] for number, which in moving),
        )

    def essay(self, size: int) -> list[str]:
        """The first words of the essays, over again where they end."""
        words = self.essay_words
        return (words * -(-size // len(words)))[:size] if size > len(words) else words[:size]

    def _sentences(self, size: int) -> list[str]:
        return list(english_sentences(" ".join(self.essay(size)).strip()))

    def _in_essay(self, size: int, needles: list[str]) -> tuple[str, list[Span]]:
        sentences = self._sentences(size)
        depths = self.draws.random.sample(DEPTHS, len(needles))
        cuts = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
        parts = []
        for number, needle in enumerate(needles):
            parts += [" ".join(sentences[cuts[number] : cuts[number + 1]]), needle]
        parts.append(" ".join(sentences[cuts[-2] :]))
        context, starts = join_parts(parts, " ")
        return context, [(start, start + len(needle)) for start, needle in zip(starts[1::2], needles, strict=True)]

    def _lines(self, size: int) -> list[str]:
        task = self.task
        if task.source == "noise":
            return [NOISE] * size
        line = NEEDLE.format(values=task.values, key="{}", value="{}").format
        key, value = self._drawer(task.keys), self._drawer(task.values)
        return [line(key(), value()) for _ in range(size)]

    def _in_lines(self, size: int, needles: list[str]) -> tuple[str, list[Span]]:
        lines = self._lines(size)
        where = sorted(self.draws.random.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(where, needles, strict=True):
            lines.insert(place, needle)
        context, starts = join_parts(lines, "\n")
        # Each later insertion lies before, and pushes the earlier ones one line on.
        final = [starts[place + len(needles) - 1 - number] for number, place in enumerate(where)]
        return context, [(start, start + len(needle)) for start, needle in zip(final, needles, strict=True)]


def _question(task: Task, context: str, keys: list[str]) -> tuple[str, int]:
    """The whole prompt, and where the context starts."""
    template, values = NIAH_TEMPLATE + NIAH_PREFIX, task.values
    if task.num_queries * task.num_values == 1:
        for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
            template = template.replace(plural, singular)
        values = values[:-1]
    query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
    return fill(template, context, values=values, query=query)
