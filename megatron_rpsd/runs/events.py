"""What befell a run, one JSON object a line: for whoever asks later, when the log is gone or was never kept."""

from __future__ import annotations

import atexit
import json
import sys
import time
from pathlib import Path

KINDS = ("set aside", "no room", "skipped", "asked to stop", "ended")
"""A checkpoint that is not trusted; one that was not written; a step without an update; a request to leave; an end."""


def record_event(path: Path, kind: str, text: str, **given) -> None:
    """Add a line; the folder is made."""
    assert kind in KINDS, kind
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.time(), "event": kind, "text": text, **given}) + "\n")


def record_end(path: Path) -> None:
    """Let this process's end be recorded, where Python lives to see it: a kill leaves no line."""

    def ended() -> None:
        error = getattr(sys, "last_exc", None)  # what the interpreter has printed a traceback of
        lines = str(error).strip().splitlines()
        text = "the process left by itself" if error is None else f"{type(error).__name__}: {lines[0] if lines else ''}"
        record_event(path, "ended", text, crashed=error is not None)

    atexit.register(ended)


def json_lines(path: Path, tail_bytes: int | None = None) -> list[dict]:
    """The objects of a file of JSON lines, oldest first; none where it is absent.

    A line that a kill tore, or that is being written, is left out.

    Args:
        tail_bytes: read no more than this much of the file's end.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = 0
        if tail_bytes is not None:
            start = max(0, path.stat().st_size - tail_bytes)
            file.seek(start)
        lines = file.read().split(b"\n")
    if start:
        lines = lines[1:]  # it began before
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found
