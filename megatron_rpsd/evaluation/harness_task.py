"""Prompts and scores of an exported folder, for lm-evaluation-harness; needs nothing but Python's own library.

`evaluation.harness` copies this file, as it is, beside the tasks that name its functions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path


class Documents(list):
    """A split as the harness reads it: documents by number, and `features`, which names their fields.

    No `datasets.Dataset`: forming one pickles its table, which fails for some versions of datasets and pyarrow.
    """

    @property
    def features(self) -> dict[str, None]:
        """The fields' names, as keys."""
        return dict.fromkeys(self[0])


def documents(file: str, **_) -> dict[str, Documents]:
    """The `test` split: lines of a file beside this one, each with `id`, `prompt` and `outputs`."""
    with Path(__file__).with_name(file).open(encoding="utf-8") as lines:
        return {"test": Documents(json.loads(line) for line in lines)}


def share_found(prediction: str, outputs: list[str]) -> float:
    """Share of the references that the answer contains, cases ignored, control characters read as line ends."""
    answer = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    return sum(reference.lower() in answer for reference in outputs) / len(outputs)


def string_match_all(doc: dict, results: list[str]) -> dict[str, float]:
    """RULER's score of a sample, 0 to 1: the share of references found."""
    return {"string_match_all": share_found(results[0], doc["outputs"])}


def string_match_part(doc: dict, results: list[str]) -> dict[str, float]:
    """RULER's score of a QA sample, 0 or 1: whether any reference is found."""
    return {"string_match_part": float(share_found(results[0], doc["outputs"]) > 0)}
