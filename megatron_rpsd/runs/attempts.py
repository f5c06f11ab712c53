"""Attempts of a run under a batch system: each begins and ends here, and a loop of crashes comes to its end.

The batch script calls `begin` before the ranks start and `end` after they left; what `end` answers decides whether the
job is queued again. No torch: it runs on the batch host in a moment.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron_rpsd.runs.checkpoints import complete_iterations
from megatron_rpsd.runs.events import json_lines
from megatron_rpsd.runs.folder import RunFolder

_ERROR = re.compile(r"(error|stop): ")


class Verdict(Enum):
    """What follows an attempt."""

    FINISHED = "finished"
    REQUEUE = "requeue"
    STOP = "stop"


@dataclass(frozen=True)
class Ending:
    """A verdict and, in one line, why."""

    verdict: Verdict
    reason: str


def records(run: RunFolder) -> list[dict]:
    """The attempts' lines, oldest first, without those that a kill tore."""
    return json_lines(run.attempts)


def _append(run: RunFolder, record: dict) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    text = run.attempts.read_text(encoding="utf-8") if run.attempts.is_file() else ""
    with run.attempts.open("a", encoding="utf-8") as file:
        torn = "" if not text or text.endswith("\n") else "\n"
        file.write(torn + json.dumps({"time": time.time(), **record}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _newest(run: RunFolder) -> int:
    return max(complete_iterations(run.checkpoints), default=0)


def fruitless(lines: list[dict], newest: int) -> int:
    """Attempts at the list's end that began and brought no checkpoint beyond the one they began with.

    A begin without an end is an attempt whose node was lost. One that left because it was asked to counts for none.
    """
    begins = [index for index, line in enumerate(lines) if line["event"] == "begin"]
    count = 0
    for index in reversed(begins):
        ended = lines[index + 1] if index + 1 < len(lines) and lines[index + 1]["event"] == "end" else {}
        if newest > lines[index]["iteration"]:
            break
        count += not ended.get("asked", False)
    return count


def refuse_hopeless(run: Path, max_fruitless: int) -> None:
    """Raise ValueError where another attempt has nothing to do, or too many in a row came to nothing."""
    folder = RunFolder(run)
    if folder.finished.is_file():
        raise ValueError(f"{folder.finished} says that this run is finished; nothing is left to do")
    lost = fruitless(records(folder), _newest(folder))
    if lost >= max_fruitless:
        raise ValueError(_crash_loop(folder, lost, max_fruitless))


def begin(run: Path, max_fruitless: int) -> int:
    """Start an attempt; an old request to stop, and an old error, are taken back.

    Args:
        max_fruitless: attempts without a new checkpoint, in a row, after which none is started any more.

    Returns:
        The iteration of the newest checkpoint; 0 for none.

    Raises:
        ValueError: the run is finished or has crashed too often.
    """
    refuse_hopeless(run, max_fruitless)
    folder = RunFolder(run)
    iteration = _newest(folder)
    folder.stop.unlink(missing_ok=True)
    folder.error.unlink(missing_ok=True)
    slurm = {name: value for name, value in os.environ.items() if name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")}
    _append(folder, {"event": "begin", "iteration": iteration, **slurm})
    return iteration


def end(run: Path, code: int, max_fruitless: int) -> Ending:
    """Finish an attempt whose ranks left with `code`, and say what follows."""
    folder = RunFolder(run)
    asked = folder.stop.is_file()
    newest = _newest(folder)
    _append(folder, {"event": "end", "iteration": newest, "code": code, "asked": asked})
    if folder.finished.is_file():
        return Ending(Verdict.FINISHED, f"finished at iteration {json.loads(folder.finished.read_text())['iteration']}")
    if folder.error.is_file():
        return Ending(Verdict.STOP, folder.error.read_text(encoding="utf-8").strip())
    if asked:
        return Ending(Verdict.REQUEUE, f"asked to leave; the newest checkpoint is of iteration {newest}")
    lost = fruitless(records(folder), newest)
    if lost >= max_fruitless:
        return Ending(Verdict.STOP, _crash_loop(folder, lost, max_fruitless))
    return Ending(
        Verdict.REQUEUE, f"the ranks left with exit code {code}; the newest checkpoint is of iteration {newest}"
    )


def last_words(log: Path) -> str:
    """Why a job ended, by its log: its last error, else its last line that is not srun's own."""
    if not log.is_file():
        return f"it never began, there is no {log}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("srun: ")]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [f"{log} is empty"])[-1]


def _crash_loop(folder: RunFolder, lost: int, limit: int) -> str:
    codes = [line["code"] for line in records(folder) if line["event"] == "end"]
    last = f", the last with exit code {codes[-1]}" if codes else ""
    return (
        f"{lost} attempts in a row (limit {limit}) brought no new checkpoint{last}: the newest is of iteration "
        f"{_newest(folder)}; mend the cause, then remove {folder.attempts}"
    )


def command_words(run: Path, files: Sequence[Path], typed: Sequence[str]) -> list[str]:
    """The training's arguments: --run-dir, the words of the files, what was typed.

    Args:
        files: flags, words as a shell would read them; `#` starts a comment.

    Raises:
        ValueError: a file is absent or cannot be split into words.
    """
    words = ["--run-dir", str(run)]
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is no file of flags")
        try:
            words += shlex.split(path.read_text(encoding="utf-8"), comments=True)
        except ValueError as error:
            raise ValueError(f"{path} cannot be split into flags: {error}") from error
    return words + list(typed)


def write_command(run: Path, files: Sequence[Path], typed: Sequence[str], script: Path | None) -> list[str]:
    """`command_words`, kept in the run's folder; of `script`, the batch script, a copy beside it."""
    words = command_words(run, files, typed)
    folder = RunFolder(run)
    run.mkdir(parents=True, exist_ok=True)
    folder.command.write_text("".join(f"{word}\0" for word in words), encoding="utf-8")
    if script is not None:
        shutil.copyfile(script, folder.script)
    return words
