"""Attempts of one run: its ranks as processes that can be killed, and what the run's folder says afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rpsd.runs.checkpoints import complete_iterations, iteration_folder, iterations
from megatron_rpsd.runs.checksums import complete
from tests.distributed.pool import _context

COMPARED = ("lm loss", "view kl", "grad-norm", "mean split", "mean shift", "learning-rate")
_LOADED = re.compile(r"successfully loaded checkpoint from .* at iteration +(\d+)")
_GRACE_SECONDS = 1.0


def _live(rank: int, world_size: int, store: str, folder: str, arguments: list[str]) -> None:
    """A rank, as torchrun starts it; its streams go to files."""
    os.setsid()  # a killed rank's own children are ended with the attempt
    for descriptor, name in ((1, "out"), (2, "err")):
        path = os.path.join(folder, f"{rank}.{name}")
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    import torch
    import torch.distributed as dist

    from megatron_rpsd.training import main

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    sys.argv = ["main.py", *arguments]
    main.main()


@dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
        codes: exit codes of the ranks; negative: the signal that ended one.
        killed: whether a rank was killed while it ran.
        loaded: iteration of the checkpoint that it started from; 0: of none.
        errors: stderr of rank 0.
        unfinished: iterations of checkpoints that were begun and not whole when the rank was killed.
    """

    codes: tuple[int | None, ...]
    killed: bool
    loaded: int
    errors: str
    unfinished: tuple[int, ...]


def attempt(
    arguments: list[str], run: Path, moment: Callable[[Callable[[], bool]], None] | None = None,
    victim: int = 0, world_size: int = 2, limit_seconds: float = 120.0,
) -> Ended:  # fmt: skip
    """Start the ranks; at a moment kill one, and then the others as torchrun does: SIGTERM, and SIGKILL a while later.

    Args:
        run: --run-dir of the arguments.
        moment: returns when it is time; asked with a function that tells whether the ranks still live. None: never.
        victim: the rank that gets SIGKILL.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ranks = [
            _context.Process(target=_live, args=(rank, world_size, store, folder, arguments))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        killed, unfinished = False, ()
        if moment is not None:
            moment(lambda: ranks[victim].is_alive())
            killed = ranks[victim].is_alive()
            if killed:
                os.kill(ranks[victim].pid, signal.SIGKILL)
                ranks[victim].join()
                unfinished = tuple(unsealed(run))
        deadline = time.monotonic() + (_GRACE_SECONDS if killed else limit_seconds)
        for process in ranks:
            if killed and process.is_alive():
                process.terminate()
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        loaded = _LOADED.search(Path(folder, "0.out").read_text()) if Path(folder, "0.out").exists() else None
        errors = Path(folder, "0.err").read_text() if Path(folder, "0.err").exists() else ""
        return Ended(
            tuple(process.exitcode for process in ranks), killed, int(loaded[1]) if loaded else 0, errors, unfinished
        )


def unsealed(run: Path) -> list[int]:
    """Iterations whose checkpoint was begun and has not become whole."""
    return [
        iteration for iteration in iterations(run / "checkpoints")
        if not complete(iteration_folder(run / "checkpoints", iteration))
    ]  # fmt: skip


def _folders(run: Path) -> set[int]:
    """Inodes of the folders of unsealed checkpoints: one made again at the same iteration is another."""
    found = set()
    for iteration in unsealed(run):
        with contextlib.suppress(FileNotFoundError):
            found.add(iteration_folder(run / "checkpoints", iteration).stat().st_ino)
    return found


def any_time(seconds: float, dice: random.Random) -> Callable[[Callable[[], bool]], None]:
    """A moment between the start and `seconds` after it."""

    def wait(alive: Callable[[], bool]) -> None:
        until = time.monotonic() + dice.random() * seconds
        while alive() and time.monotonic() < until:
            time.sleep(0.005)

    return wait


def in_a_save(run: Path, which: int, seconds: float, dice: random.Random) -> Callable[[Callable[[], bool]], None]:
    """A moment within `seconds` after the `which`-th checkpoint of the attempt was begun."""

    def wait(alive: Callable[[], bool]) -> None:
        left = seen = _folders(run)  # of earlier kills: set aside before the first step
        while alive() and len(seen - left) < which:
            seen = seen | _folders(run)
            time.sleep(0.0005)
        until = time.monotonic() + dice.random() * seconds
        while alive() and time.monotonic() < until:
            time.sleep(0.0005)

    return wait


def behind_a_save(run: Path, which: int) -> Callable[[Callable[[], bool]], None]:
    """The moment at which the `which`-th checkpoint of the attempt becomes whole: nothing may be lost behind it."""

    def wait(alive: Callable[[], bool]) -> None:
        before = len(complete_iterations(run / "checkpoints"))
        while alive() and len(complete_iterations(run / "checkpoints")) < before + which:
            time.sleep(0.0005)

    return wait


def figures(run: Path) -> dict[int, dict[str, float]]:
    """Iteration -> what was logged of it, every bit. A step that was taken twice has to have given the same twice."""
    taken: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "lm loss" in values:
            step = {name: values[name] for name in COMPARED}
            assert taken.setdefault(values["iteration"], step) == step, (values["iteration"], step, taken)
    return taken


def newest_whole(run: Path) -> int:
    """Iteration of the newest checkpoint that is whole; 0 for none."""
    return max(complete_iterations(run / "checkpoints"), default=0)


def tensors(run: Path, iteration: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint but the distributed optimizer's buffers, whose gaps between parameters are whatever
    the memory held.
    """
    folder = iteration_folder(run / "checkpoints", iteration)
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.distributed")
    }
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def same_tensors(run: Path, other: Path, iteration: int) -> int:
    """Compare two checkpoints bit by bit; how many tensors they hold."""
    first, second = tensors(run, iteration), tensors(other, iteration)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, first {different[0]}"
    return len(first)
