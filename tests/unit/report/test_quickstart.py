"""The quickstart's arithmetic, its reading of failures, and what it may remove."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.quickstart.console import StageFailed, failure_reason, only_run, run_command
from examples.quickstart.results import Probed, missing_effect, summarise
from examples.quickstart.settings import Paths, Settings, prepare_output


def probed(clm: list[float], last_kl: list[float]) -> Probed:
    return Probed(np.array(clm), np.array([[0.01, value] for value in last_kl]))


BEFORE = probed([2.0, 3.0, 4.0], [0.1, 0.2, 0.3])
STANDARD = probed([1.9, 2.9, 3.9], [0.1, 0.19, 0.31])
RPSD = probed([1.91, 2.9, 3.92], [0.08, 0.17, 0.26])


def test_the_summary_by_hand() -> None:
    summary = summarise(BEFORE, STANDARD, RPSD, [1, 256])
    rpsd = summary["models"]["rpsd"]
    assert rpsd["kl"] == pytest.approx([0.01, 0.17])
    assert rpsd["kl_change_percent"] == pytest.approx(-15.0)  # 0.17 / 0.2 - 1
    assert rpsd["kl_change_error"] == pytest.approx(100 / 0.2 * statistics.stdev([0.02, 0.03, 0.04]) / 3**0.5)
    assert rpsd["clm_change_percent"] == pytest.approx(100 * (2.91 / 3.0 - 1))
    assert rpsd["kl_lower_than_before"] == 3 and summary["models"]["standard"]["kl_lower_than_before"] == 1
    assert summary["margin_points"] == pytest.approx(15.0) and summary["rpsd_wins"] == 3
    assert summary["margin_error"] == pytest.approx(100 / 0.2 * statistics.stdev([0.02, 0.02, 0.05]) / 3**0.5)
    assert summary["clm_excess"] == pytest.approx(2.91 / 2.9 - 1)
    assert json.loads(json.dumps(summary)) == summary


def test_an_absent_effect_is_named() -> None:
    def verdict(standard: Probed, rpsd: Probed) -> str | None:
        return missing_effect(summarise(BEFORE, standard, rpsd, [1, 256]))

    assert verdict(STANDARD, RPSD) is None
    assert "only 0.0 percentage points" in verdict(STANDARD, STANDARD)
    assert "within two standard errors" in verdict(STANDARD, probed([1.9, 2.9, 3.9], [0.1, 0.19, 0.2]))
    assert "CLM loss is 3.45 % higher" in verdict(STANDARD, probed([2.0, 3.0, 4.0], [0.08, 0.17, 0.26]))
    assert verdict(STANDARD, probed([1.91, 2.9, 3.92], [float("nan")] * 3)) is not None


def test_the_reason_of_a_failure_is_one_line() -> None:
    lines = ["INFO: x", "error: --lr 0: too small", "ChildFailedError: y"]
    assert failure_reason(lines, 2) == "--lr 0: too small"
    assert failure_reason(["Traceback", "[rank0]: ValueError: no such key", "more"], 1) == "ValueError: no such key"
    lines = ["[rank1]: RuntimeError: connection closed", "traceback : Signal 9 (SIGKILL) received by PID 7"]
    assert "memory ran out" in failure_reason(lines, 1)
    assert failure_reason(["a", "killed", ""], -9) == "exit code -9: killed"
    assert failure_reason([], 1) == "exit code 1: it said nothing"


def test_a_failing_command_ends_the_stage_and_keeps_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    with pytest.raises(StageFailed, match="no model here .*x.log"):
        run_command(["-c", "print('error: no model here'); raise SystemExit(2)"], log)
    assert "no model here" in log.read_text()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".bashrc").write_text("")
    with pytest.raises(ValueError, match=r"holds other things \(\.bashrc\)"):
        prepare_output(Paths(tmp_path), Settings())
    assert (tmp_path / ".bashrc").exists()
    with pytest.raises(ValueError, match="not a folder"):
        prepare_output(Paths(tmp_path / ".bashrc"), Settings())


def test_only_stale_and_partial_work_is_removed(tmp_path: Path) -> None:
    paths, settings = Paths(tmp_path / "demo"), Settings()
    assert prepare_output(paths, settings)
    for path in (paths.model, paths.imported, paths.output / "checkpoints" / ".imported.partial-1"):
        path.mkdir(parents=True)
    assert prepare_output(paths, settings)
    assert paths.imported.exists() and not (paths.output / "checkpoints" / ".imported.partial-1").exists()
    assert not prepare_output(paths, dataclasses.replace(settings, steps=settings.steps + 2))
    assert not paths.imported.exists() and paths.model.exists()


def test_a_moved_folder_is_made_again(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "here")
    prepare_output(paths, Settings())
    paths.imported.mkdir(parents=True)
    paths.output.rename(tmp_path / "there")
    assert not prepare_output(Paths(tmp_path / "there"), Settings())


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    other = "import sys; from pathlib import Path; from examples.quickstart.console import only_run\n"
    other += "with only_run(Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", other, str(tmp_path)]
    root = Path(__file__).resolve().parents[3]
    with only_run(tmp_path):
        refused = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert refused.returncode != 0 and "is in use by another run" in refused.stderr
    assert subprocess.run(command, cwd=root, capture_output=True, text=True).returncode == 0
