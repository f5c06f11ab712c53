"""slurm/pipeline.sh: from a Hugging Face folder to a report, and how a user hears of a failure."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT

EVALUATION = ["--tasks", "niah_single_1", "vt", "--lengths", "1024", "--num-samples", "2", "--device", "cpu"]


def settings(path: Path, hf: Path, files: Path, **changed: str) -> Path:
    """A pipeline of the tiny model on CPUs."""
    tables = {
        "train": f'files = ["{files}"]\nnodes = 2\n',
        "export": "ranks_per_node = 2\n",
        "evaluate": f'arguments = "{" ".join(EVALUATION)}"\n',
        **changed,
    }
    path.write_text(f'hf = "{hf}"\n' + "".join(f"[{name}]\n{text}" for name, text in tables.items()))
    return path


def call(cluster, *words: object, **variables: str) -> subprocess.CompletedProcess:
    """A script on the submit host."""
    environment = {**cluster.environment, "RPSD_POLL_SECONDS": "0.5", **variables}
    return subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=400)


def states(run: Path) -> dict[str, str]:
    return {step["name"]: step["state"] for step in json.loads((run / "pipeline.json").read_text())["steps"]}


def scores(output: Path) -> dict:
    """scores.json without what tells two runs of one evaluation apart."""
    found = json.loads((output / "scores.json").read_text())
    del found["provenance"]["command"], found["provenance"]["seconds"]
    return found


def page(output: Path) -> str:
    """report.html without the same."""
    return re.sub(r"<tr><td>(command|seconds)</td>.*?</tr>", "", (output / "report.html").read_text())


def evaluate_here(cluster, *words: object) -> None:
    """The same evaluation by one process."""
    python = [cluster.environment["PYTHON"], "tools/evaluate.py"]
    done = subprocess.run([*python, *map(str, words)], cwd=ROOT, env=cluster.environment, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_pipeline_fails_with_its_reason_and_goes_on_to_its_report(cluster, workplace, arguments, container, tmp_path):
    run, log = tmp_path / "run", tmp_path / "apptainer"
    given = settings(tmp_path / "settings.toml", workplace / "hf", arguments(3, pipeline=True))
    script = ROOT / "slurm" / "pipeline.sh"
    failed = call(cluster, script, "--wait", run, given, **container(log, "convert_checkpoint.py import"))
    assert failed.returncode == 1, failed.stderr
    assert failed.stdout.splitlines()[-1] == "failed: import: FATAL: no such image"
    assert states(run) == {"import": "failed", "train": "cancelled", "export": "cancelled", "evaluate": "cancelled"}
    assert not (run / "imported").exists() and "training.main" not in log.read_text()

    assert call(cluster, script, run, given).returncode == 0
    again = call(cluster, script, run, given)
    assert again.returncode == 2 and f"error: a pipeline of {run} is queued already" in again.stderr
    finished = call(cluster, script, "--wait", run)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = run / "ruler" / "report.html"
    assert finished.stdout.splitlines()[-1] == f"finished: {report}" and report.is_file()
    assert set(states(run).values()) == {"done"}
    evaluate_here(cluster, "--hf", run / "exported", *EVALUATION, "--output", tmp_path / "alone")
    assert scores(run / "ruler") == scores(tmp_path / "alone")
    assert page(run / "ruler") == page(tmp_path / "alone")
    for name in ("predictions/niah_single_1-1024.jsonl", "predictions/vt-1024.jsonl", "samples.jsonl"):
        assert (run / "ruler" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"trian": ""}, "trian is no setting; there are hf and the tables import, train, export, evaluate, report"),
        ({"train": "nodes = 0\n"}, "[train] nodes = 0 must be a whole number of at least 1"),
    ],
)
def test_settings_that_are_none_queue_nothing(cluster, workplace, tmp_path, changed, line):
    given = settings(tmp_path / "settings.toml", workplace / "hf", tmp_path / "args.txt", **changed)
    before = cluster.command("squeue", "--noheader", "--states", "all", "--format", "%A")
    done = call(cluster, ROOT / "slurm" / "pipeline.sh", tmp_path / "run", given)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: ") and line in said
    assert cluster.command("squeue", "--noheader", "--states", "all", "--format", "%A") == before


def test_a_job_that_slurm_refuses_takes_the_others_back(cluster, workplace, arguments, tmp_path):
    export = "ranks_per_node = 1\nsbatch = '--partition nowhere'\n"
    given = settings(tmp_path / "settings.toml", workplace / "hf", arguments(3, pipeline=True), export=export)
    done = call(cluster, ROOT / "slurm" / "pipeline.sh", tmp_path / "run", given)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: sbatch refuses") and "partition" in last
    assert not (tmp_path / "run" / "pipeline.json").exists()
    for line in done.stdout.splitlines():
        assert cluster.wait(line.split()[-1])["JobState"] == "CANCELLED"


def test_a_part_that_fails_is_named_and_queued_again_alone(cluster, workplace, container, tmp_path):
    output, log = tmp_path / "output", tmp_path / "apptainer"
    words = [ROOT / "slurm" / "evaluate.sh", "--", "--hf", workplace / "hf", *EVALUATION, "--output", output]

    def queue(**variables: str) -> tuple[str, dict[str, str], str]:
        """The first line that it printed, the last job once it ended, and that one's log."""
        done = call(cluster, *words, **variables)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        job = re.search(r"report: job (\d+)", lines[-1])[1]
        return lines[0], cluster.wait(job), (output / f"report-{job}.log").read_text()

    first, ended, said = queue(**container(log, "--part 1"))
    assert "2 of them" in first and (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    reason = "part 1, vt-1024 (0 samples answered: FATAL: no such image)"
    assert f"1 of 2 parts are not whole: {reason}; queue them again" in said
    assert not (output / "scores.json").exists()
    again, ended, said = queue(**container(log))
    assert "1 of them" in again and ended["JobState"] == "COMPLETED", said
    assert sum("--part 0" in line for line in log.read_text().splitlines()) == 1
    evaluated = json.loads((output / "scores.json").read_text())
    assert evaluated["tasks"] == ["niah_single_1", "vt"] and (output / "report.html").is_file()
    third, ended, _ = queue()
    assert third.startswith("report: job") and ended["JobState"] == "COMPLETED"  # nothing is left but the report
    refused = call(cluster, *words, "--lengths", "512")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.splitlines()[-1].startswith("error: --length 512 cannot hold a sample of vt")
