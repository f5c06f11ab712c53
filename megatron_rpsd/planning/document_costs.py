"""What attention cut at document borders costs: measured against the whole window, and shared out over CP ranks."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from megatron_rpsd.attention import view_attention
from megatron_rpsd.attention.segments import segments
from megatron_rpsd.parallel import ViewLayout

_HEAD_DIM = 64


def attended_pairs(layout: ViewLayout, borders: tuple[int, ...]) -> int:
    """Pairs of a local query and a key that it sees: what the rank's attention multiplies, up to a constant.

    Args:
        borders: 0, the first token of every further document, L.
    """
    pairs = 0
    for segment in segments(layout, borders):
        queries, keys = segment.queries[1] - segment.queries[0], sum(stop - start for start, stop in segment.keys)
        pairs += queries * keys - queries * (queries - 1) // 2
    return pairs


def measure_packs(length: int, sizes: list[int], heads: int, repetitions: int) -> dict:
    """CPU seconds of attention over a view pair with its suffix from L / 2 on, forward and backward.

    Packs of documents of `sizes` tokens and the whole window take turns; medians. Other processes do not count.
    """
    layout = ViewLayout(length, length // 2)
    leaves = [torch.randn(layout.pair_length, 1, heads, _HEAD_DIM, requires_grad=True) for _ in range(3)]
    packs = {size: (*range(0, length, size), length) for size in sizes}
    times: dict = {size: [] for size in (None, *sizes)}
    for _ in range(repetitions + 1):
        for size, found in times.items():
            began = time.process_time()
            borders = None if size is None else (packs[size],)
            view_attention(*leaves, layout, None, _HEAD_DIM**-0.5, documents=borders).sum().backward()
            found.append(time.process_time() - began)
    median = {size: statistics.median(found[1:]) for size, found in times.items()}  # the first round warms up
    whole = attended_pairs(layout, (0, length))
    rows = [
        {
            "document_length": size,
            "seconds": median[size],
            "ratio": median[size] / median[None],
            "work": attended_pairs(layout, borders) / whole,
        }
        for size, borders in packs.items()
    ]
    return {"whole_seconds": median[None], "packs": rows}


def rank_imbalance(length: int, cp_size: int, mean: int, packs: int = 50, seed: int = 0) -> float:
    """Attention of the busiest context-parallel rank over the mean rank's, averaged over random packs; 1 is balanced.

    Zigzag chunks are balanced for one causal window. Documents have exponential lengths of `mean` tokens here.
    """
    generator, ratios = np.random.default_rng(seed), []
    for _ in range(packs):
        borders = [0]
        while borders[-1] < length:
            borders.append(min(length, borders[-1] + 1 + int(generator.exponential(mean))))
        work = [attended_pairs(ViewLayout(length, None, cp_size, rank), tuple(borders)) for rank in range(cp_size)]
        ratios.append(max(work) * cp_size / sum(work))
    return statistics.fmean(ratios)
