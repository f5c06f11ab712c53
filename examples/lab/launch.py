"""Ranks without start-up time: every run gets new processes, forked from a server that has imported Megatron.

What a rank runs is `megatron_rpsd.training.main.main()` with the command line that torchrun would give it. A fresh
torchrun imports torch and Megatron once a rank and run, which here would take longer than the training.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

from examples.quickstart.console import StageFailed, failure_reason

_context = multiprocessing.get_context("forkserver")

POLL_SECONDS = 0.5
"""how often a caller hears that a run goes on"""
_KILLED = "killed"
_SECONDS_TO_EXPLAIN = 3.0
"""for the siblings of a rank that failed; they may as well wait for it for ever"""


@dataclass(frozen=True)
class Finished:
    """What a job leaves.

    Attributes:
        values: of the function, by rank.
        wall_seconds: from the fork to the last rank's answer.
        cpu_seconds: of all ranks together, their threads included.
    """

    values: list
    wall_seconds: float
    cpu_seconds: float


def train(arguments: Sequence[str]) -> None:
    """What torchrun would start on this rank: the training entry with these arguments."""
    from megatron_rpsd.training.main import main

    sys.argv = ["main.py", *arguments]
    main()


def _serve(rank: int, world_size: int, store: str, log: str, pipe, function: Callable, arguments: tuple) -> None:
    """A rank's life: join the group, run, answer (succeeded, value, CPU seconds)."""
    os.setsid()  # a process group of its own, so that what it starts ends with it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
        answer = (True, function(*arguments))
    except SystemExit as left:
        answer = (not left.code, None)
    except BaseException:
        traceback.print_exc()
        answer = (False, None)
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(pickle.dumps((*answer, time.process_time())))
    pipe.close()
    os._exit(0)  # nothing is left to do that could wait for a sibling


def rank_log(log: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return log if rank == 0 else log.with_name(f"{log.name}.{rank}")


def run_on_ranks(world_size: int, log: Path, function: Callable, *arguments) -> Iterator[Finished | None]:
    """`function(*arguments)` on `world_size` new processes, output of each rank in its `rank_log`.

    Yields None now and then while it runs, so that the caller can show where it is; Finished at the end.

    Raises:
        StageFailed: a rank failed; one line of its log says why.
    """
    # Here and not on import: the process has one such server, which its first user starts.
    _context.set_forkserver_preload(["examples.lab.preload"])
    # torch_dist's writer leaves a manager process behind, which ends with its rank: nothing that a user should read of.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    log.parent.mkdir(parents=True, exist_ok=True)
    logs = [rank_log(log, rank) for rank in range(world_size)]
    for path in logs:
        path.unlink(missing_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        try:
            for rank in range(world_size):
                ours, theirs = _context.Pipe(duplex=False)
                target = (rank, world_size, os.path.join(folder, "store"), str(logs[rank]), theirs, function, arguments)
                # Not a daemon: saving a checkpoint starts a process of its own.
                process = _context.Process(target=_serve, args=target)
                process.start()
                theirs.close()
                ranks.append((process, ours))
            answers: dict[int, tuple[bool, object, float]] = {}
            while len(answers) < world_size:
                _collect(ranks, answers, POLL_SECONDS)
                if not all(succeeded for succeeded, _, _ in answers.values()):
                    _fail(ranks, answers, logs)
                yield None
        finally:
            for process, _ in ranks:
                _end(process)
    values = [answers[rank][1] for rank in range(world_size)]
    yield Finished(values, time.perf_counter() - started, sum(answer[2] for answer in answers.values()))


def _collect(ranks: list, answers: dict, patience: float) -> None:
    """Take the answers that are there; wait up to `patience` seconds for one."""
    pipes = {ours: rank for rank, (_, ours) in enumerate(ranks) if rank not in answers}
    for ready in wait(list(pipes), timeout=patience):
        try:
            answers[pipes[ready]] = pickle.loads(ready.recv_bytes())
        except EOFError:
            answers[pipes[ready]] = (False, _KILLED, 0.0)


def _fail(ranks: list, answers: dict, logs: list[Path]) -> NoReturn:
    """Raise with the reason that the logs give. Rank 0 alone says what a user did wrong: it gets time to."""
    deadline = time.monotonic() + _SECONDS_TO_EXPLAIN
    while len(answers) < len(ranks) and time.monotonic() < deadline:
        _collect(ranks, answers, POLL_SECONDS)
    failed = next(rank for rank in sorted(answers) if not answers[rank][0])
    if answers[failed][1] == _KILLED:
        raise StageFailed(f"rank {failed} was killed (did memory run out?) (full log: {logs[failed]})")
    lines = [line for path in (logs[failed], *logs) if path.exists() for line in path.read_text().splitlines()]
    raise StageFailed(f"{failure_reason(lines, 1)} (full log: {logs[failed]})")


def _end(process) -> None:
    """End a rank and everything in its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()
