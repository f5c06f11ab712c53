"""Pieces of Megatron's tensors, cut from a Hugging Face folder when they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_rpsd.checkpoint.families import entries
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.layouts import Vocabulary
from megatron_rpsd.checkpoint.model_loading import table_by_name


class HFSource:
    """Reads one of Megatron's tensors at a time and keeps the last, since its pieces are asked for one after another.

    Args:
        warn: say on stderr which tensors hold NaN or infinities (one rank of those that read the same does).
    """

    def __init__(self, folder: HFFolder, warn: bool = True) -> None:
        self.folder, self.warn = folder, warn
        self.dims = folder.dimensions()
        self._table = table_by_name(self.dims)
        self._name: str | None = None
        self._full: Tensor | None = None

    def piece(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The part of the full tensor `name` that starts at `offset`, contiguous; rows beyond the vocabulary are 0.

        It may be the kept tensor itself: read it, and do not write to it.
        """
        if name != self._name:
            self._full, self._name = None, None  # before the next one is read: one in memory at a time
            self._full, self._name = self._read(name, dtype), name
        full = self._full
        if tuple(full.shape) == shape:
            return full
        if isinstance(self._table[name].layout, Vocabulary):
            first = min(offset[0], full.shape[0])
            rows = full[first : offset[0] + shape[0]]
            padded = torch.zeros(shape, dtype=dtype)
            padded[: rows.shape[0]] = rows
            return padded
        for axis, (start, size) in enumerate(zip(offset, shape, strict=True)):
            full = full.narrow(axis, start, size)
        return full.clone(memory_format=torch.contiguous_format)

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        mapped = self._table.get(name)
        assert mapped is not None, f"the model has a parameter {name} that the table does not know"
        parts = []
        for hf_name in mapped.hf_names:
            stored = self.folder.tensor(hf_name)
            if self.warn:
                warn_unless_finite(hf_name, stored)
            parts.append(stored.to(dtype))
        return mapped.layout.to_megatron(parts, self.dims)


def warn_unless_finite(name: str, tensor: Tensor) -> None:
    """Say on stderr when a tensor holds NaN or infinities: training would fail on them, yet they may be meant."""
    # A sum is one pass without a copy; only a sum that is not finite is worth a closer look.
    if not torch.isfinite(tensor.sum(dtype=torch.float32)):
        nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        if nan or infinite:
            print(f"warning: {name} holds {nan} NaN and {infinite} infinite values", file=sys.stderr, flush=True)


def mixed_dtypes(folder: HFFolder, dtype: torch.dtype) -> Iterator[str]:
    """Names of the model's tensors that are stored in another dtype."""
    for mapped in entries(folder.dimensions()):
        yield from (name for name in mapped.hf_names if folder.stored(name).dtype != dtype)
