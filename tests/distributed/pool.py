"""One call runs a function on N gloo ranks.

Importing torch and Megatron costs seconds, so ranks are forked from one long-lived server that has imported both. Every
call gets new ranks: process groups that outlive a session keep threads and sockets alive, and one rank's history must
not reach another test.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.preload"])


def _serve(rank: int, world_size: int, store: str, pipe, function: Callable, arguments: tuple) -> None:
    """A rank's life: join the group, run, answer (succeeded, value or traceback)."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
        answer = (True, function(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    # By value: multiprocessing's own pickler would share tensors by file descriptors that end with this process.
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()


class RankPool:
    """Runs functions on ranks 0 .. N-1."""

    def __init__(self, timeout_seconds: float = 150.0) -> None:
        self.timeout = timeout_seconds

    def run(self, world_size: int, function: Callable, *arguments) -> list:
        """`function(*arguments)` on `world_size` ranks; their values in rank order.

        Raises:
            AssertionError: a rank failed (its traceback is the message) or did not answer in time.
        """
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            processes, pipes = [], []
            for rank in range(world_size):
                ours, theirs = _context.Pipe(duplex=False)
                process = _context.Process(
                    target=_serve, args=(rank, world_size, store, theirs, function, arguments)
                )  # not a daemon: saving a checkpoint starts a process of its own
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            try:
                answers = self._answers(pipes)
                all_well = len(answers) == world_size and all(succeeded for succeeded, _ in answers.values())
                for process in processes:
                    process.join(timeout=20.0 if all_well else 1.0)  # lets a rank end the processes it started
            finally:
                for process in processes:
                    process.kill()
                    process.join()
        failures = [text for succeeded, text in answers.values() if not succeeded]
        if failures or len(answers) < world_size:
            silent = sorted(set(range(world_size)) - set(answers))
            raise AssertionError("\n".join(failures) or f"ranks {silent} did not answer within {self.timeout} s")
        return [answers[rank][1] for rank in range(world_size)]

    def _answers(self, pipes: list) -> dict[int, tuple[bool, object]]:
        """What ranks sent until all answered, one failed (its siblings may wait for it for ever), or time was up."""
        answers: dict[int, tuple[bool, object]] = {}
        deadline = time.monotonic() + self.timeout
        while len(answers) < len(pipes) and time.monotonic() < deadline:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
            for pipe in wait(waiting, timeout=1.0):
                rank = pipes.index(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    answers[rank] = (False, f"rank {rank} died without an answer")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + 3.0)
        return answers
