"""Which keys the local queries of a view pair see, cut at document borders: a list of plain causal blocks.

A *segment* is what one context-parallel chunk and one document have in common. Its queries see the document's tokens
up to their own, so it is bottom-right causal attention whose queries end where its keys end, and any causal kernel
serves. Two documents of 6 and 4 tokens, a suffix from t = 3 on (P), one rank; queries down, keys across:

          S0 S1 S2 S3 S4 S5|S6 S7 S8 S9|P3 P4 P5|P6 P7 P8 P9
    S0-5  1  causal .  .  .|.  .  .  . |.  .  . |.  .  .  .     keys S_0 .. S_5
    S6-9  .  .  .  .  .  . |1  causal  |.  .  . |.  .  .  .     keys S_6 .. S_9
    P3-5  1  1  1  .  .  . |.  .  .  . |1 causal|.  .  .  .     keys S_0 .. S_2, P_3 .. P_5: the document's own prefix
    P6-9  .  .  .  .  .  . |.  .  .  . |.  .  . |1  causal      keys P_6 .. P_9

Nothing of size L x L is built; a pack of short documents costs less attention than one window of the same length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_rpsd.parallel import Chunk, ViewLayout

Rows = slice  # rows of the micro-batch


@dataclass(frozen=True)
class Segment:
    """Queries of one chunk and one document, and the keys that end where they end.

    Attributes:
        queries: local tokens, half-open, in the order in which the rank holds them.
        keys: ranges of the whole pair axis (2L - t tokens, all ranks'), one behind the other.
    """

    queries: Chunk
    keys: tuple[Chunk, ...]


@functools.lru_cache(maxsize=64)  # every layer asks, and asks again when it is recomputed
def segments(layout: ViewLayout, borders: tuple[int, ...]) -> tuple[Segment, ...]:
    """All segments of a rank, in the order of its queries.

    Args:
        layout: which tokens are local.
        borders: 0, the first token of every further document, L.
    """
    start = layout.suffix_start
    found, done = [], 0
    for chunks, suffix in ((layout.standard_chunks, False), (layout.suffix_chunks, True)):
        for first, last in chunks:
            for begins, ends in pairwise(borders):
                begin, stop = max(first, begins), min(last, ends)
                if begin >= stop:
                    continue
                if suffix:
                    own, offset = max(begins, start), layout.length - start
                    keys = ((begins, own),) * (begins < own) + ((own + offset, stop + offset),)
                else:
                    keys = ((begins, stop),)
                found.append(Segment((done, done + stop - begin), keys))
                done += stop - begin
    assert done == layout.local_standard + layout.local_suffix
    return tuple(found)


def row_groups(layout: ViewLayout, borders: Sequence[tuple[int, ...]] | None) -> list[tuple[Rows, tuple[Segment, ...]]]:
    """Rows of a micro-batch that share their borders, with their segments: all rows at once where they can be.

    Args:
        borders: of every row; None: one document, the whole window.
    """
    if borders is None:
        return [(slice(None), segments(layout, (0, layout.length)))]
    if len(set(borders)) == 1:
        return [(slice(None), segments(layout, borders[0]))]
    return [(slice(row, row + 1), segments(layout, each)) for row, each in enumerate(borders)]


class _TakeRanges(torch.autograd.Function):
    """Parts of a tensor [s, b, ...] by row and token ranges; backward adds all of their gradients in one buffer.

    Slices taken one by one would each send back a gradient of the whole tensor's size.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, wanted: list[tuple[Rows, tuple[Chunk, ...]]]) -> tuple[Tensor, ...]:
        ctx.wanted, ctx.shape = wanted, tensor.shape
        parts = []
        for rows, ranges in wanted:
            pieces = [tensor[start:stop, rows] for start, stop in ranges]
            parts.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        total = grads[0].new_zeros(ctx.shape)
        # Last part first, as autograd itself would add them: the sum keeps its bits where segments are few.
        for (rows, ranges), grad in zip(reversed(ctx.wanted), reversed(grads), strict=True):
            done = 0
            for start, stop in ranges:
                total[start:stop, rows] += grad[done : done + stop - start]
                done += stop - start
        return total, None


def take_ranges(tensor: Tensor, wanted: list[tuple[Rows, tuple[Chunk, ...]]]) -> tuple[Tensor, ...]:
    """For each (rows, token ranges) the ranges of `tensor` [s, b, ...], one behind the other: [s', rows, ...]."""
    return _TakeRanges.apply(tensor, wanted)
