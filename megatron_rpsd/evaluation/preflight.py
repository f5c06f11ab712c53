"""What is checked and said before anything is computed: fit, tokenizer, BOS, vocabulary, disk and cost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rpsd.evaluation.engines.base import Engine
from megatron_rpsd.evaluation.engines.model_facts import ModelFacts, file_sha256
from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from megatron_rpsd.evaluation.samples import Sample, load_prepared

PROMPT_BYTES = 6
"""Of a prepared file, per token of prompt, generously: text, evidence, JSON."""
_STEPS = 8
"""Generated tokens that a warm-up times, beyond the first."""


@dataclass(frozen=True)
class Cell:
    """One prepared file, without its prompts.

    Attributes:
        samples: their number.
        prompt_tokens: of all prompts, a BOS before each counted where there is one.
        flops: of reading all prompts; 0 where no model is known.
        bos: whether a BOS is put before each prompt.
        bos_in_text: whether the prompts begin with one already.
        first: one of the samples.
    """

    path: Path
    name: str
    manifest: dict
    samples: int
    prompt_tokens: int
    flops: float
    bos: bool
    bos_in_text: bool
    first: Sample

    @property
    def length(self) -> int:
        return self.manifest["length"]

    @property
    def generated_tokens(self) -> int:
        """Most tokens of all answers."""
        return self.samples * self.manifest["generated_tokens"]


def measure(path: Path, tokens: PromptTokens | None, facts: ModelFacts | None) -> Cell:
    """Read one prepared file; ValueError where it is damaged or a prompt is longer than its budget."""
    prepared = load_prepared(path)
    for sample in prepared.samples:
        if sample.prompt_tokens + sample.generated_tokens > sample.length:
            raise ValueError(
                f"{path}: {sample.id} has {sample.prompt_tokens} + {sample.generated_tokens} tokens, more than "
                f"{sample.length}: it would be cut; prepare it again"
            )
    first = prepared.samples[0]
    bos = tokens is not None and tokens.adds_bos(first.prompt)
    counts = [sample.prompt_tokens + bos for sample in prepared.samples]
    return Cell(
        path, prepared.name, prepared.manifest, len(counts), sum(counts),
        sum(map(facts.flops, counts)) if facts else 0.0, bos,
        tokens is not None and tokens.begins_with_bos(first.prompt), first,
    )  # fmt: skip


def check_alike(cells: Sequence[Cell]) -> None:
    """ValueError where files of one run are of two editions, seeds, tokenizers or templates, or one is there twice."""
    for cell in cells:
        for key in ("edition", "seed", "tokenizer_sha256", "model_template", "template_sha256"):
            absent = "base" if key == "model_template" else None
            ours, theirs = (one.manifest.get(key, absent) for one in (cells[0], cell))
            if ours != theirs:
                raise ValueError(
                    f"{cells[0].path} has {key} {ours}, {cell.path} has {theirs}: evaluate them apart, each "
                    "with its --output"
                )
    names = [cell.name for cell in cells]
    twice = [cell for cell in cells if names.count(cell.name) > 1]
    if twice:
        raise ValueError(f"{twice[0].path} and {twice[1].path} are of the same task and length")


def check_window(facts: ModelFacts, factor: float | None, longest: int) -> str:
    """One line; ValueError where `longest` tokens are more than the model takes."""
    window = int(facts.window * (factor or 1))
    yarn = f" x YaRN {factor:g} = {window}" if factor else ""
    if longest > window:
        way = "a larger --yarn-factor, or auto" if facts.rope_type == "default" else "shorter --lengths"
        raise ValueError(
            f"--lengths {longest}: more than the model's window of {facts.window}{yarn} tokens by "
            f"{longest - window}; use {way}"
        )
    scaled = f", rope_type {facts.rope_type}" if facts.rope_type != "default" else ""
    return f"window      {facts.window}{yarn} tokens{scaled}; longest length {longest}"


def check_disk(folder: Path, needed: int) -> None:
    """ValueError where the disk of `folder` has less than `needed` bytes."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(f"{folder}: about {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def check_tokens(cells: Sequence[Cell], tokens: PromptTokens, facts: ModelFacts | None) -> list[str]:
    """Lines about tokenizer, vocabulary and BOS; ValueError where prompts and model do not go together."""
    ours = tokens.counter.sha256
    own = facts.folder / "tokenizer.json" if facts else None
    if own and own.is_file() and file_sha256(own) != ours:
        raise ValueError(
            f"--tokenizer {tokens.folder}: its tokenizer.json ({ours[:12]}) is not the model's "
            f"({file_sha256(own)[:12]}): the model would read other tokens; leave --tokenizer out"
        )
    for cell in cells:
        theirs = cell.manifest["tokenizer_sha256"]
        if theirs != ours:
            raise ValueError(
                f"{cell.path} was prepared with tokenizer {theirs[:12]}, the model's is {ours[:12]}: lengths and "
                "samples depend on it; prepare the prompts again"
            )
        tokens.prompt_ids(cell.first)  # ValueError where the count differs
        if cell.bos_in_text and tokens.bos == "add":
            raise ValueError(
                f"--bos add: {cell.path} begins with the BOS already, by its model template; two would cost tens of "
                "points; use --bos auto"
            )
    lines = [f"tokenizer   {ours[:12]}, the one that the prompts were counted with"]
    if facts:
        size = facts.config.vocab_size
        if tokens.vocab_size > size:
            raise ValueError(
                f"the tokenizer has ids up to {tokens.vocab_size - 1}, the model {size} embeddings: they do not belong "
                "together"
            )
        lines.append(f"vocabulary  ids up to {tokens.vocab_size - 1}, {size} embeddings")
    return [*lines, f"BOS         {_bos_line(cells, tokens)}"]


def bos_count(cells: Sequence[Cell]) -> str:
    """`one` or `none`: what every prompt begins with; ValueError where prompts differ."""
    found = {cell.bos or cell.bos_in_text for cell in cells}
    if len(found) > 1:
        raise ValueError("some prompts begin with a BOS and some do not: evaluate their model templates apart")
    return "one" if found == {True} else "none"


def _bos_line(cells: Sequence[Cell], tokens: PromptTokens) -> str:
    if bos_count(cells) == "none":
        return "none"
    if cells[0].bos_in_text:
        return "one, in the prompts' own text" + "; the tokenizer's is not added" * tokens.added_by_tokenizer
    return "one, put before every prompt"


@dataclass(frozen=True)
class Rate:
    """What a warm-up measured.

    Attributes:
        tokens: of its prompt.
        prefill: seconds to read it.
        step: seconds of one generated token.
    """

    tokens: int
    prefill: float
    step: float


def warm_up(engine: Engine, tokens: PromptTokens, sample: Sample, wanted: int) -> Rate:
    """Time the first `wanted` tokens of a sample's prompt, after one untimed call."""
    share = min(1.0, wanted / sample.prompt_tokens)
    text = sample.prompt[: int(len(sample.prompt) * share)]
    short = replace(sample, prompt=text, prompt_tokens=tokens.counter.count(text))
    seconds = []
    for steps in (1, 1, 1 + _STEPS):
        begun = time.perf_counter()
        ((_, answer),) = engine.complete([replace(short, generated_tokens=steps)])
        seconds.append(time.perf_counter() - begun)
    # An answer may end before its limit; the token that ended it was computed too.
    more = max(1, answer.tokens - (answer.finish == "length"))
    return Rate(short.prompt_tokens, seconds[1], max(0.0, seconds[2] - seconds[1]) / more)


@dataclass(frozen=True)
class Cost:
    """What is still to be computed of all samples of one length."""

    length: int
    prompts: int
    prompt_tokens: int
    generated_tokens: int
    flops: float
    seconds: float | None


def costs(
    cells: Sequence[Cell], done: Sequence[int], rate: Rate | None, facts: ModelFacts | None, parallel: int = 1
) -> list[Cost]:
    """A row for each length.

    Reading takes the warm-up's operations a second, or where no model is known its tokens a second; every answer is
    taken to be as long as allowed, at the warm-up's seconds a token: with a long cache a token takes longer, with a
    batch or a short answer all takes less.

    Args:
        done: samples of each cell that are answered already.
        parallel: requests under way at once.
    """
    rows = []
    for length in sorted({cell.length for cell in cells}):
        prompts = read = written = 0
        flops = seconds = 0.0
        for cell, answered in zip(cells, done, strict=True):
            if cell.length != length:
                continue
            left = max(0, cell.samples - answered)
            share = left / cell.samples
            prompts += left
            read += round(cell.prompt_tokens * share)
            written += round(cell.generated_tokens * share)
            flops += cell.flops * share
        if rate is not None:
            reading = flops / facts.flops(rate.tokens) if facts else read / rate.tokens
            seconds = (reading * rate.prefill + written * rate.step) / parallel
        rows.append(Cost(length, prompts, read, written, flops, seconds if rate else None))
    return rows
