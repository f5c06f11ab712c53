"""What work takes at its peak: of a GPU's allocator, or of resident memory under the CPU runtime."""

from __future__ import annotations

import ctypes
import gc

import torch


class PeakMemory:
    """Bytes beyond those held at its making. The CPU runtime, or a GPU, has to be there already."""

    def __init__(self, device: str) -> None:
        gc.collect()
        if device == "cpu":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier work has freed is not this one's
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def taken(self) -> int:
        """The peak since then."""
        return torch.cuda.max_memory_allocated() - self.before
