"""Three engines without a model whose scores are known beforehand: a check of prompts, scoring and reports."""

from __future__ import annotations

import random
import re
import string
import uuid
from collections.abc import Iterator, Sequence

from megatron_rpsd.evaluation.engines.base import Completion, Engine
from megatron_rpsd.evaluation.samples import Evidence, Sample
from megatron_rpsd.ruler.words import all_words

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _known(outputs: Sequence[str]) -> Completion:
    return Completion(" " + ", ".join(outputs), 0, "stop")


class Oracle(Engine):
    """Knows every answer: 100 on every task."""

    name = "oracle"

    def describe(self) -> dict:
        return {"name": self.name}

    def complete(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Completion]]:
        for sample in samples:
            yield sample, _known(sample.outputs)


def _draw_like(reference: str, stream: random.Random) -> str:
    """Something of the reference's kind: a number or coded word of its length, a UUID, or a word."""
    if reference.isdigit():
        return str(stream.randint(10 ** (len(reference) - 1), 10 ** len(reference) - 1))
    if _UUID.fullmatch(reference):
        return str(uuid.UUID(int=stream.getrandbits(128), version=4))
    if len(reference) in (5, 6) and reference.isalpha() and reference.isupper():
        return "".join(stream.choices(string.ascii_uppercase, k=len(reference)))
    return stream.choice(all_words())


class RandomAnswers(Engine):
    """Answers of the right kind, drawn from (seed, sample id) without reading the prompt: about 0 on every task."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def describe(self) -> dict:
        return {"name": self.name, "seed": self.seed}

    def complete(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Completion]]:
        for sample in samples:
            stream = random.Random(f"{self.seed} {sample.id}")
            yield sample, _known([_draw_like(reference, stream) for reference in sample.outputs])


def evidence_position(evidence: Evidence, sample: Sample) -> float | None:
    """Where the evidence begins, as a share of the prompt's tokens from 0 to 1, in grids its depth; None: no place."""
    if sample.depth is not None:
        return sample.depth
    return evidence.tokens[0][0] / sample.prompt_tokens if evidence.tokens else None


class Blind(Engine):
    """Knows every answer but those whose evidence begins in [low, high) of the prompt: a hole of known place."""

    name = "blind"

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    @classmethod
    def parse(cls, given: str) -> Blind:
        """From "LOW-HIGH", two shares of the prompt; ValueError unless 0 <= LOW < HIGH <= 1."""
        match = re.fullmatch(r"(\d*\.?\d+)-(\d*\.?\d+)", given)
        if not match or not 0 <= float(match[1]) < float(match[2]) <= 1:
            raise ValueError(f"--backend blind:{given}: give two shares of the prompt, as in blind:0.33-0.67")
        return cls(float(match[1]), float(match[2]))

    def describe(self) -> dict:
        return {"name": self.name, "low": self.low, "high": self.high}

    def sees(self, evidence: Evidence, sample: Sample) -> bool:
        """Whether the evidence lies outside of the hole."""
        position = evidence_position(evidence, sample)
        return position is None or not self.low <= position < self.high

    def complete(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Completion]]:
        for sample in samples:
            yield sample, _known([e.reference for e in sample.evidence if self.sees(e, sample)])
