"""RULER's figures hold the numbers they were given, grey where there are none, and no label lies on another."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from megatron_rpsd.report.ruler_figures import (
    deviation_difference_map,
    difference_map,
    score_map,
    teacher_forced_map,
)
from megatron_rpsd.report.ruler_positions import all_bins, depth_map, position_curves, position_difference_map
from megatron_rpsd.report.ruler_scores import trained_window
from tests.unit.report.ruler_results import LENGTHS, TASKS, make_comparison, make_scores

SEVEN = (*LENGTHS, 262144)
LONG = "niah_multikey_1@synthetic"


def cells(figure: Figure, axes: int = 0) -> dict[tuple[int, int], str]:
    """(row, column) -> the text that stands there."""
    found = {}
    for text in figure.axes[axes].texts:
        x, y = text.get_position()
        if isinstance(text, Text) and not hasattr(text, "xyann"):
            found[round(y), round(x)] = text.get_text()
    return found


def table(figure: Figure, axes: int = 0) -> list[list[str]]:
    found = cells(figure, axes)
    rows, columns = (1 + max(place[axis] for place in found) for axis in (0, 1))
    return [[found.get((row, column), "") for column in range(columns)] for row in range(rows)]


def names(figure: Figure, axes: int = 0) -> list[str]:
    return [label.get_text() for label in figure.axes[axes].get_yticklabels()]


def dashed(figure: Figure) -> list[float]:
    return [line.get_xdata()[0] for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes meet, and texts that leave the figure."""
    renderer = figure.canvas.get_renderer()
    hidden = set()  # labels of ticks beyond an axis' limits, which are not drawn
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            beyond = [tick for tick in ticks if not (axes.get_visible() and low <= tick.get_loc() <= high)]
            hidden |= {label for tick in beyond for label in (tick.label1, tick.label2)}
    texts = [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in hidden
    ]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    width, height = figure.canvas.get_width_height()
    outside = [(name, "outside") for name, box in boxes
               if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1]  # fmt: skip
    return outside + [
        (a, b)
        for (a, one), (b, other) in itertools.combinations(boxes, 2)
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
    ]


def good(figure: Figure, path: Path) -> Figure:
    """A PNG of at most 1,600 pixels across, no label on another."""
    assert Image.open(path).format == "PNG" and Image.open(path).width <= 1600
    assert not overlaps(figure)
    return figure


def test_the_score_map_holds_every_number_and_greys_what_was_not_run(tmp_path) -> None:
    scores = make_scores(lengths=SEVEN, missing=[("vt", 8192), ("qa_1", 262144)])
    figure = good(score_map(scores, tmp_path / "a.png"), tmp_path / "a.png")
    by_place = {(cell["task"], cell["length"]): cell["score"] for cell in scores["cells"]}
    shown = cells(figure)
    for (row, task), (column, length) in itertools.product(enumerate(TASKS), enumerate(SEVEN)):
        if (task, length) in by_place:
            assert float(shown[row, column]) == pytest.approx(by_place[task, length], abs=0.0501)
        else:
            assert (row, column) not in shown
    image = figure.axes[0].get_images()[0]
    assert image.get_clim() == (0, 100) and np.asarray(image.get_array().mask).sum() == 2
    assert to_hex(image.cmap.get_bad()) == "#c8c8c8"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["not run"]
    assert names(figure, 1) == [
        "RULER mean (13 tasks)", "mean of 12", "mean deviation over positions", "mean range over positions",
    ]  # fmt: skip
    means, twelve = table(figure, 1)[:2]
    assert [value == "–" for value in means] == [column in (1, 6) for column in range(7)]
    assert [value == "–" for value in twelve] == [column not in (1, 6) for column in range(7)]


def test_the_dashed_line_stands_where_yarn_starts(tmp_path) -> None:
    path = tmp_path / "a.png"
    figure = score_map(make_scores(["vt"], LENGTHS, window=16384), path)
    assert dashed(figure) == [2.5]
    assert {"trained to 16K", "YaRN x4"} <= {text.get_text() for text in figure.axes[0].texts}
    assert not dashed(score_map(make_scores(["vt"], LENGTHS, window=131072), path))
    beyond = good(score_map(make_scores(["vt"], [4096], window=2048, yarn_factor=None), path), path)
    assert dashed(beyond) == [-0.5] and "beyond" in {text.get_text() for text in beyond.axes[0].texts}


def test_the_trained_window_is_the_one_before_yarn() -> None:
    def window(**model):
        return trained_window({"model": model, "yarn_factor": None})

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 65536}
    assert (window(max_position_embeddings=262144, rope=yarn).tokens, window(rope=yarn).yarn_factor) == (65536, 4.0)
    llama = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    assert window(max_position_embeddings=131072, rope=llama).tokens == 131072
    assert window(max_position_embeddings=131072, rope=llama).yarn_factor is None
    assert window(rope=None) is None and trained_window({}) is None


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("tasks", [[LONG], [LONG, "qa_1"], ["qa_1"]])
def test_extremes_of_the_score_map(tmp_path, value, tasks) -> None:
    figure = good(score_map(make_scores(tasks, [4096], lambda *_: value), tmp_path / "a.png"), tmp_path / "a.png")
    assert table(figure) == [[f"{100 * value:.0f}"]] * len(tasks)
    assert figure.axes[0].get_images()[0].get_clim() == (0, 100)


def test_all_tasks_with_long_names_and_a_task_without_any_result(tmp_path) -> None:
    tasks = [f"{task}@synthetic" for task in TASKS]
    scores = make_scores(tasks, SEVEN, missing=[(tasks[0], length) for length in SEVEN])
    figure = good(score_map(scores, tmp_path / "a.png"), tmp_path / "a.png")
    assert names(figure) == tasks
    assert "mean of 12 @synthetic" in names(figure, 1)


def test_the_depth_map_shows_bins_by_length(tmp_path) -> None:
    scores = make_scores(["vt"], LENGTHS, lambda task, length, position: position, missing=[("vt", 8192)])
    # scores.json leaves out a bin without evidence; its row must stay, or the axis would not be even.
    for cell in scores["cells"]:
        del cell["position"]["bins"][3]
    figure = good(depth_map(scores, "vt", tmp_path / "a.png"), tmp_path / "a.png")
    assert names(figure) == [f"{10 * row}-{10 * row + 10}" for row in range(10)]
    shown = cells(figure)
    assert [shown[row, 0] for row in (0, 2, 9)] == ["5.0", "25.0", "95.0"]
    assert not [place for place in shown if place[0] == 3 or place[1] == 1]
    assert names(figure, 1) == ["mean", "deviation", "range"]
    # 5, 15, ... 95: the standard deviation is 10 sqrt((100 - 1) / 12).
    assert [float(row[0]) for row in table(figure, 1)] == [50, 28.7, 90]
    assert [row[1] for row in table(figure, 1)] == ["–"] * 3


def test_a_grid_has_a_row_for_every_depth(tmp_path) -> None:
    scores = make_scores(["niah_multikey_2@grid"], [4096], bins=5, forced=True)
    figure = good(depth_map(scores, "niah_multikey_2@grid", tmp_path / "a.png", True), tmp_path / "a.png")
    assert names(figure) == ["0", "25", "50", "75", "100"]
    assert "teacher-forced" in figure.get_suptitle()


def test_bins_that_nothing_names_are_found() -> None:
    assert all_bins([{"low": 0.2, "high": 0.3}]) == [(round(i / 10, 9), round((i + 1) / 10, 9)) for i in range(10)]
    assert all_bins([{"low": 0.9, "high": 0.9}, {"low": 0.1, "high": 0.1}]) == [(0.1, 0.1), (0.9, 0.9)]


def test_curves_overlay_two_models_with_wilson_bands(tmp_path) -> None:
    base = make_scores(["niah_multikey_2"], SEVEN, lambda task, length, position: 0.5)
    new = make_scores(["niah_multikey_2"], SEVEN, lambda task, length, position: position)
    del new["cells"][0]["position"]["bins"][4]
    path = tmp_path / "a.png"
    figure = good(position_curves({"base: a": base, "new: b": new}, "niah_multikey_2", path), path)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [
        "4K", "8K", "16K", "32K", "64K", "128K (YaRN x4)", "256K (YaRN x4)",
    ]  # fmt: skip
    for axes in panels:
        first, second = axes.get_lines()
        np.testing.assert_allclose(first.get_xdata(), np.arange(5, 100, 10))
        np.testing.assert_allclose(first.get_ydata(), 50)
        expected = np.arange(5.0, 100, 10)
        expected[4] = np.nan if axes is panels[0] else 45
        np.testing.assert_allclose(second.get_ydata(), expected)
        # Wilson's interval of 25 successes in 50: 0.3664 to 0.6336.
        low, high = axes.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
        assert (low, high) == pytest.approx((36.64, 63.36), abs=0.01)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base: a", "new: b"]


def test_one_model_and_one_length_need_no_legend(tmp_path) -> None:
    path = tmp_path / "a.png"
    figure = good(position_curves({"new": make_scores([LONG], [4096])}, LONG, path), path)
    assert not figure.legends and figure.get_suptitle() == f"new: {LONG}"


def test_long_names_of_models_stay_inside(tmp_path) -> None:
    path = tmp_path / "a.png"
    base, new = make_scores([LONG], [4096]), make_scores([LONG], [4096])
    del new["cells"][0]["position"]["bins"][2], base["cells"][0]["position"]["bins"][2]
    for scores, word in ((base, "before"), (new, "after")):
        scores["provenance"]["model"]["path"] = f"models/{word}-{'a-very-long-name-' * 3}$64k$"
    names_of = [scores["provenance"]["model"]["path"] for scores in (base, new)]
    good(position_curves(dict(zip(names_of, (base, new), strict=True)), LONG, path), path)
    good(position_curves({names_of[0]: base}, LONG, path), path)
    good(score_map(base, path), path)
    comparison = make_comparison(base, new)
    good(difference_map(comparison, path), path)
    good(position_difference_map(comparison, LONG, path), path)


def test_difference_maps_dot_what_excludes_zero(tmp_path) -> None:
    path = tmp_path / "a.png"
    base = make_scores(lengths=SEVEN, rule=lambda *_: 0.5, missing=[("vt", 8192)])
    new = make_scores(
        lengths=SEVEN, missing=[("vt", 8192)],
        rule=lambda task, length, position: {"vt": 0.52, "qa_1": 0.3, "qa_2": 0.7}.get(task, 0.5),
    )  # fmt: skip
    comparison = make_comparison(base, new, half=3.0)
    figure = good(difference_map(comparison, path), path)
    rows = dict(zip(names(figure), table(figure), strict=True))
    assert rows["vt"] == ["+2.0", "", *["+2.0"] * 5] and rows["qa_1"] == ["-20.0"] * 7 and rows["cwe"] == ["0.0"] * 7
    assert figure.axes[0].get_images()[0].get_clim() == (-20, 20)
    dots = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert {TASKS[round(line.get_ydata()[0])] for line in dots} == {"qa_1", "qa_2"} and len(dots) == 14
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "not run",
        "dot: the 95 % interval excludes 0",
    ]
    assert table(figure, 1)[0][:2] == ["+0.2", "–"]  # (2 - 20 + 20) / 13; no mean without vt


def test_small_differences_stay_pale(tmp_path) -> None:
    scores = make_scores(["vt"], [4096])
    figure = difference_map(make_comparison(scores, scores), tmp_path / "a.png")
    assert figure.axes[0].get_images()[0].get_clim() == (-10, 10)
    assert not [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]


def test_deviation_and_position_differences(tmp_path) -> None:
    path = tmp_path / "a.png"
    base = make_scores(["vt", "qa_1"], [4096, 8192], lambda task, length, position: position)
    new = make_scores(["vt", "qa_1"], [4096, 8192], lambda task, length, position: 0.48)
    comparison = make_comparison(base, new)  # the intervals of positions reach 5 points to both sides
    figure = good(deviation_difference_map(comparison, path), path)
    assert (names(figure), table(figure)) == (["vt"], [["-28.7", "-28.7"]])
    assert figure.axes[0].get_images()[0].cmap.name == "RdBu_r"  # blue is less deviation
    figure = good(position_difference_map(comparison, "vt", path), path)
    assert [row[0] for row in table(figure)] == [f"{value:+.1f}" for value in range(43, -50, -10)]
    assert (
        len([line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]) == 18
    )  # all but those of 3 points


def test_teacher_forced_maps(tmp_path) -> None:
    path = tmp_path / "a.png"
    scores = make_scores(["vt", "qa_1"], [4096, 8192], lambda *_: 0.5, forced=True)
    scores["cells"][0]["teacher_forced"] = None
    scores["cells"][1]["teacher_forced"] |= {"nll": 3.25, "greedy_exact": 12.5}
    figure = good(teacher_forced_map(scores, "nll", path), path)
    assert table(figure) == [["", "3.250"], ["1.167", "1.167"]]
    assert figure.axes[0].get_images()[0].get_clim() == (0, 3.25)
    figure = good(teacher_forced_map(scores, "greedy_exact", path), path)
    assert table(figure) == [["", "12.5"], ["50.0", "50.0"]]
    assert figure.axes[0].get_images()[0].get_clim() == (0, 100)
