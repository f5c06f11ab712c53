"""A run's status out of its folder's files: never started, running, silent, dead, finished; and no run at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpsd.runs.checkpoints import iteration_folder
from megatron_rpsd.runs.checksums import CHECKSUMS, write_checksums
from megatron_rpsd.runs.events import record_event
from megatron_rpsd.runs.folder import RunFolder
from megatron_rpsd.runs.status import read_status
from megatron_rpsd.runs.status_page import duration, status_lines

TOOL = Path(__file__).resolve().parents[3] / "tools" / "status.py"
BEGAN = 1_700_000_000.0
"""When the first start was made; steps take ten seconds."""


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.arguments.write_text(json.dumps({"train_iters": 100, "global_batch_size": 4, "seq_length": 32}))
    return folder


def add(path: Path, *entries: dict) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def start(run: RunFolder, time: float, iteration: int = 0) -> None:
    add(run.origins, {"time": time, "iteration": iteration, "host": "node1", "world_size": 8})
    add(run.metrics, {"units": {}})


def steps(run: RunFolder, first: int, last: int, time: float, seconds: float = 10.0) -> float:
    """Log steps `first` to `last`; when the last one was logged."""
    for step in range(first, last + 1):
        time += seconds
        add(run.metrics, {"iteration": step, "time": time, "lm loss": 5 - step / 100, "tokens per second": 12.8})
    return time


def checkpoint(run: RunFolder, iteration: int) -> Path:
    folder = iteration_folder(run.checkpoints, iteration)
    folder.mkdir(parents=True)
    write_checksums(folder, {})
    return folder


def test_a_running_run_says_how_far_how_fast_and_until_when(run):
    start(run, BEGAN)
    checkpoint(run, 20)
    now = steps(run, 1, 25, BEGAN) + 5
    status = read_status(run.path, now=now)
    assert (status.state, status.iteration, status.total, status.step_age_s) == ("running", 25, 100, 5)
    assert status.rate.steps_per_s == pytest.approx(0.1) and status.rate.step_s == pytest.approx(10)
    assert status.rate.tokens_per_s == pytest.approx(0.1 * 4 * 32)
    assert status.remaining_s == pytest.approx(750) and status.ends == pytest.approx(now + 750)
    assert status.checkpoint == 20 and status.warnings == ()
    assert status.logged == {"lm loss": 4.75, "tokens per second": 12.8}
    assert [entry.ended for entry in status.starts] == [None]
    page = "\n".join(status_lines(status, now))
    assert "running, 25 of 100 steps" in page and "[#######......................." in page and "in 12 min 30 s" in page


def test_only_the_newest_steps_of_this_start_count_for_the_rate(run):
    start(run, BEGAN)
    end = steps(run, 1, 10, BEGAN)
    start(run, end + 3600, 8)
    now = steps(run, 9, 90, end + 3600, seconds=2.0)
    status = read_status(run.path, now=now)
    assert status.rate.steps_per_s == pytest.approx(0.5)  # not the hour's pause, nor the slower start before it
    assert status.iteration == 90 and [entry.iteration for entry in status.starts] == [0, 8]
    assert status.starts[0].ended == "no end was recorded: killed, or its node was lost"


@pytest.mark.parametrize(("silence", "state"), [(99, "running"), (101, "silent")])
def test_a_run_is_silent_after_so_many_times_a_step(silence, state, run):
    start(run, BEGAN)
    status = read_status(run.path, stale_after=10, now=steps(run, 1, 5, BEGAN) + silence)
    assert status.state == state
    assert any("nothing was logged for 101 s, more than the 100 s" in line for line in status.warnings) == (
        state == "silent"
    )


def test_a_pause_like_the_ones_before_is_no_silence(run):
    start(run, BEGAN)
    evaluated = steps(run, 1, 5, BEGAN) + 400  # an evaluation, after which the next step is logged
    now = steps(run, 6, 9, evaluated) + 500
    assert read_status(run.path, now=now).state == "running"
    assert read_status(run.path, now=now + 200).state == "silent"


def test_a_run_that_never_started(run):
    run.attempts.write_text(json.dumps({"event": "begin", "time": BEGAN, "iteration": 0}) + "\n")
    assert read_status(run.path, now=BEGAN).state == "never started"
    run.error.write_text("--lr is missing\n")
    status = read_status(run.path, now=BEGAN)
    assert status.state == "failed" and status.warnings == ("error.txt: --lr is missing",)
    assert "checkpoint  none" in "\n".join(status_lines(status, BEGAN))


def test_a_start_without_a_step_is_starting(run):
    start(run, BEGAN)
    status = read_status(run.path, now=BEGAN + 60)
    assert (status.state, status.iteration, status.step_age_s, status.rate) == ("starting", 0, 60, None)


def test_why_each_start_ended(run):
    start(run, BEGAN)
    start(run, BEGAN + 100)
    add(run.events, {"time": BEGAN + 150, "event": "asked to stop", "text": "asked to leave by the file stop"})
    add(run.events, {"time": BEGAN + 151, "event": "ended", "text": "the process left by itself", "crashed": False})
    start(run, BEGAN + 200, 10)
    add(run.attempts, {"time": BEGAN + 250, "event": "end", "code": 137, "asked": False})
    start(run, BEGAN + 300, 10)
    add(run.events, {"time": BEGAN + 350, "event": "ended", "text": "RuntimeError: out of memory", "crashed": True})
    status = read_status(run.path, now=BEGAN + 400)
    assert [entry.ended for entry in status.starts] == [
        "no end was recorded: killed, or its node was lost",
        "asked to leave by the file stop",
        "the ranks left with exit code 137",
        "RuntimeError: out of memory",
    ]
    assert status.state == "failed"


def error(run: RunFolder, text: str, time: float) -> None:
    run.error.write_text(f"{text}\n")
    os.utime(run.error, (time, time))


def test_an_error_is_the_runs_own_or_that_of_a_start_that_was_refused(run):
    start(run, BEGAN)
    now = steps(run, 1, 5, BEGAN)
    error(run, "step 6: the loss of samples 9 is not finite", now + 1)
    refused = read_status(run.path, now=now + 60)
    assert refused.state == "failed" and refused.starts[0].ended.startswith("no end was recorded")
    assert refused.warnings == ("error.txt: step 6: the loss of samples 9 is not finite",)
    add(run.events, {"time": now + 1.5, "event": "ended", "text": "the process left by itself", "crashed": False})
    own = read_status(run.path, now=now + 60)
    assert (own.state, own.starts[0].ended) == ("failed", "step 6: the loss of samples 9 is not finite")


def test_a_second_start_that_was_refused_does_not_end_the_first(run):
    start(run, BEGAN)
    error(run, "--lr is missing", steps(run, 1, 5, BEGAN) + 1)
    now = steps(run, 6, 7, BEGAN + 50)
    assert read_status(run.path, now=now).state == "running"


def test_a_run_that_left_as_asked_is_stopped(run):
    start(run, BEGAN)
    now = steps(run, 1, 5, BEGAN)
    run.stop.touch()
    add(run.events, {"time": now, "event": "asked to stop", "text": "asked to leave by the file stop"})
    assert read_status(run.path, now=now + 5).state == "running"  # its checkpoint is being written
    add(run.events, {"time": now + 6, "event": "ended", "text": "the process left by itself", "crashed": False})
    status = read_status(run.path, now=now + 7)
    assert status.state == "stopped" and "asked to write a checkpoint" in status.warnings[-1]


def test_a_finished_run(run):
    start(run, BEGAN)
    now = steps(run, 99, 100, BEGAN)
    run.finished.write_text(json.dumps({"iteration": 100, "time": now}))
    status = read_status(run.path, now=now + 10**6)
    assert (status.state, status.iteration, status.remaining_s) == ("finished", 100, None)
    assert status.starts[0].ended == "finished" and status.warnings == ()


def test_what_befell_it_is_warned_of(run):
    start(run, BEGAN)
    record_event(run.events, "skipped", "step 3: the loss of samples 9 is not finite; its update is skipped")
    record_event(run.events, "skipped", "step 4: the loss of samples 12 is not finite; its update is skipped")
    record_event(run.events, "no room", "no checkpoint of iteration 4 is written")
    (run.checkpoints / "damaged-iter_0000002").mkdir(parents=True)
    warnings = read_status(run.path, now=BEGAN).warnings
    assert warnings[0] == "no checkpoint of iteration 4 is written"
    assert warnings[1].startswith("step 4: the loss of samples 12") and warnings[1].endswith("(2 of this kind)")
    assert warnings[2] == "damaged checkpoints lie in checkpoints: damaged-iter_0000002"


def test_a_checkpoint_without_its_sums_is_not_whole(run):
    start(run, BEGAN)
    checkpoint(run, 10)
    (checkpoint(run, 20) / CHECKSUMS).unlink()
    assert read_status(run.path, now=BEGAN).checkpoint == 10


def test_lines_that_a_kill_tore_are_left_out(run):
    start(run, BEGAN)
    now = steps(run, 1, 4, BEGAN)
    with run.metrics.open("a") as file:
        file.write('{"iteration": 5, "ti')
    assert read_status(run.path, now=now).iteration == 4


def test_the_tool_answers_in_json_or_in_one_line_and_without_torch(run, tmp_path):
    start(run, BEGAN)
    steps(run, 1, 3, BEGAN)
    blocked = tmp_path / "blocked"  # importing torch or Megatron would fail here
    for name in ("torch", "megatron", "numpy"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise SystemExit('imported')\n")

    def call(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(TOOL), *words], capture_output=True, text=True, env={"PYTHONPATH": str(blocked)}
        )

    answered = call(str(run.path), "--json")
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout)["state"] == "silent"
    for words in ([str(tmp_path / "absent")], [str(blocked)], [str(run.path), "--stale-after", "0"]):
        refused = call(*words)
        assert refused.returncode == 2 and refused.stdout == "" and len(refused.stderr.splitlines()) == 1


def test_durations_have_two_units():
    assert [duration(s) for s in (0, 5, 60, 200, 7500, 277_000)] == [
        "0 s", "5 s", "1 min", "3 min 20 s", "2 h 5 min", "3 d 4 h"
    ]  # fmt: skip
