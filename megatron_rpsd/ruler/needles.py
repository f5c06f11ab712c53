"""NIAH: needles in essays, in one repeated sentence, or among other needles."""

from __future__ import annotations

import uuid
from typing import Any

from megatron_rpsd.ruler.prompts import Draws, Family, Prompt, Span, fill, join_parts, shift
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

    def _draw(self, kind: str) -> str:
        stream = self.draws.random
        if kind == "words":
            return stream.choice(word_pairs())
        if kind == "numbers":
            return str(stream.randint(1_000_000, 9_999_999))
        return str(uuid.UUID(int=stream.getrandbits(128), version=4))

    def probe(self, size: int, sample: Any) -> Prompt:
        task, stream = self.task, self.draws.random
        keys, values, needles = [], [], []
        for number in range(task.num_keys):
            keys.append(self._draw(task.keys))
            values.append([self._draw(task.values) for _ in range(task.num_values)])
            for which, value in enumerate(values[-1]):
                needles.append(((number, which), NEEDLE.format(values=task.values, key=keys[-1], value=value)))
        self.draws.private_shuffle(needles)
        sentences = [sentence for _, sentence in needles]
        context, spans = self._in_essay(size, sentences) if self.essay_words else self._in_lines(size, sentences)
        asked = stream.sample(range(task.num_keys), task.num_queries)
        outputs = tuple(value for number in asked for value in values[number])
        text, offset = _question(task, context, [keys[number] for number in asked])
        place = {names: span for (names, _), span in zip(needles, shift(spans, offset), strict=True)}
        evidence = tuple((place[number, which],) for number in asked for which in range(task.num_values))
        return Prompt(text, outputs, evidence)

    def _in_essay(self, size: int, needles: list[str]) -> tuple[str, list[Span]]:
        words = self.essay_words
        if size > len(words):
            words = words * -(-size // len(words))
        sentences = english_sentences(" ".join(words[:size]).strip())
        depths = self.draws.random.sample(DEPTHS, len(needles))
        cuts = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
        parts = []
        for number, needle in enumerate(needles):
            parts += [" ".join(sentences[cuts[number] : cuts[number + 1]]), needle]
        parts.append(" ".join(sentences[cuts[-2] :]))
        context, starts = join_parts(parts, " ")
        return context, [(start, start + len(needle)) for start, needle in zip(starts[1::2], needles, strict=True)]

    def _in_lines(self, size: int, needles: list[str]) -> tuple[str, list[Span]]:
        task = self.task
        if task.source == "noise":
            lines = [NOISE] * size
        else:
            lines = [
                NEEDLE.format(values=task.values, key=self._draw(task.keys), value=self._draw(task.values))
                for _ in range(size)
            ]
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
