"""RULER's scoring (arXiv 2404.06654): a prediction, a task, a length, all lengths.

RULER asks whether a reference occurs in the answer as a substring, whatever its case. So `art` is found in `partisan`,
and 2345678 in 12345678. Scores are comparable with RULER's only where this is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_rpsd.evaluation.samples import json_lines
from megatron_rpsd.ruler.tasks import DIALECT, RULER_TASKS

RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
EFFECTIVE_SCORE = 85.6
"""Llama-2-7B-chat at 4K, RULER's mark of a length that a model masters."""
# A set of runs is one RULER only where all of these agree.
SAME_RUN = ("edition", "dialect", "tokenizer_sha256", "seed", "samples", "model_template")

_CONTROL = re.compile(r"[\x00-\x1f]")


def clean(prediction: str) -> str:
    """The answer that is scored: control characters, tabs among them, become line ends; the ends are stripped."""
    return _CONTROL.sub("\n", prediction).strip()


def reference_hits(prediction: str, outputs: Sequence[str]) -> tuple[bool, ...]:
    """For each reference, whether the cleaned prediction contains it, cases ignored."""
    answer = clean(prediction).lower()
    return tuple(reference.lower() in answer for reference in outputs)


def sample_score(hits: Sequence[bool], metric: str) -> float:
    """0 to 1: the share of references found (`all`, string_match_all), or whether any was (`part`)."""
    assert metric in ("all", "part"), metric
    return float(any(hits)) if metric == "part" else sum(hits) / len(hits)


def task_score(scores: Sequence[float]) -> float:
    """Samples' scores from 0 to 1 -> their mean from 0 to 100, at two decimals as RULER rounds."""
    return round(sum(scores) / len(scores) * 100, 2)


def is_whole_ruler(manifests: Iterable[Mapping]) -> bool:
    """Whether prepared files are all 13 tasks of RULER at each of their lengths, each once, of one edition, dialect,
    tokenizer, seed, chat template and number of samples.

    Other tasks among them (@synthetic, @grid, @shuffle) change nothing: they are no part of RULER's mean.
    """
    stock = [manifest for manifest in manifests if manifest["task"] in RULER_TASKS]
    named = [(manifest["task"], manifest["length"]) for manifest in stock]
    wanted = {(task, length) for task in RULER_TASKS for _, length in named}
    alike = len({tuple(manifest.get(field) for field in SAME_RUN) for manifest in stock}) == 1
    return alike and stock[0]["dialect"] == DIALECT and len(named) == len(set(named)) and set(named) == wanted


def length_mean(scores: Mapping[str, float]) -> float | None:
    """Plain mean of the 13 tasks' scores at one length; None unless `scores` (by task) holds all of them."""
    if not RULER_TASKS.keys() <= scores.keys():
        return None
    return sum(scores[task] for task in RULER_TASKS) / len(RULER_TASKS)


def summary(means: Mapping[int, float | None]) -> dict:
    """RULER's figures over lengths, from each length's mean.

    avg, wavg_inc (weights 1 to 6, the longest length weighs most) and wavg_dec (6 to 1) take RULER's six lengths, and
    are None unless all have a mean. effective_length is the largest length whose mean is at least 85.6, or None.
    """
    values = [means.get(length) for length in RULER_LENGTHS]
    reached = [length for length, mean in means.items() if mean is not None and mean >= EFFECTIVE_SCORE]
    figures = {"avg": None, "wavg_inc": None, "wavg_dec": None, "effective_length": max(reached, default=None)}
    if None not in values:
        up = range(1, len(values) + 1)
        weights = {"avg": [1] * len(values), "wavg_inc": up, "wavg_dec": up[::-1]}
        for name, weight in weights.items():
            figures[name] = sum(w * v for w, v in zip(weight, values, strict=True)) / sum(weight)
    return figures


def read_predictions(path: Path) -> dict[str, dict]:
    """Sample id -> its line of a predictions file.

    Raises ValueError where a line is no JSON object with an id and a text, or where a sample has two lines.
    """
    predictions, repeated = {}, []
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run the evaluation again, it resumes where it ended")
    for number, (_, line) in enumerate(json_lines(path), start=1):
        if not isinstance(line.get("id"), str) or not isinstance(line.get("prediction"), str):
            raise ValueError(f'{path}: line {number} has no "id" and "prediction" that are texts')
        if line["id"] in predictions:
            repeated.append(line["id"])
        predictions[line["id"]] = line
    if repeated:
        raise ValueError(
            f"{path}: {len(repeated)} predictions are of samples that have one before: {repeated[0]} first"
        )
    return predictions


def check_predicted(name: str, ids: Sequence[str], predictions: Mapping[str, Mapping]) -> None:
    """ValueError where a sample of TASK-LENGTH `name` has no prediction: none is ever counted as a wrong answer."""
    missing = [sample for sample in ids if sample not in predictions]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(ids)} samples have no prediction, {missing[0]} first: run the evaluation "
            f"again, it resumes where it ended"
        )
