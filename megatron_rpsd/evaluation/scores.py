"""From prepared samples and predictions to scores.json, which figures and reports are drawn from alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from megatron_rpsd.evaluation import caveats
from megatron_rpsd.evaluation.position_statistics import position_statistics, standard_error
from megatron_rpsd.evaluation.samples import Prepared, Sample
from megatron_rpsd.evaluation.scoring import (
    check_predicted,
    clean,
    is_whole_ruler,
    length_mean,
    reference_hits,
    sample_score,
    summary,
    task_score,
)
from megatron_rpsd.ruler.tasks import RULER_TASKS, SHUFFLE

SCHEMA = 1
WORST = 5
_ALIKE = ("edition", "tokenizer_sha256", "seed")


def _places(sample: Sample) -> list[float | None]:
    """Where each piece of evidence is, one a reference; of all references together where one is enough (`part`)."""
    pieces, shuffled = len(sample.outputs), SHUFFLE in sample.task
    if sample.metric == "part":
        pieces = 1
        if shuffled and sample.depth is None:
            starts = sorted({start for evidence in sample.evidence for start, _ in evidence.tokens})
            return [start / sample.prompt_tokens for start in starts]
    if sample.depth is not None:
        return [sample.depth] * pieces
    if pieces == len(sample.evidence) and (shuffled or caveats.family(sample.task) in ("niah", "vt")):
        return [e.tokens[0][0] / sample.prompt_tokens if len(e.tokens) == 1 else None for e in sample.evidence]
    return [None] * pieces


def observations(sample: Sample, hits: Sequence[bool]) -> list[dict]:
    """Each piece of evidence as {"position", "hit"}: position a share of the prompt from 0 to 1, or None.

    In grids it is the depth. Otherwise it is where the evidence's first token stands, divided by the prompt's tokens:
    for niah the needle's sentence (RULER's token_position_answer is that of the value, some tokens further), for vt the
    variable's assignment. In qa_1@shuffle and qa_2@shuffle every right document is a piece of evidence, found where the
    answer is. RULER's own qa, cwe and fwe have their evidence in fixed slots, and words that stand at many places have
    no position in any variant: None.

    Args:
        hits: [R], whether each reference was found; with metric `part` one is enough for the whole sample.
    """
    places = _places(sample)
    found = [any(hits)] * len(places) if sample.metric == "part" else hits
    return [{"position": place, "hit": bool(hit)} for place, hit in zip(places, found, strict=True)]


def _sample_row(sample: Sample, hits: Sequence[bool], prediction: Mapping) -> dict:
    """One line of samples.jsonl."""
    row = {
        "id": sample.id,
        "task": sample.task,
        "length": sample.length,
        "score": 100 * sample_score(hits, sample.metric),
        "references": observations(sample, hits),
    }
    if sample.depth is not None:
        row |= {"item": sample.item, "depth": sample.depth}
    if "greedy_exact" in prediction:
        row["greedy_exact"] = bool(prediction["greedy_exact"])
    return row


def units(rows: Sequence[Mapping]) -> list:
    """For each row of samples.jsonl, what is drawn by itself: a grid's item with all its depths, else the sample."""
    return [row["id"] if row.get("item") is None else f"item {row['item']}" for row in rows]


def cell_position(rows: Sequence[Mapping]) -> dict | None:
    """Position statistics of a cell's rows of samples.jsonl, at least one; None where no evidence has a position."""
    seen = [reference for row in rows for reference in row["references"] if reference["position"] is not None]
    grid = rows[0].get("depth") is not None
    return position_statistics([r["position"] for r in seen], [r["hit"] for r in seen], grid)


def _teacher_forced(prepared: Prepared, lines: Sequence[Mapping]) -> dict | None:
    """The gold answers' likelihood; its positions where each reference's greedy_exact is known."""
    forced = [line for line in lines if "nll" in line]
    if not forced:
        return None
    if len(forced) < len(lines):
        raise ValueError(
            f"{prepared.name}: {len(lines) - len(forced)} of {len(lines)} predictions have no teacher-forced score: "
            "run the evaluation again, it resumes where it ended"
        )
    rows = []
    for sample, line in zip(prepared.samples, forced, strict=True):
        exact = [line["greedy_exact"]]
        if sample.metric == "all" and len(sample.outputs) > 1:
            exact = [reference["greedy_exact"] for reference in line.get("references") or ()]
        if exact:
            rows.append({"references": observations(sample, exact), "depth": sample.depth})
    return {
        "nll": sum(line["nll"] for line in forced) / len(forced),
        "greedy_exact": task_score([float(line["greedy_exact"]) for line in forced]),
        "position": cell_position(rows) if len(rows) == len(forced) else None,
    }


def _worst(prepared: Prepared, rows: Sequence[Mapping], predictions: Mapping[str, Mapping]) -> list[dict]:
    """Up to five of the lowest scores that are not full marks, with what the model wrote, as it wrote it."""
    wrong = sorted((row["score"], number) for number, row in enumerate(rows) if row["score"] < 100)[:WORST]
    picked = [(score, prepared.samples[number]) for score, number in wrong]
    return [
        {
            "id": sample.id,
            "prediction": predictions[sample.id]["prediction"],
            "outputs": list(sample.outputs),
            "score": score,
        }
        for score, sample in picked
    ]


def _cell(prepared: Prepared, predictions: Mapping[str, Mapping]) -> tuple[dict, list[dict]]:
    """A task at one length, and its rows of samples.jsonl."""
    check_predicted(prepared.name, [sample.id for sample in prepared.samples], predictions)
    lines = [predictions[sample.id] for sample in prepared.samples]
    hits = [reference_hits(line["prediction"], s.outputs) for s, line in zip(prepared.samples, lines, strict=True)]
    shares = [sample_score(found, prepared.manifest["metric"]) for found in hits]
    rows = [_sample_row(*of_sample) for of_sample in zip(prepared.samples, hits, lines, strict=True)]
    cell = {
        "task": prepared.task,
        "length": prepared.length,
        "metric": prepared.manifest["metric"],
        "samples": len(rows),
        "score": task_score(shares),
        "standard_error": standard_error([100 * share for share in shares], units(rows)),
        "nulls": sum(not clean(line["prediction"]) for line in lines),
        "truncated": sum(line.get("finish") == "length" for line in lines),
        "position": cell_position(rows),
        "teacher_forced": _teacher_forced(prepared, lines),
        "worst": _worst(prepared, rows, predictions),
    }
    return cell, rows


def _check_alike(files: Sequence[Mapping]) -> None:
    """ValueError where the manifests' prompts cannot be of one run."""
    for field in (*_ALIKE, "model_template", "template_sha256"):
        values = sorted({str(manifest.get(field)) for manifest in files})
        if len(values) > 1:
            raise ValueError(f"the prepared files differ in {field}: {' and '.join(values)}; score them apart")


def _length_rows(files: Sequence[Mapping], cells: Sequence[Mapping]) -> list[dict]:
    """lengths_summary: means over RULER's own tasks alone."""
    rows = []
    for length in sorted({manifest["length"] for manifest in files}):
        stock = [cell for cell in cells if cell["length"] == length and cell["task"] in RULER_TASKS]
        whole = is_whole_ruler(manifest for manifest in files if manifest["length"] == length)
        placed = [cell["position"] for cell in stock if cell["position"]]
        row = {
            "length": length,
            "mean": length_mean({cell["task"]: cell["score"] for cell in stock}) if whole else None,
            "mean_of": len(stock),
        }
        for name in ("deviation", "deviation_corrected"):
            row[name] = sum(position[name] for position in placed) / len(placed) if placed else None
        rows.append(row)
    return rows


def score_run(
    prepared: Iterable[Prepared], predictions: Mapping[str, Mapping], provenance: Mapping
) -> tuple[dict, list[dict]]:
    """scores.json, and the rows of samples.jsonl that `compare` reads.

    Args:
        prepared: read once, one after another: a generator keeps only one file's prompts in memory.
        predictions: sample id -> its line ("prediction", "finish"; "nll", "greedy_exact" where teacher-forced, with
            "references", a list of {"greedy_exact"}, where there are several).
        provenance: of the run; what the manifests know (dialect, edition, seed, num_samples, tokenizer_sha256, the
            model_template, the prompts' sha256) is added.

    Raises:
        ValueError: samples without a prediction, predictions without a sample, prepared files that do not go together.
    """
    files, cells, rows, lines = [], [], [], []
    for file in prepared:
        if any((file.task, file.length) == (other["task"], other["length"]) for other in files):
            raise ValueError(f"{file.path}: {file.name} was given twice")
        cell, cell_rows = _cell(file, predictions)
        files.append(file.manifest)
        cells.append(cell)
        rows += cell_rows
        lines += caveats.of_file(file)
    if not files:
        raise ValueError("there is no prepared file to score")
    _check_alike(files)
    known = {row["id"] for row in rows}
    unknown = [sample for sample in predictions if sample not in known]
    if unknown:
        raise ValueError(f"{len(unknown)} predictions belong to no prepared sample, {unknown[0]} first")
    order = {task: place for place, task in enumerate(RULER_TASKS)}
    cells.sort(key=lambda cell: (order.get(cell["task"], len(order)), cell["task"], cell["length"]))
    lengths = _length_rows(files, cells)
    counts = {manifest["samples"] for manifest in files}
    full = {
        "dialect": ", ".join(sorted({manifest["dialect"] for manifest in files})),
        **{field: files[0][field] for field in _ALIKE},
        "model_template": files[0].get("model_template", "base"),
        "num_samples": counts.pop() if len(counts) == 1 else None,
        **provenance,
        "prepared": {f"{m['task']}-{m['length']}": m["sha256"] for m in files},
    }
    scores = {
        "schema": SCHEMA,
        "provenance": full,
        "tasks": list(dict.fromkeys(cell["task"] for cell in cells)),
        "lengths": [row["length"] for row in lengths],
        "cells": cells,
        "lengths_summary": lengths,
        "summary": summary({row["length"]: row["mean"] for row in lengths}),
        "warnings": caveats.of_run(cells, lengths, full) + lines,
    }
    return scores, rows


def build_scores(prepared: Iterable[Prepared], predictions: Mapping[str, Mapping], provenance: Mapping) -> dict:
    """scores.json of a run; `score_run` gives samples.jsonl's rows too."""
    return score_run(prepared, predictions, provenance)[0]


def samples_file(rows: Sequence[Mapping]) -> bytes:
    """The bytes of samples.jsonl."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
