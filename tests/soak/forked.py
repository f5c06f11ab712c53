"""A command line in a process of its own, as a user starts it, without the seconds that importing torch takes.

The process is forked from the server that the rank pool uses. It gets the standard streams, the warnings and the
environment of a process that torchrun started: what it writes and how it exits is what a user would see.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.pool import _context

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "train"
_HIDDEN_BY_PYTHON = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int | None
    """Exit code; None: it was still running when its time was up, and was killed."""
    output: str
    errors: str
    seconds: float


def _become_a_users_process(folder: Path, ranks: int) -> None:
    os.setsid()  # so that the processes that it starts can be ended with it
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    logging.disable(logging.NOTSET)
    warnings.resetwarnings()
    for category in _HIDDEN_BY_PYTHON:
        warnings.simplefilter("ignore", category)
    # Rank 0 of the job. Of several ranks it is alone: a command line must be refused before any rank waits for another.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))
    if ranks == 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    else:
        os.environ.pop("MASTER_ADDR", None)


def _live(program: str, words: list[str], ranks: int, folder: Path) -> None:
    _become_a_users_process(folder, ranks)
    import torch

    torch.set_num_threads(1)
    if program == TRAIN:
        from megatron_rpsd.training import main

        sys.argv = ["main.py", *words]
        main.main()
    else:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        sys.argv = [f"tools/{program}.py", *words]
        runpy.run_path(str(ROOT / "tools" / f"{program}.py"), run_name="__main__")


def command(program: str, words: Sequence[str], folder: Path, ranks: int = 1, limit_seconds: float = 90.0) -> Ended:
    """Run a tool (by its name without .py), or the training's entry point (TRAIN), to its end.

    Args:
        folder: exists; takes the process's stdout and stderr.
        ranks: size of the job whose rank 0 the process is.
    """
    started = time.monotonic()
    process = _context.Process(target=_live, args=(program, list(words), ranks, folder))
    process.start()
    process.join(limit_seconds)
    code = process.exitcode
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    seconds = time.monotonic() - started
    texts = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return Ended(code, *texts, seconds)
