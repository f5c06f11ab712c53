"""Samples for engines: short prompts of RULER's words, with references and where their evidence stands."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from megatron_rpsd.evaluation.samples import Evidence, Sample

PREFIX = " The special magic number for key mentioned in the provided text is"


def question(
    number: int = 0, tokens: PromptTokens | None = None, noise: int = 2, generated: int = 12, **changed
) -> Sample:
    """A needle between `noise` sentences, and its question; counted in `tokens` where given."""
    value = str(1234567 + number)
    text = (
        "The grass is green. " * noise + f"One of the special magic numbers for key is: {value}. Here we go." + PREFIX
    )
    count = tokens.counter.count(text) if tokens else 40
    evidence = (Evidence(value, ((20 * noise, 20 * noise + 50),), ((number, number + 3),)),)
    sample = Sample(
        f"x/niah_single_1/64/{number}", "niah_single_1", 4096, number, text, PREFIX, (value,), count, generated, "all",
        evidence,
    )  # fmt: skip
    return replace(sample, **changed)


def with_prompt(sample: Sample, prompt: str, tokens: PromptTokens) -> Sample:
    """The same question with another text before it."""
    return replace(sample, prompt=prompt, prompt_tokens=tokens.counter.count(prompt))
