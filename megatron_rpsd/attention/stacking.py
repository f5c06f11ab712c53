"""Two whole views as two rows of a batch: what one plain causal attention with a context parallelism of its own takes.

Where the perturbed view is whole (suffix start 0), neither view sees the other, and a rank holds the same chunks of
both. So its 2 L/CP tokens of b samples are L/CP tokens of 2 b sequences. L = 8, CP = 2, b = 1, rank 0 (chunks 0 and 3,
which is the order that Megatron and Transformer Engine deal out under context parallelism, too):

    pair    S0 S1 S6 S7 P0 P1 P6 P7      ->      S0 S1 S6 S7
                                                 P0 P1 P6 P7
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rpsd.parallel import ViewLayout


def stackable(layout: ViewLayout, documents: tuple[tuple[int, ...], ...] | None) -> bool:
    """Whether every token of the layout belongs to a whole sequence that is causal throughout."""
    return documents is None and layout.suffix_start in (None, 0)


def stack_views(tensor: Tensor, layout: ViewLayout) -> Tensor:
    """[2L/cp, b, ...] -> [L/cp, 2b, ...]: the standard views, then the perturbed ones. One view stays as it is."""
    assert layout.suffix_start in (None, 0) and tensor.shape[0] == layout.local_standard + layout.local_suffix
    return tensor if layout.suffix_start is None else torch.cat(tensor.chunk(2), dim=1)


def unstack_views(tensor: Tensor, layout: ViewLayout) -> Tensor:
    """The way back: [L/cp, 2b, ...] -> [2L/cp, b, ...]."""
    return tensor if layout.suffix_start is None else torch.cat(tensor.chunk(2, dim=1))


def stacked_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: ViewLayout, attention: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Causal attention of one view or of two whole ones, by one call of `attention`; see `view_attention`.

    Args:
        query: [2L/cp, b, n, d] or [L/cp, b, n, d], rotated, local tokens in the layout's order.
        key, value: the same with g heads.
        attention: plain causal attention of whole sequences over all context-parallel ranks: takes and gives a rank's
            zigzag shard [L/cp, sequences, heads, d].
    """
    stacked = (stack_views(tensor, layout) for tensor in (query, key, value))
    return unstack_views(attention(*stacked), layout)
