"""Made-up texts: the same everywhere, answerable, and never under RULER's names."""

from __future__ import annotations

import hashlib
import json

import pytest

from megatron_rpsd.ruler.generate import Recipe, generate
from megatron_rpsd.ruler.sources import english_sentences
from megatron_rpsd.ruler.synthetic import SyntheticSources
from megatron_rpsd.ruler.tasks import RULER_TASKS, SYNTHETIC_TASKS, find_task


@pytest.fixture(scope="module")
def sources() -> SyntheticSources:
    return SyntheticSources()


def test_names() -> None:
    assert not set(SYNTHETIC_TASKS) & set(RULER_TASKS) and len(SYNTHETIC_TASKS) == 7
    for name in ("vt@synthetic", "niah_single_1@synthetic"):
        with pytest.raises(ValueError, match="the tasks are"):
            find_task(name)


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_every_answer_stands_in_its_evidence(name: str, ws, sources) -> None:
    made = list(generate(Recipe(find_task(name), 4096, 4), ws, sources))
    assert len({where["id"] for _, where in made}) == 4
    for fields, where in made:
        text = fields["input"]
        assert fields["length"] <= 4096
        for entry in where["evidence"]:
            spans = [text[start:stop] for start, stop in entry["characters"]]
            assert any(entry["reference"] in span for span in spans)
            assert text.count(entry["reference"]) == 1


def test_two_documents_lead_to_a_bridges_answer(ws, sources) -> None:
    (fields, where), *_ = generate(Recipe(find_task("qa_2@synthetic"), 4096, 1), ws, sources)
    first, second = sorted(fields["input"][a:b] for a, b in where["evidence"][0]["characters"])
    town = next(text for text in (first, second) if fields["outputs"][0] in text).split("\n")[0]
    assert f"grew up in {town}." in first + second


def test_prose_is_cut_at_its_full_stops(sources) -> None:
    text = " ".join(sources.essay_words[:5000])
    assert len(english_sentences(text)) == text.count(". ") + 1


def test_texts_never_change(sources) -> None:
    digests = [
        hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        for content in (sources.essay_words, sources.squad, sources.hotpotqa)
    ]
    assert digests == DIGESTS


DIGESTS = ["434bf5274aeaf80a", "cb17c99940b39819", "ec1943d0ececc48d"]
