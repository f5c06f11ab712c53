"""Writing results so that no half of one is ever found under its name, and by one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(folder: Path, taken: str, with_commands: bool = False) -> Iterator[None]:
    """`folder` for this process alone, made where it is missing; the system lets go when the process ends, however.

    Args:
        taken: what to tell a user where another process holds it, in one line.
        with_commands: whether commands that the process starts hold it too, should they outlive it.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(taken) from None
        os.set_inheritable(lock.fileno(), with_commands)
        yield


def replace_file(path: str | Path, content: bytes) -> None:
    """`content` at `path`, written aside and renamed; folders above it are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def write_json(path: str | Path, value: object) -> None:
    """`value` as JSON, as `replace_file` writes."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())
