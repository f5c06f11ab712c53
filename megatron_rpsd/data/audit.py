"""An audit of a sample: its documents, what is learned from it, and the positions of its two views."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from megatron_rpsd.data.encoders import Encoder
from megatron_rpsd.data.pictures import draw_views
from megatron_rpsd.data.samples import BlendedSamples, Samples
from megatron_rpsd.positions import (
    SPLIT_VIEWS,
    Documents,
    View,
    ViewSampler,
    document_ids,
    draw_document_views,
)

_SHOWN = 160


@dataclass(frozen=True)
class Reading:
    """How a run reads its samples, by Megatron's flags and ours."""

    sampler: ViewSampler
    reset_position_ids: bool = False
    eod_mask_loss: bool = False
    perturb_documents: bool = False

    def __post_init__(self) -> None:
        if self.perturb_documents and self.sampler.perturbation not in SPLIT_VIEWS:
            raise ValueError(
                f"--perturb-documents knows --rpsd-perturbation {' and '.join(SPLIT_VIEWS)}; "
                f"{self.sampler.perturbation} views have no split"
            )


@dataclass(frozen=True)
class Audited:
    """What is shown of a sample."""

    png: bytes
    facts: dict[str, object]
    """by name: documents, kept tokens, splits and shifts"""
    documents: list[tuple[int, int, str]]
    """first token, tokens, decoded beginning and end"""


def audit(samples: Samples | BlendedSamples, sample: int, encoder: Encoder, reading: Reading) -> Audited:
    """The audit of one sample."""
    source, place = samples.at(sample)
    ids = source.ids(place)
    tokens = torch.from_numpy(ids[:-1])
    length, eod = len(tokens), source.manifest.eod_id
    numbers = document_ids(tokens, -1 if eod is None else eod)
    documents = Documents.of_ids(numbers[None])
    mask = np.ones(length)
    if reading.eod_mask_loss and eod is not None:
        mask[ids[:-1] == eod] = 0
    padding = source.manifest.padding_id
    if padding is not None and padding != eod:
        mask[ids[1:] == padding] = 0
    if reading.perturb_documents:
        view = draw_document_views(reading.sampler, sample, documents.lengths(0))
        kl_weight = 1.0
    else:
        drawn = reading.sampler.draw(sample)
        view, kl_weight = drawn.view, drawn.kl_weight
    starts = documents.starts()[0] if reading.reset_position_ids else torch.zeros(length, dtype=torch.int64)
    standard, perturbed = (
        View.identity().position_ids(length) - starts,
        view.position_ids(length) - view.stride * starts,
    )
    suffix = view.suffix(length).numpy()
    facts = {
        "data": source.prefix,
        "documents": len(documents.lengths(0)),
        "tokens with a CLM loss": int(mask.sum()),
        "tokens with a KL": int((mask * suffix).sum()) if kl_weight else 0,
        "split": round(float(view.split), 2),
        "mean shift": round(view.mean_shift(length), 2),
        "KL weight": round(kl_weight, 4),
    }
    title = f"sample {sample}: {reading.sampler.perturbation}, seed {reading.sampler.seed}, L = {length:,}"
    png = draw_views(standard.numpy(), perturbed.numpy(), numbers.numpy(), mask, suffix, title)
    shown = [(start, stop - start, _text(encoder, ids[start:stop])) for start, stop in pairwise(documents.borders[0])]
    return Audited(png, facts, shown)


def _text(encoder: Encoder, ids: np.ndarray) -> str:
    """A document's beginning and end, decoded."""
    if len(ids) <= 2 * _SHOWN:
        return encoder.decode(ids.tolist())
    left_out = f"\n... {len(ids) - 2 * _SHOWN} tokens ...\n"
    return encoder.decode(ids[:_SHOWN].tolist()) + left_out + encoder.decode(ids[-_SHOWN:].tolist())
