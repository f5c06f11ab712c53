"""Attempts: what follows each, and when a loop of crashes ends."""

from __future__ import annotations

import json

import pytest

from megatron_rpsd.runs.attempts import Verdict, begin, end, records, write_command
from megatron_rpsd.runs.checkpoints import iteration_folder
from megatron_rpsd.runs.checksums import write_checksums
from megatron_rpsd.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def save(run: RunFolder, iteration: int) -> None:
    folder = iteration_folder(run.checkpoints, iteration)
    folder.mkdir(parents=True)
    write_checksums(folder, {})


def test_a_crash_with_progress_is_queued_again_for_ever(run):
    for attempt in range(6):
        assert begin(run.path, 2) == 10 * attempt
        save(run, 10 * (attempt + 1))
        ending = end(run.path, 1, 2)
        assert ending.verdict is Verdict.REQUEUE and f"iteration {10 * (attempt + 1)}" in ending.reason


def test_a_loop_of_crashes_ends_with_its_reason(run):
    begin(run.path, 3)
    save(run, 10)
    end(run.path, 1, 3)
    for code in (7, 8):
        assert begin(run.path, 3) == 10
        assert end(run.path, code, 3).verdict is Verdict.REQUEUE
    begin(run.path, 3)
    ending = end(run.path, 9, 3)
    assert ending.verdict is Verdict.STOP
    assert "3 attempts in a row (limit 3) brought no new checkpoint, the last with exit code 9" in ending.reason
    with pytest.raises(ValueError, match="3 attempts in a row"):
        begin(run.path, 3)


def test_attempts_whose_node_was_lost_count(run):
    for _ in range(2):
        begin(run.path, 2)  # no end: the batch host died
    with pytest.raises(
        ValueError, match="2 attempts in a row .* brought no new checkpoint: the newest is of iteration 0"
    ):
        begin(run.path, 2)


def test_leaving_as_asked_counts_for_none(run):
    for _ in range(5):
        begin(run.path, 2)
        run.stop.touch()
        ending = end(run.path, 0, 2)
        assert ending.verdict is Verdict.REQUEUE and ending.reason.startswith("asked to leave")
    begin(run.path, 2)
    assert not run.stop.exists()  # an old request is not the new attempt's


def test_a_finished_run_is_finished(run):
    begin(run.path, 2)
    run.finished.write_text(json.dumps({"iteration": 40}))
    ending = end(run.path, 0, 2)
    assert ending.verdict is Verdict.FINISHED and ending.reason == "finished at iteration 40"
    with pytest.raises(ValueError, match="is finished"):
        begin(run.path, 2)


def test_what_would_fail_again_stops_at_once(run):
    begin(run.path, 5)
    run.error.write_text("step 3: the loss of samples 9 is not finite\n")
    ending = end(run.path, 1, 5)
    assert ending.verdict is Verdict.STOP and ending.reason == "step 3: the loss of samples 9 is not finite"
    begin(run.path, 5)
    assert not run.error.exists()


def test_a_torn_last_line_is_no_attempt(run):
    begin(run.path, 2)
    with run.attempts.open("a") as file:
        file.write('{"event": "be')
    assert len(records(run)) == 1
    end(run.path, 1, 2)
    assert [line["event"] for line in records(run)] == ["begin", "end"]


def test_the_command_is_kept_word_by_word(run, tmp_path):
    (tmp_path / "a.txt").write_text("# base\n--lr 1e-5 --name 'two words'\n")
    script = tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\n")
    words = write_command(run.path, [tmp_path / "a.txt"], ["--lr", "2e-5"], script)
    assert words == ["--run-dir", str(run.path), "--lr", "1e-5", "--name", "two words", "--lr", "2e-5"]
    assert run.command.read_text().split("\0")[:-1] == words and run.script.read_text() == "#!/bin/bash\n"
    (tmp_path / "b.txt").write_text("--name 'open\n")
    with pytest.raises(ValueError, match="b.txt cannot be split into flags"):
        write_command(run.path, [tmp_path / "b.txt"], [], None)
    with pytest.raises(ValueError, match="none.txt is no file of flags"):
        write_command(run.path, [tmp_path / "none.txt"], [], None)
