"""Run a function on local ranks over gloo: what `torchrun` does, for tools that start their own."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def run_on_local_ranks(function: Callable, world_size: int, *arguments):
    """Call `function(*arguments)` on `world_size` new local processes and return rank 0's value.

    `function` must be importable (a module's top level); the ranks find RANK, WORLD_SIZE and their siblings in the
    environment, on a free port of the loopback interface.

    Raises:
        RuntimeError: a rank failed; the message is its traceback's.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=world_size, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.2,
        local_addr="127.0.0.1",  # not this machine's name, which resolves on few machines without a network
    )  # fmt: skip
    try:
        return elastic_launch(config, function)(*arguments)[0]
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        raise RuntimeError(f"rank {failure.local_rank} failed: {failure.message}") from failed
