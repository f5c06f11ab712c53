"""A task's JSONL as RULER writes it, and beside it where the evidence stands and what everything was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rpsd.data.staging import staging_folder
from megatron_rpsd.ruler.chains import EXAMPLE_LENGTH, Chains, solved_example
from megatron_rpsd.ruler.counting import TokenCounter
from megatron_rpsd.ruler.edition_2024 import EARLY_KINDS, early_chains, early_record, early_size
from megatron_rpsd.ruler.fitting import Sample, fitting_samples, grid_samples, refuse, search_size
from megatron_rpsd.ruler.frequencies import CommonWords, FrequentWords
from megatron_rpsd.ruler.needles import Needles
from megatron_rpsd.ruler.prompts import Draws, Family, ModelTemplate, prefix_place
from megatron_rpsd.ruler.questions import Questions, read_hotpotqa, read_questions
from megatron_rpsd.ruler.sources import Sources
from megatron_rpsd.ruler.synthetic import SyntheticSources
from megatron_rpsd.ruler.tasks import EARLY_EDITION, EDITION, Task
from megatron_rpsd.ruler.templates import model_template


@dataclass(frozen=True)
class Recipe:
    """What a file's prompts depend on, beside the tokenizer and the texts."""

    task: Task
    length: int
    """Tokens, those kept for the answer included."""
    samples: int
    """Samples; of a position grid, items."""
    seed: int = 42
    edition: str = EDITION
    model_template: str = "base"
    depths: tuple[float, ...] = ()
    """Of a position grid, shares of the haystack from 0 to 1; otherwise empty."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 1:
            raise ValueError(f"--num-samples {self.samples} and --length {self.length} must be at least 1")
        if self.edition == EARLY_EDITION and self.model_template != "base":
            raise ValueError(f"--edition {EARLY_EDITION} is written with --model-template base alone")
        if any(not 0 <= depth <= 1 for depth in self.depths) or sorted(set(self.depths)) != list(self.depths):
            typed = " ".join(f"{100 * depth:g}" for depth in self.depths)
            raise ValueError(f"--depths {typed}: give percent from 0 to 100, ascending")

    @property
    def name(self) -> str:
        return f"{self.task.name}-{self.length}"


_KINDS = {"niah": Needles, "cwe": CommonWords, "qa": Questions}


def make_family(recipe: Recipe, draws: Draws, counter: TokenCounter, sources: Sources | SyntheticSources) -> Family:
    """The task at one length. VT draws its solved example here, as the first thing."""
    task, length, early = recipe.task, recipe.length, recipe.edition == EARLY_EDITION
    kinds = EARLY_KINDS if early else _KINDS
    if task.family in ("niah", "cwe"):
        return kinds[task.family](task, length, draws, sources)
    if task.family == "qa":
        return kinds["qa"](task, length, draws, *read_questions(task, sources))
    if task.family == "fwe":
        return FrequentWords(task, length, draws, 0 if early else task.generated_tokens)
    if early:
        return early_chains(task, length, draws, counter)
    # RULER's own task, whose draws go on from one sample to the next, also where the task's samples are keyed.
    example = Chains(replace(task, name="vt", generated_tokens=0), EXAMPLE_LENGTH, draws, None, 0)
    size = search_size(example, counter)
    solved = solved_example(next(fitting_samples(example, counter, size, 1)).prompt)
    return Chains(task, length, draws, solved, counter.count(solved))


def _check_first_question(recipe: Recipe, counter: TokenCounter, sources: Sources, template: ModelTemplate) -> None:
    """ValueError where the first question's own documents do not fit. All of HotpotQA takes seconds to read."""
    documents, questions = read_hotpotqa([sources.first_hotpotqa_item()])
    # One more document, as a prompt of all documents would be arranged otherwise.
    family = Questions(recipe.task, recipe.length, Draws(recipe.seed), [*documents, ""], questions)
    family.template = template
    if len(documents) == family.step:
        prompt = family.wrap(family.build(family.step, family.start(0)))
        tokens = counter.count(prompt.text)
        if not family.fits(tokens):
            raise refuse(family, family.step, tokens)


def record(task: Task, index: int, sample: Sample) -> dict:
    """One line's fields, in RULER's order. Both lengths count everything, a chat template too.

    NIAH's `index` is no sample number: RULER writes the character offset of the first reference there.
    """
    prompt = sample.prompt
    cut = prefix_place(prompt.text, task.prefix)
    text = prompt.text[:cut]
    length = len(sample.tokens) + task.generated_tokens
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
        fields["token_position_answer"] = sample.tokens.before(fields["index"])
    return fields


def evidence_record(task: Task, name: str, index: int, sample: Sample) -> dict:
    """Where the evidence of each reference stands, in input + answer_prefix, counted without special tokens.

    Spans are half-open and ascending. FWE's references stand in thousands of places: of those the first and the last
    are written, and `occurrences` says how many there are. A position grid's records have `item` and `depth` (0 to 1),
    too, and a sample for which RULER's own generator would never have ended has `beyond_ruler`: its documents are the
    fewest possible.
    """
    prompt, label = sample.prompt, "{item}/{depth}".format(**sample.labels) if task.grid else index
    kept = [(spans[0], spans[-1]) if task.family == "fwe" else spans for spans in prompt.evidence]
    tokens = iter(sample.tokens.spans([span for spans in kept for span in spans]))
    return {
        "id": f"{name}/{label}",
        "sample": index,
        **sample.labels,
        "prompt_tokens": len(sample.tokens),
        "evidence": [
            {
                "reference": reference,
                "occurrences": len(everywhere),
                "characters": list(spans),
                "tokens": [next(tokens) for _ in spans],
            }
            for reference, everywhere, spans in zip(prompt.outputs, prompt.evidence, kept, strict=True)
        ],
    }


def generate(
    recipe: Recipe,
    counter: TokenCounter,
    sources: Sources | SyntheticSources,
    template: ModelTemplate | None = None,
    batch: int | None = None,
) -> Iterator[tuple[dict, dict]]:
    """Pairs of RULER's record and the evidence record, `samples` of them, or one for every item and depth.

    Raises ValueError where a text is absent, or where a sample cannot fit: RULER's own generator never ends there.
    """
    task, length, early = recipe.task, recipe.length, recipe.edition == EARLY_EDITION
    template = template or ModelTemplate()
    if task.source == "hotpotqa" and not task.synthetic:
        _check_first_question(recipe, counter, sources, template)
    family = make_family(recipe, Draws(recipe.seed), counter, sources)
    if family.max_samples is not None and recipe.samples > family.max_samples:
        raise ValueError(f"--num-samples {recipe.samples}: {task.name} has {family.max_samples} questions")
    family.template = template
    size = (early_size if early else search_size)(family, counter)
    if recipe.depths:
        found = grid_samples(family, counter, size, recipe.samples, recipe.depths)
    else:
        # Edition 2024-12 may rearrange QA's documents with every prompt, which cannot be taken back.
        found = fitting_samples(family, counter, size, recipe.samples, 1 if early else batch)
    chat = "" if recipe.model_template == "base" else f"/{recipe.model_template}"
    name = f"{recipe.edition}/{task.name}/{length}/{recipe.seed}/{counter.sha256[:8]}{chat}"
    for index, sample in enumerate(found):
        fields = early_record(index, sample, task) if early else record(task, index, sample)
        yield fields, evidence_record(task, name, index, sample)


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
    """`write_prompts` of a task's base prompts, edition 2025-07."""
    return write_prompts(Recipe(task, length, number, seed), tokenizer, data_dir, output, progress)


def write_prompts(
    recipe: Recipe,
    tokenizer: Path,
    data_dir: Path | None,
    output: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> dict:
    """Writes FILE.jsonl, FILE.evidence.jsonl and FILE.manifest.json, whole or not at all; returns the manifest."""
    counter, digest = TokenCounter(tokenizer), hashlib.sha256()
    template = model_template(recipe.model_template, tokenizer)
    sources = SyntheticSources() if recipe.task.synthetic else Sources(data_dir)
    longest = beyond = done = 0
    with staging_folder(output) as scratch:
        lines, evidence = scratch / output.name, scratch / "evidence"
        with lines.open("wb") as line_file, evidence.open("w", encoding="utf-8") as evidence_file:
            for done, (fields, where) in enumerate(generate(recipe, counter, sources, template), start=1):
                line = (json.dumps(fields) + "\n").encode()
                digest.update(line)
                line_file.write(line)
                evidence_file.write(json.dumps(where) + "\n")
                longest = max(longest, where["prompt_tokens"])
                beyond += where.get("beyond_ruler", False)
                progress(done)
        about = {
            "samples": done,
            "beyond_ruler": beyond,
            "longest_prompt_tokens": longest,
            "sha256": digest.hexdigest(),
        }
        manifest = _manifest(recipe, counter, template) | {"sources_sha256": sources.used} | about
        (scratch / "manifest").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        output.parent.mkdir(parents=True, exist_ok=True)
        evidence.rename(beside(output, ".evidence.jsonl"))
        (scratch / "manifest").rename(beside(output, ".manifest.json"))
        lines.rename(output)
    return manifest


def _manifest(recipe: Recipe, counter: TokenCounter, template: ModelTemplate) -> dict:
    """`counted` says how tokens were counted, `template_has_bos` that evaluation must not add another BOS."""
    task = recipe.task
    grid = {"items": recipe.samples, "depths": list(recipe.depths)} if recipe.depths else {}
    return {
        "dialect": task.dialect,
        "edition": recipe.edition,
        "task": task.name,
        "metric": task.metric,
        "length": recipe.length,
        "generated_tokens": task.generated_tokens,
        "seed": recipe.seed,
        **grid,
        "model_template": template.name,
        "template_sha256": hashlib.sha256(f"{template.head}\0{template.tail}".encode()).hexdigest(),
        "template_has_bos": template.has_bos,
        "tokenizer_sha256": counter.sha256,
        "counted": "by pieces" if counter.pieces else "whole",
    }
