"""Documents packed into a window: where they begin, and a perturbed view for each of them.

Short samples are packed into a long window (arXiv 2604.06070). A *per-document* view perturbs every document as if it
stood alone (arXiv 2604.14339 on each of them): a split and a shift of its own, drawn from (seed, sample index, document
index) alone. Two documents of 6 and 4 tokens:

    token        0 1 2  3  4  5 | 6 7 8  9         with positions reset
    standard     0 1 2  3  4  5 | 6 7 8  9         0 1 2  3  4  5 | 0 1 2 3
    split, shift     2, +7      |   3, +2
    perturbed    0 1 9 10 11 12 | 6 7 8 11         0 1 9 10 11 12 | 0 1 2 5

Where no attention crosses a border both columns are one view to the model: RoPE sees differences of positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_rpsd.positions.perturbations import View, cyclic_view, skip_view
from megatron_rpsd.positions.sampler import SPLIT_VIEWS, ViewSampler, keyed_generator

# Second half of Philox's key, beside the sampler's.
_DOCUMENT = 0x52505351


def document_ids(tokens: Tensor, eod: int) -> Tensor:
    """Number of each token's document in its row, int64 like `tokens` [..., L]: an EOD token ends the one it closes."""
    ends = (tokens == eod).long()
    return ends.cumsum(dim=-1) - ends


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro-batch begin and end.

    Attributes:
        borders: row by row 0, the first token of every further document, L. Megatron calls this cu_seqlens.
    """

    borders: tuple[tuple[int, ...], ...]

    @classmethod
    def of_ids(cls, ids: Tensor) -> Documents:
        """Documents of rows [b, L] of numbers that change exactly where a document begins."""
        changes, length = ids[:, 1:] != ids[:, :-1], ids.shape[1]
        return cls(tuple((0, *(row.nonzero().flatten() + 1).tolist(), length) for row in changes))

    def lengths(self, row: int) -> tuple[int, ...]:
        """Tokens of each document of a row."""
        return tuple(stop - start for start, stop in pairwise(self.borders[row]))

    def starts(self) -> Tensor:
        """First token of each token's document, int64 [b, L]."""
        return torch.stack(
            [
                torch.tensor(borders[:-1]).repeat_interleave(torch.tensor(self.lengths(row)))
                for row, borders in enumerate(self.borders)
            ]
        )

    def sums(self, values: Tensor) -> Tensor:
        """For every token the sum of `values` [b, L] over its document, [b, L]."""
        sums = [
            torch.cat([part.sum().expand(len(part)) for part in row.split(self.lengths(index))])
            for index, row in enumerate(values)
        ]
        return torch.stack(sums)


@dataclass(frozen=True)
class DocumentViews:
    """The perturbed view of a window whose documents have a view each; used where a `View` is.

    Attributes:
        views: one a document; their splits are counted from the document's own first token.
        lengths: tokens of each document.
    """

    views: tuple[View, ...]
    lengths: tuple[int, ...]

    stride = 1

    @property
    def split(self) -> float:
        """Mean over documents of the tokens before each split, for the log."""
        return sum(view.split for view in self.views) / len(self.views)

    def position_ids(self, length: int) -> Tensor:
        """Positions of the window's tokens, int64 [length], counted on from document to document."""
        assert sum(self.lengths) == length
        parts, start = [], 0
        for view, tokens in zip(self.views, self.lengths, strict=True):
            parts.append(view.position_ids(tokens) + start)
            start += tokens
        return torch.cat(parts)

    def suffix(self, length: int) -> Tensor:
        """Tokens at or after their document's split, bool [length]."""
        assert sum(self.lengths) == length
        return torch.cat([view.suffix(tokens) for view, tokens in zip(self.views, self.lengths, strict=True)])

    def mean_shift(self, length: int) -> float:
        """Mean over documents of how far their suffixes move, in positions."""
        shifts = [view.mean_shift(tokens) for view, tokens in zip(self.views, self.lengths, strict=True)]
        return sum(shifts) / len(shifts)


def draw_document_views(sampler: ViewSampler, sample_index: int, lengths: Sequence[int]) -> DocumentViews:
    """A view for each document of a sample.

    skip: s ~ U{0..n-1} within the document's n tokens, y ~ U{1..Y} with Y of --rpsd-max-shift. cyclic: s = n - u with
    u ~ U{1..n-1}, y = -n; a document of one token keeps its position. Each document draws from a generator of its own,
    keyed by (seed, sample index, document index); nothing of another document enters.

    Args:
        sampler: of --rpsd-perturbation skip or cyclic.
        lengths: tokens of each document, in the window's order.
    """
    assert sampler.perturbation in SPLIT_VIEWS
    views = []
    for index, length in enumerate(lengths):
        generator = keyed_generator(sampler.seed, _DOCUMENT, sample_index, index)
        if sampler.perturbation == "skip":
            split = int(generator.integers(length))
            views.append(skip_view(split, int(generator.integers(1, sampler.max_shift, endpoint=True)), length))
        else:
            views.append(cyclic_view(int(generator.integers(1, length)) if length > 1 else 0, length))
    return DocumentViews(tuple(views), tuple(lengths))
