"""Model operations of a micro-batch as it was drawn: what throughput and MFU are counted from.

    student   one view, or the view pair from the split that was drawn, forward and backward
    LongCE    the windows that score the tokens' short losses, forward
    teacher   a live teacher's reading of the standard view, forward

A teacher's cache costs none. Recomputed activations are not counted: they are work of the setting, not of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_rpsd.model import RPSDModelConfig
from megatron_rpsd.positions import Documents
from megatron_rpsd.runs.flops import ModelShape, forward_flops, step_flops
from megatron_rpsd.training.batch import ViewBatch
from megatron_rpsd.training.longce import LongCE

Borders = Sequence[int] | None


def model_shape(config: RPSDModelConfig) -> ModelShape:
    """What of a model multiplies; without the padding of its vocabulary."""
    layers = config.transformer
    return ModelShape(
        layers.num_layers, layers.hidden_size, layers.ffn_hidden_size, layers.num_attention_heads,
        layers.num_query_groups, layers.kv_channels, config.real_vocab_size, bool(layers.gated_linear_unit),
    )  # fmt: skip


def student_flops(shape: ModelShape, batch: ViewBatch, cut: bool) -> int:
    """Forward and backward operations of a micro-batch's whole rows.

    Args:
        cut: attention ends at the documents' borders.
    """
    layout, rows = batch.layout, _rows_borders(batch.documents if cut else None, len(batch.splits))
    return sum(step_flops(shape, layout.length, layout.suffix_start, borders) for borders in rows)


def longce_flops(shape: ModelShape, longce: LongCE, batch: ViewBatch, cut: bool) -> int:
    """Forward operations of the windows of a micro-batch's rows."""
    length, width = batch.layout.length, longce.context + longce.stride
    rows = _rows_borders(batch.documents if cut else None, len(batch.splits))
    return sum(
        forward_flops(shape, width, borders=_within(borders, start, width, length))
        for borders in rows
        for start in longce.window_starts(length)
    )


def teacher_flops(shape: ModelShape, sample: Mapping[str, Tensor], cut: bool) -> int:
    """Forward operations of a live teacher's reading of whole rows [b, L]."""
    rows, length = sample["tokens"].shape
    documents = Documents.of_ids(sample["document_ids"]) if cut else None
    return sum(forward_flops(shape, length, borders=borders) for borders in _rows_borders(documents, rows))


def _rows_borders(documents: Documents | None, rows: int) -> Sequence[Borders]:
    return [None] * rows if documents is None else documents.borders


def _within(borders: Borders, start: int, width: int, length: int) -> Borders:
    """The borders that a window of a row meets; what fills it up behind the row belongs to the last document."""
    if borders is None:
        return None
    return 0, *(border - start for border in borders if start < border < min(start + width, length)), width
