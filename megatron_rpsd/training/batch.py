"""From a sample of the dataset to this rank's share of both views: made whole, then sharded once.

    sample  tokens, labels, loss_mask [b, L], sample_index [b]
      -> views (split, shift, ...) from (seed, sample_index)
      -> pair axis [b, 2L - t]: standard tokens, then the perturbed suffix; positions of both
      -> local indices of the layout select every tensor

Positions are never recomputed from ranks, and no rank communicates: all know the same whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpsd.parallel import ViewLayout
from megatron_rpsd.positions import View, batch_position_ids

TWO_VIEWS = ("rpsd", "hard-label")
"""Objectives that read a sample under both views, as a view pair."""


@dataclass(frozen=True)
class ViewBatch:
    """One micro-batch on one context-parallel rank.

    Attributes:
        layout: which tokens are local.
        tokens, position_ids: int64 [b, (2L-t)/cp], local tokens of the pair.
        labels: int64 [b, L/cp]; loss_mask, suffix_mask: fp32 [b, L/cp]. suffix_mask is loss_mask at or after the split.
        splits: int64 [b].
        shifts: fp32 [b], each view's mean distance of the tokens from its split on from their own index, for the log.
        kl_weights: fp32 [b], importance weights of the draws.
        kept, kept_suffix: fp32 [b], tokens that the masks keep in the *whole* sequence, N and M of the objective.
        short_loss: fp32 [b, L/cp], loss of a token with a short context (LongCE), nan where it has none; or None.
    """

    layout: ViewLayout
    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    suffix_mask: Tensor
    splits: Tensor
    shifts: Tensor
    kl_weights: Tensor
    kept: Tensor
    kept_suffix: Tensor
    short_loss: Tensor | None = None

    def repeated(self) -> slice:
        """This rank's standard tokens that have a second reading on it; chunks ascend, so they are the last ones."""
        start = self.layout.suffix_start
        count = 0 if start is None else int((self.layout.standard_tokens() >= start).sum())
        return slice(self.layout.local_standard - count, self.layout.local_standard)

    def to(self, device: torch.device | str) -> ViewBatch:
        """The same batch with its tensors on `device`."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return ViewBatch(**moved)


def make_view_batch(
    sample: Mapping[str, Tensor],
    views: Sequence[View],
    objective: str,
    layout: ViewLayout,
    kl_weights: Sequence[float] | None = None,
    short_loss: Tensor | None = None,
) -> ViewBatch:
    """This rank's share of a micro-batch.

    Args:
        sample: whole sequences: tokens, labels int64 [b, L], loss_mask [b, L].
        views: the perturbed view of each of the b samples.
        objective: standard (standard positions), pose (perturbed positions), one of TWO_VIEWS (both, as a view pair;
            hard-label reads the suffix's labels from `labels`, at the tokens that the suffix repeats).
        layout: a pair for TWO_VIEWS (its suffix start at or before every split), a single view otherwise; a single
            view for TWO_VIEWS means that this micro-step takes no second view.
        kl_weights: importance weight of each draw; 1 by default.
        short_loss: of the whole sequences [b, L]; see `ViewBatch`.
    """
    tokens, labels, loss_mask = sample["tokens"], sample["labels"], sample["loss_mask"].float()
    length = layout.length
    assert tokens.shape == labels.shape == loss_mask.shape == (len(views), length)
    standard = torch.arange(length).expand(len(views), length)
    position_ids = batch_position_ids(views, length) if objective == "pose" else standard
    splits = torch.tensor([view.split for view in views])
    shifts = torch.tensor([view.mean_shift(length) for view in views])
    start = layout.suffix_start
    if start is not None:
        assert objective in TWO_VIEWS and (start <= splits).all()
        tokens = torch.cat([tokens, tokens[:, start:]], dim=1)
        position_ids = torch.cat([standard, batch_position_ids(views, length)[:, start:]], dim=1)
    suffix_mask = loss_mask * (torch.arange(length) >= splits[:, None])
    pair, single = layout.local_indices(), layout.standard_tokens()
    return ViewBatch(
        layout=layout,
        tokens=tokens[:, pair],
        position_ids=position_ids[:, pair],
        labels=labels[:, single],
        loss_mask=loss_mask[:, single],
        suffix_mask=suffix_mask[:, single],
        splits=splits,
        shifts=shifts,
        kl_weights=torch.ones(len(views)) if kl_weights is None else torch.tensor(kl_weights, dtype=torch.float32),
        kept=loss_mask.sum(dim=1),
        kept_suffix=suffix_mask.sum(dim=1),
        short_loss=None if short_loss is None else short_loss[:, single.to(short_loss.device)],
    )
