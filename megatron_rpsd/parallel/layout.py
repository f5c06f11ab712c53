"""The view pair's layout: which tokens of both views a context-parallel rank holds, and where a gather puts them.

A view pair is one sequence of L standard tokens followed by the L - t tokens of the perturbed view from token t on, its
*suffix start*. t = 0 is a whole second view; t > 0 shares the prefix. Both parts are cut into 2 x CP chunks of their
own, and rank r holds chunks r and 2 CP - 1 - r of each (zigzag), so that causal attention costs every rank the same in
both views. L = 16, t = 8, CP = 2 (a letter a chunk; capitals are the standard view, small letters the suffix):

    pair axis   A A A A B B B B C C C C D D D D a a b b c c d d      24 tokens
    token       0 1 2 3 4 5 6 7 8 . . . . . . 15 8 9 . . . . 14 15
    rank 0      A A A A D D D D a a d d                              12 tokens
    rank 1      B B B B C C C C b b c c                              12 tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Chunk = tuple[int, int]  # token indices, half-open


def zigzag_chunks(start: int, stop: int, cp_size: int, cp_rank: int) -> tuple[Chunk, ...]:
    """Chunks of tokens [start, stop) that `cp_rank` holds in zigzag order; neighbours are merged (CP = 1: one chunk).

    Raises:
        ValueError: the number of tokens does not divide by 2 x CP.
    """
    count = stop - start
    if cp_size == 1:
        return ((start, stop),) if count else ()
    if count % (2 * cp_size):
        raise ValueError(f"{count} tokens do not divide into 2 x CP = {2 * cp_size} zigzag chunks")
    size = count // (2 * cp_size)
    if size == 0:
        return ()
    first, second = cp_rank, 2 * cp_size - 1 - cp_rank
    if second == first + 1:
        return ((start + first * size, start + (second + 1) * size),)
    return tuple((start + chunk * size, start + (chunk + 1) * size) for chunk in (first, second))


def _indices(chunks: Sequence[Chunk]) -> Tensor:
    if not chunks:
        return torch.empty(0, dtype=torch.int64)
    return torch.cat([torch.arange(start, stop) for start, stop in chunks])


@dataclass(frozen=True)
class ViewLayout:
    """Layout of one view, or of a view pair, over a context-parallel group. Pure arithmetic, for any rank.

    Attributes:
        length: L, tokens of the standard view.
        suffix_start: t, first token that the perturbed view repeats; None for a single view.
        cp_size: context-parallel degree.
        cp_rank: this rank in it.
    """

    length: int
    suffix_start: int | None = None
    cp_size: int = 1
    cp_rank: int = 0

    def __post_init__(self) -> None:
        if self.suffix_start is not None and not 0 <= self.suffix_start < self.length:
            raise ValueError(f"suffix start {self.suffix_start} lies outside of the sequence of {self.length} tokens")
        for name, count in (("sequence length", self.length), ("suffix length", self.suffix_length)):
            if self.cp_size > 1 and count % (2 * self.cp_size):
                raise ValueError(f"{name} {count} does not divide by 2 x CP = {2 * self.cp_size}")

    @property
    def suffix_length(self) -> int:
        """Tokens that the perturbed view repeats, L - t; 0 for a single view."""
        return 0 if self.suffix_start is None else self.length - self.suffix_start

    @property
    def pair_length(self) -> int:
        """Tokens on the pair axis over all ranks, 2 L - t."""
        return self.length + self.suffix_length

    @property
    def standard_chunks(self) -> tuple[Chunk, ...]:
        """This rank's chunks of the standard view, in the order in which it holds them."""
        return zigzag_chunks(0, self.length, self.cp_size, self.cp_rank)

    @property
    def suffix_chunks(self) -> tuple[Chunk, ...]:
        """This rank's chunks of the perturbed suffix, as token indices of the sequence."""
        if self.suffix_start is None:
            return ()
        return zigzag_chunks(self.suffix_start, self.length, self.cp_size, self.cp_rank)

    @property
    def local_standard(self) -> int:
        """Standard tokens on this rank, L / CP."""
        return self.length // self.cp_size

    @property
    def local_suffix(self) -> int:
        """Suffix tokens on this rank, (L - t) / CP."""
        return self.suffix_length // self.cp_size

    def standard_tokens(self) -> Tensor:
        """Token index of every local standard token, int64 [L/CP]."""
        return _indices(self.standard_chunks)

    def suffix_tokens(self) -> Tensor:
        """Token index of every local suffix token, int64 [(L-t)/CP]."""
        return _indices(self.suffix_chunks)

    def local_indices(self) -> Tensor:
        """Pair-axis index of every local token, int64 [(2L-t)/CP]: what shards tokens and positions."""
        if self.suffix_start is None:
            return self.standard_tokens()
        return torch.cat([self.standard_tokens(), self.suffix_tokens() - self.suffix_start + self.length])

    def on_rank(self, cp_rank: int) -> ViewLayout:
        """The same layout, seen by another rank."""
        return ViewLayout(self.length, self.suffix_start, self.cp_size, cp_rank)

    def gather_order(self) -> Tensor | None:
        """Where pair token i stands in the rank-major concatenation of all ranks' tokens, int64 [2L-t].

        None is the identity (CP = 1).
        """
        if self.cp_size == 1:
            return None
        held = torch.cat([self.on_rank(rank).local_indices() for rank in range(self.cp_size)])
        return torch.argsort(held)
