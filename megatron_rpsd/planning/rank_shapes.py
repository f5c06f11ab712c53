"""What one rank of a layout computes with: tokens, heads and keys, from the view pair's layout itself."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpsd.checkpoint.layouts import ModelDimensions
from megatron_rpsd.parallel import ViewLayout
from megatron_rpsd.planning.layouts import Layout, Workload, padded_vocabulary


@dataclass(frozen=True)
class RankShape:
    """Sizes on one rank, for one micro-batch of one sequence.

    Attributes:
        pair: local tokens of both views, (2L - t) / CP; (L) / CP of one view.
        standard: those of the standard view.
        compared: standard tokens whose second reading the loss compares here, at most.
        rows: local tokens of hidden states between layers, pair / TP under sequence parallelism.
        gathered: tokens whose keys and values are all-gathered, 2L - t.
        standard_keys, suffix_keys: keys behind the local queries of either view, chunk by chunk (zigzag chunks see
            keys of their own each).
        cut: whether a suffix chunk's keys are two ranges of the pair, and therefore copied together.
        hidden, ffn, query, key: widths h, ffn/TP, n d/TP, g d/TP.
        heads: n / TP.
        vocabulary: padded rows of the output weight, v / TP.
    """

    pair: int
    standard: int
    compared: int
    rows: int
    gathered: int
    standard_keys: tuple[int, ...]
    suffix_keys: tuple[int, ...]
    cut: bool
    hidden: int
    ffn: int
    query: int
    key: int
    heads: int
    vocabulary: int
    tp: int
    cp: int


def rank_shape(dims: ModelDimensions, layout: Layout, work: Workload, suffix_start: int | None) -> RankShape:
    """Of context-parallel rank 0, as every rank is (zigzag balances them), for a pair from `suffix_start` on."""
    tp, cp = layout.tp, layout.cp
    view = ViewLayout(work.length, suffix_start, cp, 0)
    pair = view.local_standard + view.local_suffix
    offset = 0 if suffix_start is None else suffix_start
    return RankShape(
        pair=pair,
        standard=view.local_standard,
        compared=min(view.local_standard, view.suffix_length),
        rows=pair // tp,
        gathered=view.pair_length,
        standard_keys=tuple(stop for _, stop in view.standard_chunks),
        # Keys of a suffix chunk [a, e): the t of the shared prefix, and the suffix's from t to e.
        suffix_keys=tuple(stop for _, stop in view.suffix_chunks),
        cut=offset > 0,
        hidden=dims.hidden_size,
        ffn=dims.ffn_hidden_size // tp,
        query=dims.num_attention_heads * dims.head_dim // tp,
        key=dims.num_query_groups * dims.head_dim // tp,
        heads=dims.num_attention_heads // tp,
        vocabulary=padded_vocabulary(dims, tp) // tp,
        tp=tp,
        cp=cp,
    )


def suffix_starts(layout: Layout, work: Workload) -> tuple[int | None, ...]:
    """Suffix starts among which memory is largest: a whole second view, and the first split behind it.

    A pair holds 2L - t tokens, so small t hold most; at t = 0 the suffix's keys are one range and need no copy.
    """
    if not work.paired:
        return (None,)
    if work.execution == "full":
        return (0,)
    return (0, layout.granule(work.length))


def mean_suffix(work: Workload) -> tuple[float, float]:
    """What the second view adds to one view on average over splits s ~ U: linear layers E[1 - s/L] = 1/2, attention
    E[1 - (s/L)^2] = 2/3; a whole second view 1 and 1.
    """
    if not work.paired:
        return 0.0, 0.0
    return (1.0, 1.0) if work.execution == "full" else (1 / 2, 2 / 3)
