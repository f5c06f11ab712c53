"""Pairs of packed documents one by one, and networks without a gate; whole steps are counted by torch elsewhere."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron_rpsd.runs.flops import ModelShape, causal_pairs, forward_flops, step_flops

SHAPE = ModelShape(3, 64, 96, 4, 2, 16, 97)


@pytest.mark.parametrize("borders", [(0, 12), (0, 5, 12), (0, 1, 2, 11, 12), None])
@pytest.mark.parametrize("start", [0, 3, 5, 11])
def test_pairs_of_documents_are_counted_one_by_one(borders, start):
    documents = [(0, 12)] if borders is None else list(pairwise(borders))
    seen = [
        (query, key)
        for first, stop in documents
        for query in range(max(first, start), stop)
        for key in range(first, query + 1)
    ]
    assert causal_pairs(12, start, borders) == len(seen)


def test_a_step_is_three_forward_passes_and_a_gate_is_a_third_matrix():
    assert step_flops(SHAPE, 12, 5, (0, 4, 12)) == 3 * forward_flops(SHAPE, 12, 5, (0, 4, 12))
    plain = ModelShape(3, 64, 96, 4, 2, 16, 97, gated=False)
    assert SHAPE.weights_per_token - plain.weights_per_token == 3 * 64 * 96
