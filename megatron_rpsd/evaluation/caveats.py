"""What a reader of RULER's scores must know of the samples behind them, counted in these samples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megatron_rpsd.evaluation.position_statistics import BINS
from megatron_rpsd.evaluation.samples import Prepared, Sample
from megatron_rpsd.ruler.tasks import QA_ORDER, RULER_TASKS, SHUFFLE

RULER_SAMPLES = 500
"""Of every task and length behind RULER's published scores."""
FIXED_SLOTS = ("cwe", "fwe", "qa")
"""RULER's shuffle depends on a list's length alone, so that these families' evidence is at one place in all samples."""
_DOCUMENT = re.compile(r"\n\nDocument \d+:\n")


def family(task: str) -> str:
    """niah, vt, cwe, fwe or qa, of a variant (@synthetic, @grid, @shuffle) too; empty where RULER has no such task."""
    base = RULER_TASKS.get(task.partition("@")[0])
    return base.family if base else ""


def ambiguous(sample: Sample) -> bool:
    """Whether a key that the sample asks for has another value in the text, by chance: the question has no one answer.

    Raises ValueError where a needle's evidence does not hold its reference.
    """
    heads = []
    for evidence in sample.evidence:
        for start, stop in evidence.characters:
            needle = sample.prompt[start:stop]
            head, reference, _ = needle.rpartition(evidence.reference)
            if not reference:
                raise ValueError(f"the evidence of {sample.id} is {needle!r}, which holds no {evidence.reference}")
            heads.append(head)
    return any(sample.prompt.count(head) > heads.count(head) for head in set(heads))


def repeats_documents(sample: Sample) -> bool:
    """Whether a document of a question's context stands there twice."""
    documents = _DOCUMENT.split(sample.prompt[: sample.prompt.rfind("\n\n" + QA_ORDER)])[1:]
    return len(set(documents)) < len(documents)


_COUNTED = {
    "niah": (ambiguous, "a queried key has another value in the text too, so that no one answer is right"),
    "qa": (repeats_documents, "documents are repeated to fill the length, the right one perhaps among them"),
}


def of_file(prepared: Prepared) -> list[str]:
    """Lines about one task and length."""
    lines, number, test = [], len(prepared.samples), _COUNTED.get(family(prepared.task))
    if test:
        found = sum(test[0](sample) for sample in prepared.samples)
        if found:
            lines.append(f"{prepared.task} at {prepared.length}: in {found} of {number} samples {test[1]}")
    return lines


def _about_tasks(cells: Sequence[Mapping]) -> list[str]:
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    fixed = [task for task in tasks if SHUFFLE not in task and family(task) in FIXED_SLOTS]
    variants = [task for task in tasks if task not in RULER_TASKS]
    lines = []
    if fixed:
        lines.append(
            f"{', '.join(fixed)}: RULER puts the evidence into the same slots in every sample, so these tasks say "
            "nothing about position"
        )
    if variants:
        lines.append(f"{', '.join(variants)}: not among RULER's 13 tasks, never in a mean over them")
    return lines


def _about_numbers(cells: Sequence[Mapping]) -> list[str]:
    lines = []
    counts = [cell["samples"] for cell in cells if cell["task"] in RULER_TASKS]
    few = [count for count in counts if count < RULER_SAMPLES]
    if few:
        amount = f"{min(few)}" if min(few) == max(few) else f"{min(few)} to {max(few)}"
        lines.append(
            f"{len(few)} of {len(counts)} cells of RULER's tasks have fewer samples ({amount}) than its published "
            f"scores ({RULER_SAMPLES}): see the standard errors"
        )
    thin = [
        c for c in cells if c["position"] and c["position"]["kind"] == "native" and len(c["position"]["bins"]) < BINS
    ]
    if thin:
        first, empty = thin[0], BINS - len(thin[0]["position"]["bins"])
        more = f", the first of {len(thin)} such cells" if len(thin) > 1 else ""
        lines.append(
            f"position bins that hold no evidence are left out: {empty} of {BINS} of {first['task']} at "
            f"{first['length']}{more}"
        )
    return lines


def of_run(cells: Sequence[Mapping], lengths: Sequence[Mapping], provenance: Mapping) -> list[str]:
    """Lines about scores.json's cells, lengths_summary and provenance."""
    lines = _about_tasks(cells) + _about_numbers(cells)
    for row in lengths:
        if row["mean"] is None and row["mean_of"]:
            here = f"{row['mean_of']} of RULER's {len(RULER_TASKS)} tasks are here"
            if row["mean_of"] == len(RULER_TASKS):
                here = "its 13 tasks were not prepared alike"
            lines.append(f"no mean at {row['length']}: {here}")
    if (provenance.get("model") or {}).get("tokenizer_sha256") not in (None, provenance["tokenizer_sha256"]):
        lines.append(
            "the prompts were counted with another tokenizer than the model's: lengths are not the model's own"
        )
    return lines
