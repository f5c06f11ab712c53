"""A run that leaves at a step's border when a file asks it to.

Under torchrun no signal reaches the ranks in a form that leaves them time: it ends them with TERM and then KILL. A file
does, on every node, from any terminal: `touch RUN/stop`. Megatron's own exit on a signal does the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from megatron.training.dist_signal_handler import DistributedSignalHandler


def leave_when_asked(stop: Path, tell: Callable[[str, str], None] = lambda kind, text: None) -> None:
    """Let `--exit-signal-handler` count the existence of `stop`, as rank 0 sees it, as its signal. Once a process.

    Args:
        tell: called on rank 0 with "asked to stop" and a line.
    """
    original = DistributedSignalHandler.signals_received

    @functools.wraps(original)
    def signals_received(self):
        if dist.get_rank() == 0 and stop.is_file():
            if not self._signal_received:
                tell("asked to stop", f"asked to leave by the file {stop.name}; a checkpoint was written first")
            self._signal_received = True
        return original(self)  # gathers over all ranks, so that all leave at the same step

    DistributedSignalHandler.signals_received = signals_received
