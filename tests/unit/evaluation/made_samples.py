"""Prepared files of RULER's shape, with answers, whose scores, positions and caveats are known beforehand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rpsd.evaluation.samples import Prepared, load_prepared
from megatron_rpsd.evaluation.scores import samples_file, score_run
from megatron_rpsd.ruler.tasks import QA_ORDER, RULER_TASKS, SYNTHETIC

PROMPT_TOKENS = 1000


@dataclass(frozen=True)
class Made:
    """A sample to write: its references, and where each one's evidence begins, in thousandths of the prompt."""

    outputs: Sequence[str]
    places: Sequence[int]
    more: str = ""
    """Further text of the prompt."""
    item: int | None = None
    depth: float | None = None


def _prompt(task: str, made: Made) -> tuple[str, list[list[int]]]:
    """The text, and the characters of each reference's evidence: needles of the key `key`, or the reference itself."""
    pieces = [f"One of the special magic numbers for key is: {o}." if "niah" in task else o for o in made.outputs]
    text, spans = "Read. ", []
    for piece in pieces:
        spans.append([len(text), len(text) + len(piece)])
        text += piece + " "
    return text + made.more, spans


def write_prepared(folder: Path, task: str, samples: Sequence[Made], length: int = 4096, **changed: object) -> Path:
    """TASK-LENGTH.jsonl and its companions in `folder`; `changed` are fields of the manifest."""
    path = folder / f"{task}-{length}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    lines, evidence = [], []
    for number, made in enumerate(samples):
        text, spans = _prompt(task, made)
        record = {
            "index": number,
            "input": text,
            "outputs": list(made.outputs),
            "length": length,
            "answer_prefix": " A:",
        }
        lines.append(json.dumps(record) + "\n")
        where = [
            {"reference": reference, "characters": [span], "tokens": [[place, place + 5]]}
            for reference, span, place in zip(made.outputs, spans, made.places, strict=True)
        ]
        row = {"id": f"{task}/{length}/{number}", "sample": number, "prompt_tokens": PROMPT_TOKENS, "evidence": where}
        if made.depth is not None:
            row |= {"item": made.item, "depth": made.depth}
        evidence.append(json.dumps(row) + "\n")
    content = "".join(lines).encode()
    path.write_bytes(content)
    path.with_name(f"{task}-{length}.evidence.jsonl").write_text("".join(evidence))
    manifest = {
        "dialect": "RULER@synthetic" if task.endswith(SYNTHETIC) else "RULER",
        "edition": "2025-07",
        "task": task,
        "metric": RULER_TASKS[task.partition("@")[0]].metric,
        "length": length,
        "generated_tokens": 128,
        "samples": len(samples),
        "seed": 42,
        "tokenizer_sha256": "cafe",
        "sources_sha256": {},
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    path.with_name(f"{task}-{length}.manifest.json").write_text(json.dumps(manifest | changed))
    return path


def prepared(folder: Path, task: str, samples: Sequence[Made], length: int = 4096, **changed: object) -> Prepared:
    return load_prepared(write_prepared(folder, task, samples, length, **changed))


def qa_context(documents: Sequence[str]) -> str:
    """The part of a question's prompt that holds its documents."""
    parts = [f"Document {slot}:\n{text}" for slot, text in enumerate(documents, start=1)]
    return "\n\n" + "\n\n".join(parts) + "\n\n" + QA_ORDER + "\n\nQuestion: which?"


def answers(files: Sequence[Prepared], texts: Mapping[str, Sequence[str]] | None = None, **fields: object) -> dict:
    """Predictions of all samples: `texts` by task in the samples' order, or all references where a task has none."""
    lines = {}
    for file in files:
        for sample in file.samples:
            given = (texts or {}).get(sample.task)
            text = given[sample.number] if given else ", ".join(sample.outputs)
            lines[sample.id] = {"id": sample.id, "prediction": text, "tokens": 1, "finish": "stop"} | fields
    return lines


def write_run(
    folder: Path, files: Sequence[Prepared], predictions: Mapping, provenance: Mapping | None = None
) -> tuple[Path, dict]:
    """A finished run's scores.json and samples.jsonl; its folder and its scores."""
    scores, rows = score_run(files, predictions, provenance or {"model": {"path": folder.name}})
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "samples.jsonl").write_bytes(samples_file(rows))
    return folder, scores
