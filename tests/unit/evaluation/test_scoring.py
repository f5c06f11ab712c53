"""Scores as RULER's own functions gave them, and RULER's averages over its README's own row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rpsd.evaluation.scoring import (
    RULER_LENGTHS,
    check_predicted,
    clean,
    is_whole_ruler,
    length_mean,
    read_predictions,
    reference_hits,
    sample_score,
    summary,
    task_score,
)
from megatron_rpsd.ruler.tasks import RULER_TASKS

# Scores, nulls and scores by sample come from NVIDIA's package nvidia-long-context-eval 26.3, run on these predictions.
CASES = json.loads(Path(__file__).with_name("scoring_cases.json").read_bytes())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_scores_equal_ruler_s_own(case: dict) -> None:
    pairs = list(zip(case["predictions"], case["references"], strict=True))
    shares = [sample_score(reference_hits(text, outputs), case["metric"]) for text, outputs in pairs]
    assert task_score(shares) == case["score"]
    assert [100 * share for share in shares] == pytest.approx(case["by_sample"], abs=1e-9)
    assert sum(not clean(text) for text in case["predictions"]) == case["nulls"]


def test_averages_are_those_of_ruler_s_readme() -> None:
    """Its row of Gemini 1.5 Pro: 96.7 95.8 96.0 95.9 95.9 94.4, average 95.8, weighted 95.5 (1st) and 96.1 (1st)."""
    means = dict(zip(RULER_LENGTHS, (96.7, 95.8, 96.0, 95.9, 95.9, 94.4), strict=True))
    figures = summary(means)
    assert {name: round(figures[name], 1) for name in ("avg", "wavg_inc", "wavg_dec")} == {
        "avg": 95.8,
        "wavg_inc": 95.5,
        "wavg_dec": 96.1,
    }
    assert figures["effective_length"] == 131072
    # The weights themselves: they sum to 21, the longest length has 6 or 1 of them.
    alone = summary(dict.fromkeys(RULER_LENGTHS, 0.0) | {131072: 21.0})
    assert (alone["avg"], alone["wavg_inc"], alone["wavg_dec"]) == (3.5, 6.0, 1.0)


def test_averages_need_all_six_lengths() -> None:
    figures = summary({4096: 90.0, 8192: 85.6, 16384: 85.59, 262144: None})
    assert figures == {"avg": None, "wavg_inc": None, "wavg_dec": None, "effective_length": 8192}
    assert summary({4096: 85.0})["effective_length"] is None
    # A seventh length changes nothing.
    seven = dict.fromkeys(RULER_LENGTHS, 50.0) | {262144: 0.0}
    assert summary(seven)["avg"] == 50.0


def test_the_mean_is_of_all_13_tasks_alone() -> None:
    scores = {task: float(place) for place, task in enumerate(RULER_TASKS)}
    assert length_mean(scores) == 6.0
    assert length_mean(scores | {"niah_single_2@synthetic": 1000.0, "vt@grid": 0.0}) == 6.0
    del scores["fwe"]
    assert length_mean(scores | {"niah_single_2@synthetic": 1000.0}) is None


def _manifests(length: int = 4096, **changed: object) -> list[dict]:
    common = {"dialect": "RULER", "edition": "2025-07", "tokenizer_sha256": "a", "seed": 42, "samples": 500}
    return [common | {"task": task, "length": length} | changed for task in RULER_TASKS]


def test_all_13_of_ruler_in_one_call() -> None:
    extra = {"task": "qa_1@shuffle", "length": 4096, "dialect": "RULER@shuffle", "edition": "2025-07", "samples": 9}
    assert is_whole_ruler(_manifests())
    assert is_whole_ruler(_manifests() + _manifests(8192) + [extra])
    assert not is_whole_ruler([])
    assert not is_whole_ruler([extra])
    assert not is_whole_ruler(_manifests()[:-1])
    assert not is_whole_ruler(_manifests() + _manifests(8192)[1:])
    assert not is_whole_ruler(_manifests() + _manifests()[:1])
    assert not is_whole_ruler(_manifests(dialect="RULER@grid"))
    for field, other in (("edition", "2024-12"), ("tokenizer_sha256", "b"), ("seed", 1), ("samples", 10)):
        assert not is_whole_ruler(_manifests()[:-1] + _manifests(**{field: other})[-1:]), field
    assert not is_whole_ruler(_manifests()[:-1] + _manifests(model_template="chat")[-1:])


def test_predictions_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "vt-4096.jsonl"
    lines = [{"id": "a", "prediction": ""}, {"id": "b", "prediction": "x", "finish": "length"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_predictions(path) == {"a": lines[0], "b": lines[1]}

    def refused(text: str) -> str:
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            read_predictions(path)
        return str(caught.value)

    good = json.dumps(lines[0]) + "\n"
    assert "line 2 is no JSON object" in refused(good + '{"id": "b", "pred')
    assert "line 2 is no JSON object" in refused(good + "[]\n")
    assert "line 1 has no" in refused('{"id": "a", "prediction": null}\n')
    assert "line 1 has no" in refused('{"prediction": "x"}\n')
    other = json.dumps(lines[1]) + "\n"
    assert "2 predictions are of samples that have one before: b first" in refused(good + other + other + good)
    path.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        read_predictions(path)


def test_missing_predictions_are_counted_and_named() -> None:
    check_predicted("vt-4096", ["a", "b"], {"a": {}, "b": {}, "c": {}})
    with pytest.raises(ValueError, match="vt-4096: 2 of 3 samples have no prediction, b first"):
        check_predicted("vt-4096", ["a", "b", "c"], {"a": {}})
