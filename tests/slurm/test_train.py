"""slurm/train.sbatch on two nodes: preempted it resumes, without a node it resumes, and what cannot run is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from megatron_rpsd.runs.checkpoints import complete_iterations
from tests.slurm.conftest import CONTAINER, MANY, ROOT

SCRIPT = ROOT / "slurm" / "train.sbatch"


def events(run: Path) -> list[tuple]:
    """(what, iteration) of every line of an attempt."""
    path = run / "attempts.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return [(line["event"], line["iteration"]) for line in lines]


def steps_after(log: Path, mark: int) -> int:
    """Steps that the log tells of from its character `mark` on."""
    return len(re.findall(r" iteration +\d+/", log.read_text()[mark:])) if log.is_file() else 0


@pytest.fixture(scope="module")
def others(cluster, workplace, arguments, container, tmp_path_factory):
    """Jobs that wait for Slurm more than they compute, queued before the long one: {name: (folder, number)}."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("wrong", "crash", "verify", "import")}
    two, hf, convert = ["--tensor-model-parallel-size", 2], workplace / "hf", ROOT / "slurm" / "convert.sbatch"
    fails = container(folders["crash"] / "apptainer", "torch.distributed.run") | {"RPSD_MAX_FRUITLESS": "2"}
    words = {
        "wrong": [SCRIPT, folders["wrong"] / "run", arguments(MANY), "--", *two],
        "crash": ["--nodes", 2, SCRIPT, folders["crash"] / "run", arguments(MANY)],
        "verify": [convert, "verify", "--hf", hf, "--checkpoint", workplace / "checkpoint"],
        "import": [convert, "import", "--hf", hf, "--output", folders["import"] / "checkpoint", *two],
    }
    jobs = {}
    for name, folder in folders.items():
        variables = fails if name == "crash" else {}
        jobs[name] = folder, cluster.sbatch("--output", folder / "log", *words[name], environment=variables)
    return jobs


@pytest.mark.parametrize("python", [None, pytest.param(sys.executable, marks=pytest.mark.slow)], ids=["fast", "real"])
def test_a_run_survives_preemption_and_the_loss_of_a_node(cluster, arguments, others, python, tmp_path):
    variables = {} if python is None else {"PYTHON": python, "PYTHON_EXEC": python}
    log, run, flags = tmp_path / "log", tmp_path / "run", tmp_path / "args.txt"
    shutil.copyfile(arguments(MANY), flags)
    words = ["--nodes", 2, "--output", log, SCRIPT, run, flags, "--", "--keep-checkpoints", 2]
    job = cluster.sbatch(*words, environment=variables)
    # What a pipeline does behind it: it must not take a run that is queued again for one that ended.
    after = cluster.sbatch(f"--dependency=afterok:{job}", "--output", tmp_path / "after", "--wrap", "echo after")
    cluster.until(lambda: steps_after(log, 0) > 1, "the second step", 400)
    cluster.command("scancel", "--batch", "--signal", "USR1", job)  # as --signal does ahead of the limit
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", "the job queued again", 200)
    saved, mark = max(complete_iterations(run / "checkpoints")), len(log.read_text())
    assert saved > 0 and events(run) == [("begin", 0), ("end", saved)]
    assert (cluster.job(after)["JobState"], cluster.job(after)["Reason"]) == ("PENDING", "Dependency")

    cluster.until(lambda: steps_after(log, mark) > 5, "steps and a checkpoint of the second attempt", 400)
    assert events(run)[-1] == ("begin", saved)
    for state in ("DRAIN", "DOWN"):  # drained it is not used again, though it reports, until that is taken back
        cluster.command("scontrol", "update", "NodeName=node2", f"State={state}", "Reason=test")
    cluster.until(lambda: cluster.job(job)["Restarts"] == "2", "the job queued after its node was lost", 200)
    newest = max(complete_iterations(run / "checkpoints"))  # ranks that the end reaches as a signal write one more
    last = newest + 15  # flags are read again at each attempt
    shorter = flags.read_text().replace(f"--train-iters\n{MANY}", f"--train-iters\n{last}")
    flags.write_text(shorter + "--override-opt-param-scheduler\n")  # Megatron's schedule is one of so many steps
    cluster.command("scontrol", "update", "NodeName=node2", "State=RESUME")

    ended = cluster.wait(job, 600)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()[-2000:]
    assert json.loads((run / "finished.json").read_text())["iteration"] == last
    whats, iterations = zip(*events(run), strict=True)
    assert whats == ("begin", "end", "begin", "begin", "end")  # the lost attempt has no end
    assert iterations[:3] == (0, saved, saved) and saved < newest <= iterations[3] < iterations[4] == last
    assert f"finished: finished at iteration {last}" in log.read_text()
    kept = complete_iterations(run / "checkpoints")
    assert len(kept) == 2 and (run / "submitted.sbatch").read_bytes() == SCRIPT.read_bytes()
    assert cluster.wait(after, 60)["JobState"] == "COMPLETED"


def test_a_conversion_runs_as_a_job_and_refuses_what_cannot_run(cluster, others):
    folder, job = others["verify"]
    assert cluster.wait(job, 300)["JobState"] == "COMPLETED"
    assert "equal, verified" in (folder / "log").read_text()
    folder, job = others["import"]
    ended = cluster.wait(job, 300)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    (line,) = (folder / "log").read_text().splitlines()
    assert line.startswith(
        "error: --tensor-model-parallel-size 2 x --pipeline-model-parallel-size 1 = 2 ranks, 1 started"
    )


def test_a_wrong_size_is_refused_before_any_rank_starts(cluster, others):
    folder, job = others["wrong"]
    ended = cluster.wait(job, 300)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    (line,) = (folder / "log").read_text().splitlines()
    assert "1 processes were started, and TP x CP x PP = 2 x 1 x 1 = 2 does not divide them" in line
    assert not (folder / "run" / "attempts.jsonl").exists()


def test_a_loop_of_crashes_ends_with_its_reason(cluster, others):
    folder, job = others["crash"]
    ended = cluster.wait(job, 300)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "1")
    last = (folder / "log").read_text().splitlines()[-1]
    assert last.startswith("stop: 2 attempts in a row (limit 2) brought no new checkpoint, the last with exit code 3")
    started = (folder / "apptainer").read_text().splitlines()
    image = CONTAINER.removeprefix("apptainer ")
    assert len(started) == 8 and all(line.startswith(image) for line in started)  # 2 x begin, 2 nodes, end
    launches = [line.split()[4:] for line in started if "torch.distributed.run" in line]
    assert sorted(words[3] for words in launches) == ["--node-rank=0"] * 2 + ["--node-rank=1"] * 2
    assert all(words[:3] == ["-m", "torch.distributed.run", "--nnodes=2"] for words in launches)
