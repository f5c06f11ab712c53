"""Conjugate collectives over a process group: what goes forward one way comes back the other way."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpsd.parallel.layout import ViewLayout


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in `group`; None is a group of one."""
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in `group`; None is a group of one."""
    return 0 if group is None else group.rank()


class _AllGatherTokens(torch.autograd.Function):
    """Forward all-gather along dimension 0, backward reduce-scatter (sum)."""

    @staticmethod
    def forward(ctx, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = local.new_empty((local.shape[0] * group.size(), *local.shape[1:]))
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor):
        local = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
        return local, None


def all_gather_tokens(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' tokens, rank-major along dimension 0; the gradient is summed back to its owner.

    Args:
        local: [s/cp, ...], the same shape on every rank.

    Returns:
        [s, ...] in rank-major order (see `ViewLayout.gather_order` for the sequence's order).
    """
    if group_size(group) == 1:
        return local
    return _AllGatherTokens.apply(local, group)


class _AllToAllTokens(torch.autograd.Function):
    """Forward all-to-all with `sent[r]` rows to rank r, backward the same all-to-all reversed."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        output = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows = grad.new_empty((sum(ctx.sent), *grad.shape[1:]))
        dist.all_to_all_single(rows, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return rows, None, None, None


def _owner_of_standard_token(layout: ViewLayout) -> Tensor:
    owner = torch.empty(layout.length, dtype=torch.int64)
    for rank in range(layout.cp_size):
        owner[layout.on_rank(rank).standard_tokens()] = rank
    return owner


def exchange_suffix(suffix: Tensor, layout: ViewLayout, group: dist.ProcessGroup | None) -> Tensor:
    """Bring every suffix token to the rank that holds the same token of the standard view.

    The two parts of a view pair are zigzag-sharded each on its own, so with a shared prefix a token's two readings
    stand on different ranks. The loss compares them, so the student's hidden states travel to the teacher's
    (differentiably).

    Args:
        suffix: [(L-t)/cp, ...] in the order of `layout.suffix_tokens()`.

    Returns:
        [m, ...] in the order of this rank's standard tokens with index >= t; m may be 0.
    """
    assert suffix.shape[0] == layout.local_suffix
    if group_size(group) == 1 or layout.suffix_start == 0:
        return suffix
    owner = _owner_of_standard_token(layout)
    destination = owner[layout.suffix_tokens()]
    order = torch.argsort(destination, stable=True)
    sent = torch.bincount(destination, minlength=layout.cp_size).tolist()
    arriving = []
    for rank in range(layout.cp_size):
        tokens = layout.on_rank(rank).suffix_tokens()
        arriving.append(tokens[owner[tokens] == layout.cp_rank])
    received = [len(tokens) for tokens in arriving]
    rows = _AllToAllTokens.apply(suffix[order.to(suffix.device)], sent, received, group)
    # Chunks are held in ascending token order, so sorting by token gives the standard shard's own order.
    return rows[torch.argsort(torch.cat(arriving)).to(suffix.device)]
