"""Edition 2024-12, as the package nvidia-long-context-eval 26.3 makes it: where it differs from 2025-07.

The size is searched upwards a step at a time, with the answer's text behind the prompt; the answer's prefix is a part
of `input`; texts end where they are exhausted. FWE keeps nothing free for the answer, and VT is counted before its
solved example is renamed, so prompt and answer of both can be longer than the length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_rpsd.ruler.chains import EXAMPLE_LENGTH, Chains, letters, solved_example
from megatron_rpsd.ruler.counting import TokenCounter
from megatron_rpsd.ruler.fitting import Sample, fitting_samples, probe_counter, refuse, search_size
from megatron_rpsd.ruler.frequencies import CommonWords, FrequentWords, numbered
from megatron_rpsd.ruler.needles import Needles
from megatron_rpsd.ruler.prompts import Draws, Family, Prompt, shift
from megatron_rpsd.ruler.questions import Question, Questions
from megatron_rpsd.ruler.tasks import NOISE, Task

# The prefix's misspelling is the protocol's.
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {query}, they are: "
)


class EarlyNeedles(Needles):
    def essay(self, size: int) -> list[str]:
        return self.essay_words[:size]

    def tail(self, prompt: Prompt) -> str:
        return " ".join(prompt.outputs)

    def after(self, size: int) -> tuple[int, bool]:
        """The size tried next and whether the search goes on; the essays' end is noticed a step late."""
        beyond = self.task.source == "essay" and size > len(self.essay_words)
        return (len(self.essay_words), False) if beyond else (size + self.step, True)


class EarlyChains(Chains):
    """Lines end with their own line break and are joined by a blank. The example's value is drawn, too."""

    separator = " "

    def __init__(self, task: Task, length: int, draws: Draws, example: str | None, example_tokens: int) -> None:
        super().__init__(task, length, draws, example, example_tokens)
        self.sample_extra_tokens = example_tokens
        self.step = 5 if example is None else 10

    def _draw_value(self) -> str:
        return str(self.draws.legacy.randint(10000, 99999))

    def _noise(self, size: int) -> list[str]:
        lines = [NOISE + "\n"] * size
        if size > 5:
            return lines
        # Too few for a chain: cut into sentences.
        parts = [part for line in lines for part in line.split(".")]
        return [part + "." if part.strip() else part for part in parts]

    def probe(self, size: int, sample: Any) -> Prompt | None:
        prompt = super().probe(size, sample)
        # Only the short form has a full stop and a blank before a line break; each such blank is removed.
        return prompt and _without_blanks(prompt)

    def build(self, size: int, sample: Any) -> Prompt | None:
        return self.probe(size, sample)

    def finish(self, prompt: Prompt) -> Prompt:
        if self.example is None:
            return prompt
        text = self.example
        for name in text[text.index("they are: ") + 10 :].split():
            text = text.replace(name, letters(self.draws, len(name)))
        before = " " + text + "\n\n"
        return Prompt(before + prompt.text, prompt.outputs, tuple(shift(s, len(before)) for s in prompt.evidence))

    def smaller(self, size: int) -> int | None:
        return size

    def tail(self, prompt: Prompt) -> str:
        return f" {list(prompt.outputs)}"

    def after(self, size: int) -> tuple[int, bool]:
        return size + self.step, True


def _without_blanks(prompt: Prompt) -> Prompt:
    pieces = prompt.text.split(". \n")
    if len(pieces) == 1:
        return prompt
    removed, at = [], -3
    for piece in pieces[:-1]:
        at += len(piece) + 3
        removed.append(at + 1)
    moved = [
        tuple((start - sum(r < start for r in removed), stop - sum(r < stop for r in removed)) for start, stop in spans)
        for spans in prompt.evidence
    ]
    return Prompt(".\n".join(pieces), prompt.outputs, tuple(moved))


class EarlyCommonWords(CommonWords):
    example_joint = ""

    def tail(self, prompt: Prompt) -> str:
        return " " + numbered(prompt.outputs)

    def after(self, size: int) -> tuple[int, bool]:
        size += self.step
        return (size, True) if size <= len(self.words) else (len(self.words), False)


class EarlyQuestions(Questions):
    """A prompt of all documents shuffles the documents themselves, which every later prompt takes as they then lie."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.order = list(range(len(self.documents)))

    def arrange(self, size: int, question: Question) -> list[int]:
        if size >= len(self.order):
            self.draws.private_shuffle(self.order)
            return list(self.order)
        return [self.order[place] for place in super().arrange(size, question)]

    def tail(self, prompt: Prompt) -> str:
        return f" {list(prompt.outputs)}"

    def after(self, size: int) -> tuple[int, bool]:
        size += self.step
        return (size, True) if size <= len(self.documents) else (len(self.documents), False)


EARLY_KINDS = {"niah": EarlyNeedles, "cwe": EarlyCommonWords, "qa": EarlyQuestions}


def early_chains(task: Task, length: int, draws: Draws, counter: TokenCounter) -> EarlyChains:
    """VT, with its solved example drawn first."""
    task = replace(task, prefix=VT_PREFIX)
    example = EarlyChains(task, EXAMPLE_LENGTH, draws, None, 0)
    found = next(fitting_samples(example, counter, early_size(example, counter), 1, batch=1))
    solved = solved_example(found.prompt) + "\n"
    return EarlyChains(task, length, draws, solved, counter.count(solved))


def early_size(family: Family, counter: TokenCounter) -> int:
    """The search's result, a step at a time; ValueError where not even the first size fits."""
    if isinstance(family, FrequentWords):
        return search_size(family, counter)
    tokens = probe_counter(family, counter, family.tail)
    size, found, going = family.step, 0, True
    while going and (not found or found + family.reserved < family.length):
        found = tokens(size)
        if not family.fits(found):
            size -= family.step
            break
        size, going = family.after(size)
    if size < family.step:
        raise refuse(family, family.step, found)
    family.check_size(size)
    return size


def early_record(index: int, sample: Sample, task: Task) -> dict:
    """One line's fields, in the edition's order."""
    length = sample.fitted + task.generated_tokens
    return {
        "index": index,
        "input": sample.prompt.text,
        "outputs": list(sample.prompt.outputs),
        "length": length,
    }
