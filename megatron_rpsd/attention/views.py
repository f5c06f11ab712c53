"""Attention of both views of a sequence in one pass, under context parallelism.

Standard queries see the standard keys up to their own token. Suffix queries see the standard keys before the suffix
start t (they are the perturbed view's own: before its split both views have the same keys) and the suffix keys from t
up to their own token. In the sequence's order both are plain causal attention whose queries end where their keys end:

    standard chunk [a, e)   keys  S_0 .. S_{e-1}
    suffix chunk   [a, e)   keys  S_0 .. S_{t-1}  P_t .. P_{e-1}

so any causal kernel serves; where documents are masked, `segments` cuts both at the borders as well. Keys and values
are all-gathered over the context-parallel group (backward: reduce-scatter); queries never move. The prefix's keys
receive gradients from both views.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpsd.attention.kernels import causal_attention
from megatron_rpsd.attention.segments import row_groups, take_ranges
from megatron_rpsd.parallel import ViewLayout, all_gather_tokens


def view_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ViewLayout,
    cp_group: dist.ProcessGroup | None,
    scale: float,
    kernel=causal_attention,
    documents: tuple[tuple[int, ...], ...] | None = None,
) -> Tensor:
    """Causal attention of one view or of a view pair, sharded by `layout`.

    Args:
        query: [(2L-t)/cp, b, n, d], rotated, local tokens in the layout's order.
        key, value: [(2L-t)/cp, b, g, d], the key rotated.
        layout: which tokens these are.
        cp_group: the context-parallel group; None for one rank.
        scale: factor on the scores.
        kernel: a function like `causal_attention`.
        documents: borders of every row's documents (0, ..., L), across which no token sees another; None: one document.

    Returns:
        [(2L-t)/cp, b, n, d].
    """
    assert query.shape[0] == layout.local_standard + layout.local_suffix
    keys_and_values = all_gather_tokens(torch.cat([key, value], dim=-1), cp_group)
    order = layout.gather_order()
    if order is not None:
        keys_and_values = keys_and_values.index_select(0, order.to(query.device))
    groups = row_groups(layout, documents)
    every = [(rows, segment) for rows, segments in groups for segment in segments]
    queries = take_ranges(query, [(rows, (segment.queries,)) for rows, segment in every])
    seen = take_ranges(keys_and_values, [(rows, segment.keys) for rows, segment in every])
    contexts = [
        kernel(part, *pair.split([key.shape[-1], value.shape[-1]], dim=-1), scale)
        for part, pair in zip(queries, seen, strict=True)
    ]
    columns, done = [], 0
    for _, segments in groups:
        columns.append(torch.cat(contexts[done : done + len(segments)]))
        done += len(segments)
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
