"""What becomes of tokenized documents: stored as they are, cut into windows, or packed into windows.

L = 8; documents a (19 tokens), b (5), c (3), their EOD tokens among them; `|` ends what is one document to Megatron:

    concatenate   aaaaaaaaaaaaaaaaaaa | bbbbb | ccc |
    whole         aaaaaaaaaaaaaaaa |                        3 tokens of a are left out, and b, c: shorter than L
    pack          aaaaaaaa | aaaaaaaa | aaabbbbb | ccc..... |        5 tokens of padding; a is cut twice

Megatron's GPTDataset lays documents behind one another and reads windows of L tokens, the last label being the first
token of the next window. Where every document has a multiple of L tokens, as under whole and pack, a sample is exactly
one such window.

Packing is best-fit decreasing (as in arXiv 2404.10830): pieces from the longest to the shortest, each into the window
with the least room that still holds it. Longer documents are cut into windows of L tokens and a rest, so no token is
left out; within a window documents stand in the order of the input.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

PIECE = np.dtype(
    [("place", "<u8"), ("offset", "<u8"), ("file", "<u4"), ("line", "<u4"), ("start", "<u4"), ("tokens", "<u4")]
)
"""Consecutive tokens of one document: first token in the .bin; byte offset, input's number and line of the document;
first token within the document; tokens."""
PADDING = 2**32 - 1
"""In place of an input's number."""
ARRANGEMENTS = ("concatenate", "whole", "pack")
# Documents that are packed together: as many are in memory.
PACKED_TOGETHER = 1 << 16


@dataclass
class Counts:
    """What an arrangement did with the documents; numbers of tokens where not said otherwise."""

    documents: int = 0
    """documents that were looked at"""
    left_out_documents: int = 0
    """documents of which nothing was stored"""
    left_out_tokens: int = 0
    """tokens of them, and the rests of the others"""
    cut_documents: int = 0
    """documents that end up in more than one window, or lose a rest"""
    padding_tokens: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros((2, 33), np.int64))
    """documents that were looked at, and their tokens, by bit length of a document's number of tokens"""


@dataclass(frozen=True)
class Arranged:
    """Some of the output, in order."""

    pieces: np.ndarray
    """PIECE [n]; `place` is filled when they are written"""
    sources: np.ndarray
    """first token of each piece in the shards' stream, int64 [n]; -1 for padding"""
    lengths: np.ndarray
    """tokens of each document to Megatron, int64 [m]; together those of the pieces"""


@dataclass
class Arrangement:
    """One way of arranging, with bounds on what it takes."""

    mode: str
    """one of ARRANGEMENTS"""
    seq_length: int
    """L"""
    min_tokens: int = 0
    """shorter documents are left out"""
    max_tokens: int | None = None
    """longer documents are left out"""
    counts: Counts = field(default_factory=Counts)

    def __call__(self, tables: Iterable[np.ndarray]) -> Iterator[Arranged]:
        """Arranges DOCUMENT records, given some at a time in the order of the shards' stream."""
        assert self.mode in ARRANGEMENTS
        arrange = {"concatenate": self._concatenate, "whole": self._whole, "pack": self._pack}[self.mode]
        for pieces, sources in self._grouped(tables):
            yield arrange(pieces, sources)

    def _grouped(self, tables: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Whole documents that lie within the bounds, as pieces, at most PACKED_TOGETHER at a time."""
        start = 0
        for table in tables:
            tokens = table["tokens"].astype(np.int64)
            ends = start + np.cumsum(tokens)
            pieces = np.zeros(len(table), PIECE)
            for name in ("offset", "file", "line", "tokens"):
                pieces[name] = table[name]
            longest = int(tokens.max(initial=0)) if self.max_tokens is None else self.max_tokens
            taken = (tokens >= max(self.min_tokens, self.seq_length if self.mode == "whole" else 0)) & (
                tokens <= longest
            )
            self.counts.documents += len(table)
            bits = np.frexp(tokens)[1]
            self.counts.lengths[0] += np.bincount(bits, minlength=33)
            np.add.at(self.counts.lengths[1], bits, tokens)
            self.counts.left_out_documents += int((~taken).sum())
            self.counts.left_out_tokens += int(tokens[~taken].sum())
            pieces, sources = pieces[taken], (ends - tokens)[taken]
            for place in range(0, len(pieces), PACKED_TOGETHER):
                yield pieces[place : place + PACKED_TOGETHER], sources[place : place + PACKED_TOGETHER]
            start = int(ends[-1]) if len(ends) else start

    def _concatenate(self, pieces: np.ndarray, sources: np.ndarray) -> Arranged:
        return Arranged(pieces, sources, pieces["tokens"].astype(np.int64))

    def _whole(self, pieces: np.ndarray, sources: np.ndarray) -> Arranged:
        tokens = pieces["tokens"].astype(np.int64)
        kept = tokens // self.seq_length * self.seq_length
        self.counts.left_out_tokens += int((tokens - kept).sum())
        self.counts.cut_documents += int((tokens != self.seq_length).sum())
        pieces["tokens"] = kept
        return Arranged(pieces, sources, kept)

    def _pack(self, pieces: np.ndarray, sources: np.ndarray) -> Arranged:
        length = self.seq_length
        tokens = pieces["tokens"].astype(np.int64)
        self.counts.cut_documents += int((tokens > length).sum())
        owner = np.repeat(np.arange(len(pieces)), -(-tokens // length))
        first = np.concatenate([[0], np.cumsum(-(-tokens // length))[:-1]]).astype(np.int64)
        starts = (np.arange(len(owner)) - first[owner]) * length
        sizes = np.minimum(tokens[owner] - starts, length)
        windows = best_fit(sizes, length)
        order = np.array([part for window in windows for part in (*window, -1)], dtype=np.int64)
        packed, places = np.zeros(len(order), PIECE), np.full(len(order), -1, np.int64)
        real = order >= 0
        chosen = order[real]
        packed[real] = pieces[owner[chosen]]
        packed["start"][real], packed["tokens"][real] = starts[chosen], sizes[chosen]
        places[real] = sources[owner[chosen]] + starts[chosen]
        room = [length - int(sizes[window].sum()) for window in windows]
        packed["tokens"][~real], packed["file"][~real] = room, PADDING
        self.counts.padding_tokens += sum(room)
        used = packed["tokens"] > 0
        return Arranged(packed[used], places[used], np.full(len(windows), length, np.int64))


def best_fit(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Pieces into windows of `room` tokens, best-fit decreasing; equal sizes in their order.

    Returns the windows as lists of places in `sizes`, ascending within a window; windows by their first piece.
    """
    windows: list[list[int]] = []
    left: list[int] = []  # the different amounts of room that open windows have, ascending
    having: dict[int, list[int]] = {}  # room -> windows with it
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        place = bisect_left(left, size)
        if place == len(left):
            window, remaining = len(windows), room - size
            windows.append([piece])
        else:
            found = left[place]
            window, remaining = having[found].pop(), found - size
            windows[window].append(piece)
            if not having[found]:
                del having[found], left[place]
        if remaining:
            if remaining not in having:
                having[remaining] = []
                insort(left, remaining)
            having[remaining].append(window)
    return sorted(sorted(window) for window in windows)
