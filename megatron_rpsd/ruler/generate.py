"""A task's JSONL as RULER writes it, and beside it where the evidence stands and what everything was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from tokenizers import Encoding

from megatron_rpsd.data.staging import staging_folder
from megatron_rpsd.ruler.chains import EXAMPLE_LENGTH, Chains, solved_example
from megatron_rpsd.ruler.counting import TokenCounter, token_spans
from megatron_rpsd.ruler.fitting import fitting_samples, search_size
from megatron_rpsd.ruler.frequencies import CommonWords, FrequentWords
from megatron_rpsd.ruler.needles import Needles
from megatron_rpsd.ruler.prompts import Draws, Family, Prompt
from megatron_rpsd.ruler.questions import Questions
from megatron_rpsd.ruler.sources import Sources
from megatron_rpsd.ruler.synthetic import SyntheticSources
from megatron_rpsd.ruler.tasks import DIALECT, EDITION, SYNTHETIC, Task


def make_family(
    task: Task, length: int, draws: Draws, counter: TokenCounter, sources: Sources | SyntheticSources
) -> Family:
    """The task at one length. VT draws its solved example here, as the first thing."""
    if task.family == "niah":
        return Needles(task, length, draws, sources)
    if task.family == "cwe":
        return CommonWords(task, length, draws, sources)
    if task.family == "fwe":
        return FrequentWords(task, length, draws)
    if task.family == "qa":
        return Questions(task, length, draws, sources)
    example = Chains(replace(task, generated_tokens=0), EXAMPLE_LENGTH, draws, None, 0)
    size = search_size(example, counter)
    prompt, _ = next(fitting_samples(example, counter, size, 1))
    solved = solved_example(prompt)
    return Chains(task, length, draws, solved, counter.count(solved))


def record(task: Task, index: int, prompt: Prompt, tokens: int, counter: TokenCounter) -> dict:
    """One line's fields, in RULER's order.

    NIAH's `index` is no sample number: RULER writes the character offset of the first reference there.
    """
    cut = prompt.text.rindex(task.prefix[:10])
    text = prompt.text[:cut]
    length = tokens + task.generated_tokens
    fields = {
        "index": index,
        "input": text,
        "outputs": list(prompt.outputs),
        "length": length,
        "length_w_model_temp": length,
        "answer_prefix": prompt.text[cut:],
    }
    if task.family == "niah":
        fields["index"] = text.find(prompt.outputs[0])
        fields["token_position_answer"] = counter.count(text[: fields["index"]])
    return fields


def evidence_record(name: str, index: int, prompt: Prompt, encoding: Encoding) -> dict:
    """Where the evidence of each reference stands, in input + answer_prefix, counted without special tokens."""
    return {
        "id": f"{name}/{index}",
        "sample": index,
        "prompt_tokens": len(encoding),
        "evidence": [
            {"reference": reference, "characters": list(spans), "tokens": token_spans(encoding, spans)}
            for reference, spans in zip(prompt.outputs, prompt.evidence, strict=True)
        ],
    }


def generate(
    task: Task,
    length: int,
    number: int,
    seed: int,
    counter: TokenCounter,
    sources: Sources | SyntheticSources,
    batch: int = 16,
) -> Iterator[tuple[dict, dict]]:
    """`number` pairs of RULER's record and the evidence record.

    Raises ValueError where a text is absent, or where a sample cannot fit: RULER's own generator never ends there.
    """
    if number < 1 or length < 1:
        raise ValueError(f"--num-samples {number} and --length {length} must be at least 1")
    family = make_family(task, length, Draws(seed), counter, sources)
    if family.max_samples is not None and number > family.max_samples:
        raise ValueError(f"--num-samples {number}: {task.name} has {family.max_samples} questions")
    name = f"{EDITION}/{task.name}/{length}/{seed}/{counter.sha256[:8]}"
    size = search_size(family, counter)
    for index, (prompt, encoding) in enumerate(fitting_samples(family, counter, size, number, batch)):
        yield record(task, index, prompt, len(encoding), counter), evidence_record(name, index, prompt, encoding)


def beside(output: Path, what: str) -> Path:
    """FILE.evidence.jsonl or FILE.manifest.json for FILE.jsonl."""
    return output.with_name(output.name.removesuffix(".jsonl") + what)


def write_task(
    task: Task,
    length: int,
    number: int,
    seed: int,
    tokenizer: Path,
    data_dir: Path | None,
    output: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> dict:
    """Writes FILE.jsonl, FILE.evidence.jsonl and FILE.manifest.json, whole or not at all; returns the manifest."""
    counter, digest = TokenCounter(tokenizer), hashlib.sha256()
    sources = SyntheticSources() if task.synthetic else Sources(data_dir)
    with staging_folder(output) as scratch:
        lines, evidence = scratch / output.name, scratch / "evidence"
        with lines.open("wb") as line_file, evidence.open("w", encoding="utf-8") as evidence_file:
            made = generate(task, length, number, seed, counter, sources)
            for done, (fields, where) in enumerate(made, start=1):
                line = (json.dumps(fields) + "\n").encode()
                digest.update(line)
                line_file.write(line)
                evidence_file.write(json.dumps(where) + "\n")
                progress(done)
        manifest = {
            "dialect": DIALECT + SYNTHETIC if task.synthetic else DIALECT,
            "edition": EDITION,
            "task": task.name,
            "metric": task.metric,
            "length": length,
            "generated_tokens": task.generated_tokens,
            "samples": number,
            "seed": seed,
            "tokenizer_sha256": counter.sha256,
            "sources_sha256": sources.used,
            "sha256": digest.hexdigest(),
        }
        (scratch / "manifest").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        output.parent.mkdir(parents=True, exist_ok=True)
        evidence.rename(beside(output, ".evidence.jsonl"))
        (scratch / "manifest").rename(beside(output, ".manifest.json"))
        lines.rename(output)
    return manifest
