"""VT: chains of variable assignments in one repeated sentence, behind one solved example."""

from __future__ import annotations

import string
from typing import Any

from megatron_rpsd.ruler.prompts import Draws, Family, Layout, Prompt, fill, join_parts, shift
from megatron_rpsd.ruler.tasks import NOISE, VT_TEMPLATE, Task

HOPS = 4
EXAMPLE_LENGTH, EXAMPLE_VALUE = 500, "12345"


def letters(draws: Draws, count: int) -> str:
    return "".join(draws.random.choices(string.ascii_uppercase, k=count))


class Chains(Family):
    """Without `example` the solved example itself: 500 tokens, three-letter names, the value 12345."""

    unit, separator = "lines", "\n"

    def __init__(self, task: Task, length: int, draws: Draws, example: str | None, example_tokens: int) -> None:
        super().__init__(task, length, draws)
        self.example, self.extra_tokens = example, example_tokens
        if example is None:
            self.refusal = f"this --tokenizer cannot make vt's solved example of {length} tokens"
        self.step = 5 if example is None or length < 4096 else 10

    def _draw_chain(self) -> tuple[list[str], list[str], str] | None:
        """Five names, the links from one to the next, and the value; None where RULER fails on the names."""
        draws, solved = self.draws, self.example is None
        names = [letters(draws, 3 if solved else 5) for _ in range(HOPS + 1)]
        while len(set(names)) < HOPS + 1:
            names.append(letters(draws, 3 if solved else 5))
        # RULER makes a chain of the names beyond the fifth, draws its value and fails on it.
        values = [self._draw_value() for _ in names[:: HOPS + 1]]
        if len(names) > HOPS + 1:
            return None
        chain = [f"VAR {names[0]} = {values[0]}"]
        chain += [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:], strict=False)]
        return names, chain, values[0]

    def _draw_value(self) -> str:
        return EXAMPLE_VALUE if self.example is None else str(self.draws.legacy.randint(10000, 99999))

    def probe(self, size: int, sample: Any) -> Prompt | None:
        drawn = self._draw_chain()
        if drawn is None:
            return None
        names, chain, value = drawn
        lines = self._noise(size)
        places = sorted(self.draws.random.sample(range(len(lines)), len(chain)))
        for number, (place, link) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + number, link)
        context, starts = join_parts(lines, self.separator)
        first = [starts[place + number] for number, place in enumerate(places)]
        text, offset = self._fill(context, value)
        spans = shift(((start, start + len(link.rstrip())) for start, link in zip(first, chain, strict=True)), offset)
        return Prompt(text, tuple(names), tuple((span,) for span in spans))

    def layout(self, size: int) -> Layout:
        """One item of a position grid: the whole chain moves."""
        while (drawn := self._draw_chain()) is None:
            pass
        names, chain, value = drawn
        before = self._renamed_example() + "\n"

        def whole(context: str) -> tuple[str, int]:
            text, offset = self._fill(context, value)
            return before + text, len(before) + offset

        return Layout(self._noise(size), chain, self.separator, whole, tuple(names))

    def _noise(self, size: int) -> list[str]:
        return [NOISE] * size

    def _fill(self, context: str, value: str) -> tuple[str, int]:
        return fill(VT_TEMPLATE + self.task.prefix, context, query=value, count=str(HOPS + 1))

    def build(self, size: int, sample: Any) -> Prompt | None:
        prompt = self.probe(size, sample)
        if prompt is None or self.example is None:
            return prompt
        before = self._renamed_example() + "\n"
        return Prompt(before + prompt.text, prompt.outputs, tuple(shift(s, len(before)) for s in prompt.evidence))

    def _renamed_example(self) -> str:
        text = self.example
        for name in text.strip().split()[-HOPS - 1 :]:
            text = text.replace(name, letters(self.draws, len(name)))
        return text.replace(EXAMPLE_VALUE, str(self.draws.legacy.randint(10000, 99999)))


def solved_example(prompt: Prompt) -> str:
    """The example as it stands before a prompt: itself, its answer, and the end of the line."""
    return prompt.text + " " + " ".join(prompt.outputs) + "\n"
