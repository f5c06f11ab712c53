"""RULER's pages: everything escaped, nothing loaded from elsewhere, warnings first, the numbers of scores.json."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from megatron_rpsd.report.ruler_page import flatten, visible
from megatron_rpsd.report.ruler_report import write_comparison, write_report
from tests.unit.report.ruler_results import make_comparison, make_scores
from tests.unit.report.test_html import Reader

NASTY = "<script>alert('x')</script> & \"quoted\" \x00\u202e\ud800"
SHOWN = "<script>alert('x')</script> & \"quoted\" \\x00\\u202e\\ud800"


def nasty_scores() -> dict:
    scores = make_scores(["vt", "qa_1"], [4096, 8192], warnings=[NASTY], forced=True, text=NASTY)
    scores["provenance"]["engine"]["name"] = NASTY
    for cell in scores["cells"]:
        for entry in cell["worst"]:
            entry["outputs"] = [NASTY, "second"]
    return scores


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[list[Path], str]:
    paths = write_report(nasty_scores(), tmp_path_factory.mktemp("report"))
    return paths, paths[0].read_text()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> tuple[list[Path], str]:
    base = make_scores(["vt", "qa_1"], [4096, 8192], lambda *_: 0.5, warnings=["few samples"])
    new = make_scores(["vt", "qa_1"], [4096, 8192], lambda task, length, position: 0.3 if task == "qa_1" else 0.75)
    base["provenance"]["model"]["path"] = "models/before<1>"
    paths = write_comparison(make_comparison(base, new), base, new, tmp_path_factory.mktemp("comparison"))
    return paths, paths[0].read_text()


def flat(page: str) -> str:
    return re.sub(r"\s+", " ", "\n".join(Reader(page).text))


def test_the_paths_are_the_page_and_its_figures(report) -> None:
    paths, page = report
    names = [
        "scores",
        "depth_vt",
        "curves_vt",
        "forced_greedy_exact",
        "forced_nll",
        "forced_depth_vt",
        "forced_curves_vt",
    ]
    assert [path.name for path in paths] == ["report.html", *(f"{name}.png" for name in names)]
    assert all(path.is_file() for path in paths)
    assert len([tag for tag, _ in Reader(page).tags if tag == "img"]) == len(names)
    assert not list(paths[0].parent.rglob("*.partial"))


@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_the_page_is_whole_and_loads_nothing(kind, request) -> None:
    page = request.getfixturevalue(kind)[1]
    reader = Reader(page)
    assert not reader.unbalanced and not reader.open
    for tag, attributes in reader.tags:
        assert tag not in ("script", "link", "iframe", "object") and "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
        if tag == "img":
            assert attributes["alt"]


def test_every_text_is_escaped_and_the_invisible_is_written_out(report) -> None:
    page = report[1]
    text = "".join(Reader(page).text)
    # A warning, the engine's name, and for each of 4 cells 2 predictions and what was expected of each.
    assert text.count(SHOWN) == 2 + 4 * 2 * 2
    assert "<script" not in page and "\x00" not in page and "\u202e" not in page


def test_warnings_come_before_any_number(report) -> None:
    page = report[1]
    assert page.index("<h2>Warnings</h2>") < page.index("<h2>Scores</h2>") < page.index("<h2>Provenance</h2>")


def test_the_page_is_as_wide_as_its_figures(report) -> None:
    assert "max-width: 100rem" in report[1]


def test_no_warnings_no_section(tmp_path) -> None:
    page = write_report(make_scores(["qa_1"], [4096]), tmp_path)[0].read_text()
    assert "Warnings" not in page and "Teacher-forced" not in page and "<h2>Positions" not in page


def test_the_tables_hold_the_scores_and_statistics(report) -> None:
    text, scores = flat(report[1]), nasty_scores()
    for cell in scores["cells"]:
        assert f"{cell['score']:.2f} ± {cell['standard_error']:.2f}" in text
        assert f"{cell['teacher_forced']['nll']:.4f} / {cell['score']:.2f}" in text
    position = scores["cells"][1]["position"]
    worst = position["bins"][position["worst_bin"]]
    low, middle, high = (100 * worst[key] for key in ("wilson_low", "accuracy", "wilson_high"))
    row = [f"{position[key]:.2f}" for key in ("deviation", "deviation_corrected", "range")]
    assert f"vt 8K {' '.join(row)} 40-50 {middle:.1f} [{low:.1f}, {high:.1f}] 50" in text


def test_the_provenance_is_complete(report) -> None:
    text = "".join(Reader(report[1]).text)
    for key, value in flatten(nasty_scores()["provenance"]).items():
        assert key in text and visible(value) in text


def test_empty_and_endless_predictions(tmp_path) -> None:
    scores = make_scores(["qa_1"], [4096])
    first, second = scores["cells"][0]["worst"]
    first["prediction"], second["prediction"] = "", "x" * 5000
    page = write_report(scores, tmp_path)[0].read_text()
    assert "<pre>(empty)</pre>" in page and "x" * 4000 + "\n[1000 more characters]" in page


def test_only_the_dictionary_is_read(tmp_path) -> None:
    scores = make_scores(["vt"], [4096])
    before = copy.deepcopy(scores)
    first = write_report(scores, tmp_path / "a")[0].read_bytes()
    assert scores == before
    assert write_report(json.loads(json.dumps(scores)), tmp_path / "b")[0].read_bytes() == first


def test_nothing_to_draw_is_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match="^scores.json holds no cell: [^\n]*$"):
        write_report(make_scores(["vt"], [4096], missing=[("vt", 4096)]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_comparison_says_what_fell_and_by_how_much(comparison) -> None:
    paths, page = comparison
    names = ["differences", "deviation_differences", "curves_vt", "position_differences_vt"]
    assert [path.name for path in paths] == ["comparison.html", *(f"{name}.png" for name in names)]
    text = flat(page)
    assert "2 fell by more than the bound of 2 points" in text
    assert "qa_1 at 4K: -20.00 [-23.00, -17.00] points" in text and "vt at 4K:" not in text.split("Differences")[0]
    assert "vt 4K 50.00 75.00 +25.00 [+22.00, +28.00]" in text
    assert "base: before<1>: few samples" in text


def test_the_comparison_shows_what_differs_between_the_runs_first(comparison) -> None:
    text = flat(comparison[1])
    rows = text[text.rindex("Provenance") :]
    assert "The first 1 rows differ." in rows
    assert rows.index("model.path") < rows.index("dialect")


@pytest.mark.parametrize(("bound", "words"), [(None, "No bound was given"), (50.0, "None: nothing fell")])
def test_no_regressions(tmp_path, bound, words) -> None:
    scores = make_scores(["qa_1"], [4096])
    page = write_comparison(make_comparison(scores, scores) | {"bound": bound}, scores, scores, tmp_path)[0].read_text()
    assert words in flat(page)
