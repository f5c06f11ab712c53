"""scores.json from answers whose scores, positions and caveats are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rpsd.evaluation.samples import Prepared
from megatron_rpsd.evaluation.scores import build_scores, samples_file, score_run
from megatron_rpsd.ruler.tasks import RULER_TASKS
from tests.unit.evaluation.made_samples import Made, answers, prepared, qa_context

NUMBERS = ["1111111", "2222222", "3333333", "4444444"]


def _cell(scores: dict, task: str, length: int = 4096) -> dict:
    return next(cell for cell in scores["cells"] if (cell["task"], cell["length"]) == (task, length))


def _whole_ruler(folder: Path, length: int) -> list[Prepared]:
    return [prepared(folder, task, [Made(NUMBERS[:1], [500])] * 2, length) for task in RULER_TASKS]


def test_each_reference_is_scored_at_its_own_place(tmp_path: Path) -> None:
    made = [Made(NUMBERS, [10, 150, 151, 990])] * 3
    file = prepared(tmp_path, "niah_multivalue", made)
    texts = {"niah_multivalue": ["1111111 2222222", "4444444, 1111111", " "]}
    scores, rows = score_run([file], answers([file], texts), {})
    cell = _cell(scores, "niah_multivalue")
    assert (cell["score"], cell["samples"], cell["nulls"], cell["truncated"]) == (33.33, 3, 1, 0)
    assert cell["standard_error"] == pytest.approx(100 / 6)  # of 50, 50 and 0: sd 50 / sqrt(3), / sqrt(3)
    bins = cell["position"]["bins"]
    assert [(b["low"], b["n"], b["accuracy"]) for b in bins] == [
        (0.0, 3, pytest.approx(2 / 3)),
        (0.1, 6, pytest.approx(1 / 6)),
        (0.9, 3, pytest.approx(1 / 3)),
    ]
    assert cell["position"]["worst_bin"] == 1 and cell["position"]["range"] == pytest.approx(50.0)
    assert rows[1] == {
        "id": "niah_multivalue/4096/1",
        "task": "niah_multivalue",
        "length": 4096,
        "score": 50.0,
        "references": [
            {"position": 0.01, "hit": True},
            {"position": 0.15, "hit": False},
            {"position": 0.151, "hit": False},
            {"position": 0.99, "hit": True},
        ],
    }
    assert [json.loads(line) for line in samples_file(rows).splitlines()] == rows


def test_the_worst_answers_are_shown_as_written(tmp_path: Path) -> None:
    file = prepared(tmp_path, "vt", [Made(["AAAAA", "BBBBB"], [1, 2])] * 9)
    texts = ["AAAAA\x00 BBBBB", " AAAAA\n", "AAAAA", "no\t", "", "AAAAA BBBBB", "BBBBB", "BBBBB", "none"]
    cell = _cell(build_scores([file], answers([file], {"vt": texts}, finish="length"), {}), "vt")
    assert cell["truncated"] == 9 and cell["nulls"] == 1
    assert [(w["id"], w["prediction"], w["score"]) for w in cell["worst"]] == [
        ("vt/4096/3", "no\t", 0.0),
        ("vt/4096/4", "", 0.0),
        ("vt/4096/8", "none", 0.0),
        ("vt/4096/1", " AAAAA\n", 50.0),
        ("vt/4096/2", "AAAAA", 50.0),
    ]
    assert cell["worst"][0]["outputs"] == ["AAAAA", "BBBBB"]
    assert _cell(build_scores([file], answers([file]), {}), "vt")["worst"] == []


def test_fixed_slots_have_no_position_and_shuffled_ones_have(tmp_path: Path) -> None:
    made = [Made(["red", "blue"], [100, 100]), Made(["red", "blue"], [100, 800])]
    names = ("qa_1", "cwe", "fwe", "qa_1@shuffle", "cwe@shuffle", "qa_2@synthetic")
    files = [prepared(tmp_path, task, made) for task in names]
    texts = dict.fromkeys(names, ["blue", "none"])
    scores, rows = score_run(files, answers(files, texts), {})
    for task in ("qa_1", "cwe", "fwe", "qa_2@synthetic"):
        assert _cell(scores, task)["position"] is None
    assert [_cell(scores, task)["score"] for task in ("qa_1", "cwe")] == [50.0, 25.0]
    # A question has one answer: every right document counts, once, as found or not found with it.
    shuffled = [row["references"] for row in rows if row["task"] == "qa_1@shuffle"]
    assert shuffled == [[{"position": 0.1, "hit": True}], [{"position": p, "hit": False} for p in (0.1, 0.8)]]
    assert _cell(scores, "cwe@shuffle")["position"]["bins"][0]["accuracy"] == pytest.approx(1 / 3)
    fixed = next(line for line in scores["warnings"] if "same slots" in line)
    assert fixed.startswith("cwe, fwe, qa_1, qa_2@synthetic: ")


def test_a_grid_is_scored_at_its_depths(tmp_path: Path) -> None:
    made = [Made(NUMBERS[:1], [700], item=item, depth=depth) for item in range(4) for depth in (0.0, 0.5, 1.0)]
    file = prepared(tmp_path, "niah_single_1@grid", made, dialect="RULER@grid")
    found = ["1111111" if one.depth != 0.5 or one.item == 0 else "x" for one in made]
    scores, rows = score_run([file], answers([file], {file.task: found}), {})
    cell = _cell(scores, file.task)
    assert cell["position"]["kind"] == "grid" and cell["score"] == 75.0
    assert [(b["low"], b["high"], b["n"], b["accuracy"]) for b in cell["position"]["bins"]] == [
        (0.0, 0.0, 4, 1.0),
        (0.5, 0.5, 4, 0.25),
        (1.0, 1.0, 4, 1.0),
    ]
    assert (rows[1]["item"], rows[1]["depth"]) == (0, 0.5)
    # Items' means are 100, 200/3, 200/3, 200/3: their standard error, not that of 12 samples.
    assert cell["standard_error"] == pytest.approx(100 / 3 / 2 / 2)


def test_means_are_over_ruler_s_13_alone(tmp_path: Path) -> None:
    files = _whole_ruler(tmp_path, 4096) + _whole_ruler(tmp_path, 8192)[:-1]
    files += [prepared(tmp_path, "niah_single_2@synthetic", [Made(NUMBERS[:1], [5])] * 2)]
    texts = {"vt": ["no", "no"], "niah_single_2@synthetic": ["no", "no"], "cwe": ["1111111", "no"]}
    scores = build_scores(reversed(files), answers(files, texts), {})
    assert scores["tasks"] == [*RULER_TASKS, "niah_single_2@synthetic"] and scores["lengths"] == [4096, 8192]
    first, second = scores["lengths_summary"]
    assert first["mean"] == pytest.approx((11 * 100 + 50) / 13) and first["mean_of"] == 13
    assert second["mean"] is None and second["mean_of"] == 12
    assert scores["summary"] == {"avg": None, "wavg_inc": None, "wavg_dec": None, "effective_length": 4096}
    assert "no mean at 8192: 12 of RULER's 13 tasks are here" in scores["warnings"]
    assert scores["provenance"]["dialect"] == "RULER, RULER@synthetic"
    assert any(line.startswith("niah_single_2@synthetic: not among") for line in scores["warnings"])


def test_13_files_that_were_not_prepared_alike_have_no_mean(tmp_path: Path) -> None:
    files = _whole_ruler(tmp_path, 4096)[:-1] + [prepared(tmp_path, "qa_2", [Made(["x"], [1])] * 3)]
    scores = build_scores(files, answers(files), {})
    assert scores["lengths_summary"][0]["mean"] is None and scores["lengths_summary"][0]["mean_of"] == 13
    assert "no mean at 4096: its 13 tasks were not prepared alike" in scores["warnings"]
    assert scores["provenance"]["num_samples"] is None


def test_the_deviation_of_a_length_is_the_mean_of_its_placed_tasks(tmp_path: Path) -> None:
    made = [Made(NUMBERS[:1], [50])] * 30 + [Made(NUMBERS[:1], [950])] * 30
    files = [prepared(tmp_path, task, made) for task in ("vt", "niah_single_1", "qa_1")]
    texts = {"vt": ["1111111"] * 30 + ["no"] * 30}
    row = build_scores(files, answers(files, texts), {})["lengths_summary"][0]
    assert row["deviation"] == 25.0 and row["deviation_corrected"] == 25.0  # of 50 and 0


def test_teacher_forced_scores_stand_apart(tmp_path: Path) -> None:
    single = prepared(tmp_path, "niah_single_1", [Made(NUMBERS[:1], [100]), Made(NUMBERS[:1], [900])])
    several = prepared(tmp_path, "vt", [Made(["AAAAA", "BBBBB"], [100, 900])] * 2)
    question = prepared(tmp_path, "qa_1", [Made(["x", "y"], [1, 1])])
    files = [single, several, question]
    lines = answers(files, nll=0.5, greedy_exact=False)
    lines["niah_single_1/4096/0"] |= {"nll": 1.5, "greedy_exact": True}
    for line in (lines["vt/4096/0"], lines["vt/4096/1"]):
        line["references"] = [{"greedy_exact": True}, {"greedy_exact": line["id"] == "vt/4096/0"}]
    scores, rows = score_run(files, lines, {})
    forced = _cell(scores, "niah_single_1")["teacher_forced"]
    assert (forced["nll"], forced["greedy_exact"]) == (1.0, 50.0)
    assert [b["accuracy"] for b in forced["position"]["bins"]] == [1.0, 0.0]
    assert _cell(scores, "niah_single_1")["score"] == 100.0 and rows[0]["greedy_exact"] is True
    forced = _cell(scores, "vt")["teacher_forced"]
    assert forced["greedy_exact"] == 0.0 and [b["accuracy"] for b in forced["position"]["bins"]] == [1.0, 0.5]
    assert _cell(scores, "qa_1")["teacher_forced"]["position"] is None
    del lines["vt/4096/0"]["references"]
    assert _cell(build_scores(files, lines, {}), "vt")["teacher_forced"]["position"] is None
    del lines["vt/4096/0"]["nll"]
    with pytest.raises(ValueError, match="vt-4096: 1 of 2 predictions have no teacher-forced score"):
        build_scores(files, lines, {})
    assert _cell(build_scores([several], answers([several]), {}), "vt")["teacher_forced"] is None


def test_ambiguous_keys_and_repeated_documents_are_counted(tmp_path: Path) -> None:
    needle = "One of the special magic numbers for {key} is: 9999999."
    keys = prepared(tmp_path, "niah_multikey_2", [
        Made(NUMBERS[:1], [1], needle.format(key="key")),
        Made(NUMBERS[:1], [1], needle.format(key="another key")),
        Made(NUMBERS[:1], [1], needle.format(key="key-hole")),
    ])  # fmt: skip
    several = prepared(tmp_path, "niah_multivalue", [Made(NUMBERS, [1, 2, 3, 4])] * 3)
    papers = prepared(tmp_path, "qa_1", [
        Made(["x"], [1], qa_context(["a", "b", "a\n\nDocument of c"])),
        Made(["x"], [1], qa_context(["a", "b", "a", "c"])),
        Made(["x"], [1], qa_context(["b", "c", "b"])),
    ])  # fmt: skip
    files = [keys, several, papers]
    warnings = build_scores(files, answers(files), {})["warnings"]
    assert [line for line in warnings if "has another value" in line or "repeated" in line] == [
        "niah_multikey_2 at 4096: in 1 of 3 samples a queried key has another value in the text too, so that no one "
        "answer is right",
        "qa_1 at 4096: in 2 of 3 samples documents are repeated to fill the length, the right one perhaps among them",
    ]


def test_few_samples_empty_bins_and_another_tokenizer_are_said(tmp_path: Path) -> None:
    file = prepared(tmp_path, "vt", [Made(["AAAAA"], [place]) for place in range(0, 1000, 200)])
    told = build_scores([file], answers([file]), {"model": {"tokenizer_sha256": "beef"}})["warnings"]
    assert told == [
        "1 of 1 cells of RULER's tasks have fewer samples (5) than its published scores (500): see the standard errors",
        "position bins that hold no evidence are left out: 5 of 10 of vt at 4096",
        "no mean at 4096: 1 of RULER's 13 tasks are here",
        "the prompts were counted with another tokenizer than the model's: lengths are not the model's own",
    ]
    full = prepared(tmp_path / "full", "vt", [Made(["AAAAA"], [place]) for place in range(0, 1000, 2)])
    told = build_scores([full], answers([full]), {"model": {"tokenizer_sha256": "cafe"}})["warnings"]
    assert told == ["no mean at 4096: 1 of RULER's 13 tasks are here"]


def test_provenance_says_what_was_scored(tmp_path: Path) -> None:
    file = prepared(tmp_path, "vt", [Made(["AAAAA"], [5])] * 2, 8192)
    given = {"engine": {"name": "oracle"}, "prepared": {"old": "x"}}
    scores = build_scores([file], answers([file]), given)
    assert scores["schema"] == 1 and scores["provenance"] == {
        "dialect": "RULER",
        "edition": "2025-07",
        "tokenizer_sha256": "cafe",
        "seed": 42,
        "model_template": "base",
        "num_samples": 2,
        "engine": {"name": "oracle"},
        "prepared": {"vt-8192": file.manifest["sha256"]},
    }
    json.dumps(scores, allow_nan=False)


def _without_two(files: list[Prepared], lines: dict) -> list[Prepared]:
    del lines["vt/4096/1"], lines["vt/4096/2"]
    return files


def _with_a_stranger(files: list[Prepared], lines: dict) -> list[Prepared]:
    lines["vt/8192/0"] = lines["vt/4096/0"]
    return files


@pytest.mark.parametrize(
    "change, message",
    [
        (_without_two, "vt-4096: 2 of 3 samples have no prediction, vt/4096/1 first"),
        (_with_a_stranger, "1 predictions belong to no prepared sample, vt/8192/0 first"),
        (lambda files, lines: files * 2, "vt-4096 was given twice"),
        (lambda files, lines: [], "no prepared file"),
    ],
)
def test_what_is_missing_is_an_error_and_never_a_zero(tmp_path: Path, change: Callable, message: str) -> None:
    files = [prepared(tmp_path, "vt", [Made(["AAAAA"], [5])] * 3)]
    lines = answers(files)
    files = change(files, lines)
    with pytest.raises(ValueError, match=message):
        build_scores(files, lines, {})


@pytest.mark.parametrize(
    "field, other", [("edition", "2024-12"), ("tokenizer_sha256", "beef"), ("seed", 7), ("model_template", "chat")]
)
def test_files_of_two_kinds_are_not_scored_together(tmp_path: Path, field: str, other: object) -> None:
    made = [Made(["AAAAA"], [5])]
    files = [prepared(tmp_path, "vt", made), prepared(tmp_path, "fwe", made, **{field: other})]
    with pytest.raises(ValueError, match=f"differ in {field}: .*{other}"):
        build_scores(files, answers(files), {})
