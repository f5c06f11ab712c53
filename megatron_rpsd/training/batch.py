"""From a sample of the dataset to this rank's share of both views: made whole, then sharded once.

    sample  tokens, labels, loss_mask [b, L], sample_index [b]; document_ids [b, L] where documents count (`packing`)
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
from megatron_rpsd.positions import Documents, DocumentViews, View, batch_position_ids
from megatron_rpsd.training.packing import CONCATENATED, Packing

TWO_VIEWS = ("rpsd", "hard-label")
"""Objectives that read a sample under both views, as a view pair."""


@dataclass(frozen=True)
class ViewBatch:
    """One micro-batch on one context-parallel rank.

    Attributes:
        layout: which tokens are local.
        tokens, position_ids: int64 [b, (2L-t)/cp], local tokens of the pair.
        labels: int64 [b, L/cp]; loss_mask, suffix_mask: fp32 [b, L/cp]. suffix_mask is loss_mask at or after the split.
        splits: [b]; int64, or with a view a document the mean of a row's splits in fp32, for the log.
        shifts: fp32 [b], each view's mean distance of the tokens from its split on from their own index, for the log.
        kl_weights: fp32 [b], importance weights of the draws.
        kept, kept_suffix: fp32 [b], tokens that the masks keep in the *whole* sequence, N and M of the objective. Where
            documents have views of their own fp32 [b, L/cp]: for every local token those of its whole document.
        short_loss: fp32 [b, L/cp], loss of a token with a short context (LongCE), nan where it has none; or None.
        documents: borders of each row's documents where the run reads them.
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
    documents: Documents | None = None

    def view_weights(self, weight: float) -> Tensor:
        """Factor on the second view's loss of every token that has one here, fp32 [m, b]: weight x N / M x importance,
        0 before the split.
        """
        mask, importance = self.suffix_mask.T[self.repeated()], weight * self.kl_weights
        if self.kept.ndim == 1:
            return importance * self.kept / self.kept_suffix.clamp(min=1) * mask
        factor = importance[:, None] * self.kept / self.kept_suffix.clamp(min=1)
        return factor.T[self.repeated()] * mask

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


def _positions(
    views: Sequence[View | DocumentViews], length: int, packing: Packing, documents: Documents | None
) -> Tensor:
    """Positions of whole rows under their views, int64 [b, L]; a reset takes each document's start off."""
    positions = batch_position_ids(views, length)
    if packing.positions:
        strides = torch.tensor([view.stride for view in views])[:, None]  # 0 for NoPE, which stays at 0
        positions = positions - strides * documents.starts()
    return positions


def make_view_batch(
    sample: Mapping[str, Tensor],
    views: Sequence[View | DocumentViews],
    objective: str,
    layout: ViewLayout,
    kl_weights: Sequence[float] | None = None,
    short_loss: Tensor | None = None,
    packing: Packing = CONCATENATED,
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
        packing: what the borders of documents do; with any of it the sample holds document_ids [b, L].
    """
    tokens, labels, loss_mask = sample["tokens"], sample["labels"], sample["loss_mask"].float()
    length = layout.length
    assert tokens.shape == labels.shape == loss_mask.shape == (len(views), length)
    documents = packing.documents(sample)
    standard = _positions([View.identity()] * len(views), length, packing, documents)
    perturbed = standard if objective == "standard" else _positions(views, length, packing, documents)
    position_ids = perturbed if objective == "pose" else standard
    splits = torch.tensor([view.split for view in views])
    shifts = torch.tensor([view.mean_shift(length) for view in views])
    start = layout.suffix_start
    if start is not None:
        assert objective in TWO_VIEWS and (start <= splits).all()
        tokens = torch.cat([tokens, tokens[:, start:]], dim=1)
        position_ids = torch.cat([standard, perturbed[:, start:]], dim=1)
    suffix_mask = loss_mask * torch.stack([view.suffix(length) for view in views])
    pair, single = layout.local_indices(), layout.standard_tokens()
    if packing.perturb_documents:
        kept, kept_suffix = (documents.sums(mask)[:, single] for mask in (loss_mask, suffix_mask))
    else:
        kept, kept_suffix = loss_mask.sum(dim=1), suffix_mask.sum(dim=1)
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
        kept=kept,
        kept_suffix=kept_suffix,
        short_loss=None if short_loss is None else short_loss[:, single.to(short_loss.device)],
        documents=documents,
    )
