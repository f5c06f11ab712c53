"""Bytes of tensors alive while a piece of torch code runs: the plan of memory is checked against it on a CPU.

A process's resident set cannot tell, since its allocator keeps what was freed; a GPU's allocator can, but needs a GPU.
So every operation that reaches torch's dispatcher is watched: a storage counts from the operation that returned it
until its last tensor is gone. What a kernel allocates for itself and frees before it returns is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Watches the operations of its `with` block, forward and backward.

    Attributes:
        bytes: alive now, of storages that the block made.
        peak: the largest `bytes` so far.
        at_peak: bytes by the operation and shape that made each storage alive at the peak.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        """`known`: tensors from before the block, which do not count (parameters, gradients)."""
        super().__init__()
        self.bytes = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._made: dict[int, tuple[str, int]] = {}
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf, function)
        return result

    def _count(self, tensor: torch.Tensor, function) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._made or not size or storage.data_ptr() in self._known:
            return
        self._made[key] = (f"{function.name()} {tuple(tensor.shape)} {tensor.dtype}", size)
        weakref.finalize(storage, self._forget, key)  # torch keeps a storage's Python object for its whole life
        self.bytes += size
        if self.bytes > self.peak:
            self.peak = self.bytes
            self.at_peak = Counter()
            for label, held in self._made.values():
                self.at_peak[label] += held

    def _forget(self, key: int) -> None:
        self.bytes -= self._made.pop(key)[1]
