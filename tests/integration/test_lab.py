"""The position lab end to end, through the real training entry, with a handful of steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from examples.lab.records import read_training_log
from examples.lab.run import run_lab
from examples.lab.settings import Phase, Settings
from examples.quickstart.console import StageFailed

SETTINGS = Settings(
    base=Phase(64, 10_000, 6, global_batch_size=4, micro_batch_size=2, learning_rate=3e-3, warmup_steps=2,
               log_interval=2),
    adapt=Phase(128, 500_000, 4, global_batch_size=4, micro_batch_size=1, learning_rate=1e-3, warmup_steps=1,
                log_interval=2),
    exam_documents=3,
    base_exam_documents=4,
)  # fmt: skip
ARMS = ("standard", "rpsd-skip")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "out"
    run_lab(folder, SETTINGS, [3], ARMS, [256])
    return folder


def test_everything_is_written(output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    assert list(results["arms"]) == list(ARMS) and results["seeds"] == [3]
    for name, arm in results["arms"].items():
        run = arm["runs"]["3"]
        assert run["steps"] == 4 and run["curve_steps"] == [2, 4] and run["seconds_per_step"] > 0
        assert set(run["curves"]) == ({"lm loss", "view kl"} if name == "rpsd-skip" else {"lm loss"})
        assert len(arm["exams"]["256"]["by_depth"]) == 10
        assert arm["command"].startswith("OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m megatron_rpsd")
    page = (output / "report.html").read_text()
    assert all(text in page for text in ("RPSD skip", "Limits", "torchrun", "data:image/png"))
    for name in ("depth", "heat_maps", "training"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.rglob("*.partial"))


def test_arms_start_from_one_base_and_read_one_stream(output: Path) -> None:
    # Before the first step the models are the same and so are the windows: the first CLM losses are near each other,
    # and well below the loss of a model without training, log 226 = 5.42, which every arm would have without a base.
    first = {arm: read_training_log(output / "seed3" / "logs" / f"{arm}.log.1").curves["lm loss"][0] for arm in ARMS}
    assert first["standard"] == pytest.approx(first["rpsd-skip"], rel=0.01)
    text = (output / "seed3" / "logs" / "rpsd-skip.log").read_text()
    assert "loading" in text and str(output / "seed3" / "base") in text


def test_a_second_run_repeats_nothing_and_more_is_only_added(output: Path, capsys) -> None:
    trained = {path: path.stat().st_mtime_ns for path in output.rglob("record.json")}
    results = run_lab(output, SETTINGS, [3], ["standard"], [256, 300])
    said = capsys.readouterr().out
    assert "data, done before" in said and "base model, accuracy" in said
    assert set(results["arms"]["standard"]["exams"]) == {"256", "300"}
    changed = {path.parent.relative_to(output) for path, then in trained.items() if path.stat().st_mtime_ns != then}
    assert changed == {Path("seed3/standard/exam")}  # the new length alone


def test_a_run_that_is_refused_says_why_and_leaves_no_record(output: Path, monkeypatch, capsys) -> None:
    from examples.lab import lab

    worse = dataclasses.replace(SETTINGS.adapt, warmup_steps=9)
    monkeypatch.setattr(lab.Lab, "_base_hash", lambda self, seed: json.loads(
        (output / "seed3" / "base" / "record.json").read_text())["made_from"])  # fmt: skip
    monkeypatch.setattr(lab.Lab, "_data_hash", lambda self, seed: json.loads(
        (output / "seed3" / "data" / "record.json").read_text())["made_from"])  # fmt: skip
    with pytest.raises(StageFailed, match="--lr-warmup-iters 9 must be smaller than the 4 steps"):
        run_lab(output, dataclasses.replace(SETTINGS, adapt=worse), [3], ["standard"], [256])
    assert not (output / "seed3" / "standard" / "record.json").exists()
