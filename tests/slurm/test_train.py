"""slurm/train.sbatch on two nodes: preempted it resumes, without a node it resumes, and what cannot run is refused."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rpsd.runs.checkpoints import complete_iterations
from tests.slurm.conftest import ROOT

SCRIPT = ROOT / "slurm" / "train.sbatch"
STEPS = 240


def events(run: Path) -> list[tuple]:
    """(what, iteration) of every line of an attempt."""
    path = run / "attempts.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return [(line["event"], line["iteration"]) for line in lines]


def steps_after(log: Path, mark: int) -> int:
    """Steps that the log tells of from its character `mark` on."""
    return log.read_text()[mark:].count(" iteration ") if log.is_file() else 0


def test_a_run_survives_preemption_and_the_loss_of_a_node(cluster, arguments, tmp_path):
    log, run = tmp_path / "log", tmp_path / "run"
    typed = ["--save-interval", 20, "--keep-checkpoints", 2]
    job = cluster.sbatch("--nodes", 2, "--output", log, SCRIPT, run, arguments(STEPS), "--", *typed)
    cluster.until(lambda: steps_after(log, 0) > 2, "the third step", 400)
    cluster.command("scancel", "--batch", "--signal", "USR1", job)  # as --signal does ahead of the limit
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", "the job queued again", 200)
    saved, mark = max(complete_iterations(run / "checkpoints")), len(log.read_text())
    assert 0 < saved < STEPS and events(run) == [("begin", 0), ("end", saved)]

    cluster.until(lambda: steps_after(log, mark) > 2, "steps of the second attempt", 400)
    assert events(run)[-1] == ("begin", saved)
    cluster.command("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    cluster.until(lambda: cluster.job(job)["Restarts"] == "2", "the job queued after its node was lost", 200)
    # ReturnToService=2: a node that reports again serves again.

    ended = cluster.wait(job, 600)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()[-2000:]
    assert json.loads((run / "finished.json").read_text())["iteration"] == STEPS
    assert len(events(run)) == 5 and events(run)[-1] == ("end", STEPS)  # the lost attempt has no end
    assert f"finished: finished at iteration {STEPS}" in log.read_text()
    assert (
        len(complete_iterations(run / "checkpoints")) == 2
        and (run / "submitted.sbatch").read_bytes() == SCRIPT.read_bytes()
    )


def test_a_wrong_size_is_refused_before_any_rank_starts(cluster, arguments, tmp_path):
    log, run = tmp_path / "log", tmp_path / "run"
    typed = ["--tensor-model-parallel-size", 2, "--context-parallel-size", 2]
    job = cluster.sbatch("--nodes", 2, "--output", log, SCRIPT, run, arguments(4), "--", *typed)
    ended = cluster.wait(job, 300)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    (line,) = log.read_text().splitlines()
    assert "2 processes were started, and TP x CP x PP = 2 x 2 x 1 = 4 does not divide them" in line
    assert not (run / "attempts.jsonl").exists()
