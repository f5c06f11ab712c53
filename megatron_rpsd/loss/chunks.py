"""Chunks of tokens and the memory that they share.

One allocation serves all chunks of a pass: rows of the vocabulary shard's width, `blocks` of them per token of a chunk,
each block a reading's logits (later its exponentials or gradient) or what a divergence needs beside them:

    standard    logits of the standard view           gradient of its logits
    view        log-ratio of the view pair             gradient of the perturbed view's logits
    perturbed   logits of the perturbed view
    distill     log-ratio to the teacher               gradient of that divergence
    teacher     logits of the teacher
    T...        exponentials of the standard view at a temperature other than 1

The first two stand side by side, so that both gradients are multiplied in one product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpsd.parallel import VocabularyShard

# On CPU a larger chunk gains no time; a GPU's products want a thousand tokens.
DEFAULT_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}


@dataclass(frozen=True)
class Chunk:
    """Standard tokens [start, stop); `paired`: all of them, else none, have a perturbed reading.

    Attributes:
        blocks: names of the blocks of memory that every token takes, in their order.
        standard_temperatures: temperatures at which the standard view's exponentials are needed; the last is 1.
    """

    start: int
    stop: int
    paired: bool
    blocks: tuple[str, ...]
    standard_temperatures: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the standard view in it."""
        return self.stop - self.start


def _blocks(paired: bool, temperatures: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    names = ["standard", *(("view", "perturbed") if paired else ())]
    needed = {temperatures["view"]} if paired else set()
    for teacher, blocks in (("teacher", ("distill", "teacher")), ("known teacher", ("distill",))):
        if teacher in temperatures:
            names += blocks
            needed.add(temperatures[teacher])
    others = sorted(needed - {1.0})
    return (*names, *(f"T{temperature}" for temperature in others)), (*others, 1.0)


def plan_chunks(
    standard: int,
    perturbed: int,
    temperatures: Mapping[str, float],
    shard: VocabularyShard,
    dtype: torch.dtype,
    chunk_bytes: int,
    teacher_dtype: torch.dtype | None = None,
) -> list[Chunk]:
    """Chunks over the tokens without and those with a second reading, each as long as the memory allows.

    The same on every rank of the tensor-parallel group, since it follows from the padded width of a shard.

    Args:
        standard, perturbed: n and m; the last m of the n standard tokens have a perturbed reading.
        temperatures: of the divergences, by "view" and, with an external teacher, "teacher", or "known teacher" for
            one that is known by its likeliest tokens and has no logits.
        dtype: of hidden states and weight.
        chunk_bytes: upper bound for a chunk's blocks; one token is always taken.
        teacher_dtype: of an external teacher's hidden states and weight; default: as the student's.
    """
    width = shard.vocab_stop - shard.vocab_start
    chunks = []
    for start, stop, paired in ((0, standard - perturbed, False), (standard - perturbed, standard, True)):
        blocks, standard_temperatures = _blocks(paired, temperatures)
        product = 0 if teacher_dtype in (None, dtype) else teacher_dtype.itemsize  # see `Workspace.logits`
        tokens = max(1, chunk_bytes // ((_bytes_per_token(blocks, dtype) + product) * width))
        tokens = _even(stop - start, tokens)
        for first in range(start, stop, tokens):
            chunks.append(Chunk(first, min(first + tokens, stop), paired, blocks, standard_temperatures))
    return chunks


def _even(count: int, most: int) -> int:
    """Tokens of a chunk so that `count` tokens fall into as few chunks as `most` allows, of about equal size."""
    return max(1, -(-count // max(1, -(-count // most))))


def _bytes_per_token(blocks: Sequence[str], dtype: torch.dtype) -> int:
    """Bytes that a token takes per column of the vocabulary."""
    if dtype in (torch.float32, torch.float64):
        return len(blocks) * dtype.itemsize
    products = 2 if "perturbed" in blocks else 1  # logits as the product gives them, gradients as it takes them
    return 4 * len(blocks) + products * dtype.itemsize


class Workspace:
    """The memory of all chunks of one pass."""

    def __init__(self, chunks: Sequence[Chunk], weight: Tensor) -> None:
        """`weight`: [columns, h], for type, device and width."""
        self.columns = weight.shape[0]
        self.low_precision = weight.dtype not in (torch.float32, torch.float64)
        rows = max((chunk.tokens * len(chunk.blocks) for chunk in chunks), default=0)
        kind = torch.float32 if self.low_precision else weight.dtype
        self.memory = weight.new_empty(rows * self.columns, dtype=kind)
        if self.low_precision:
            rows = max((chunk.tokens * (1 + chunk.paired) for chunk in chunks), default=0)
            self.low = weight.new_empty(rows * self.columns)

    def _rows(self, first: int, count: int) -> Tensor:
        return self.memory[first * self.columns : (first + count) * self.columns].view(count, self.columns)

    def block(self, name: str, chunk: Chunk) -> Tensor:
        """The block [c, columns] of that name."""
        return self._rows(chunk.blocks.index(name) * chunk.tokens, chunk.tokens)

    def spare(self, reading: str, chunk: Chunk) -> list[Tensor]:
        """Blocks for a reading's exponentials beside those in place of its logits."""
        if reading != "standard":
            return []
        return [self.block(f"T{temperature}", chunk) for temperature in chunk.standard_temperatures[:-1]]

    def logits(self, hidden: Tensor, weight: Tensor, name: str, chunk: Chunk, scale: float) -> Tensor:
        """scale x hidden [c, h] weight^T [h, columns] in the block of that name, in fp32 (fp64)."""
        block = self.block(name, chunk)
        if weight.dtype != (self.low if self.low_precision else self.memory).dtype:  # a teacher of another precision
            block.copy_(hidden @ weight.T)
        elif self.low_precision:
            low = self.low[: block.numel()].view_as(block)
            block.copy_(torch.mm(hidden, weight.T, out=low))
        else:
            torch.mm(hidden, weight.T, out=block)
        return block if scale == 1.0 else block.mul_(scale)

    def gradient(self, chunk: Chunk) -> Tensor:
        """Both readings' gradients by the logits [2c, columns], or the standard view's [c, columns], for a product."""
        gradient = self._rows(0, chunk.tokens * (1 + chunk.paired))
        if not self.low_precision:
            return gradient
        return self.low[: gradient.numel()].view_as(gradient).copy_(gradient)

    def accumulate(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        """total [columns, h] += gradient^T hidden, summed over chunks in fp32 (fp64)."""
        if not self.low_precision:
            total.addmm_(gradient.T, hidden)
            return
        # Products of low precision are added in slices, so that no second [columns, h] appears.
        rows = max(1, self.low.numel() // max(1, hidden.shape[1]))
        for first in range(0, self.columns, rows):
            total[first : first + rows].add_(gradient[:, first : first + rows].T @ hidden)
