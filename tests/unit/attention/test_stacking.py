"""Whole views as rows of one batch: the order, what it equals, and the context parallelism that it is dealt out for."""

from __future__ import annotations

import pytest
import torch
from megatron.core import utils

from megatron_rpsd.attention import causal_attention, stackable, stacked_attention, view_attention
from megatron_rpsd.attention.stacking import stack_views, unstack_views
from megatron_rpsd.parallel import ViewLayout
from tests.unit.attention.test_views import LENGTH, SCALE, outputs_and_gradients, random_inputs


def test_the_standard_views_come_first():
    layout = ViewLayout(8, 0, 2, 0)
    held = layout.local_indices()
    pair = torch.stack([held, held + 100], dim=1)  # two samples
    rows = stack_views(pair, layout)
    assert rows.T.tolist() == [[0, 1, 6, 7], [100, 101, 106, 107], [8, 9, 14, 15], [108, 109, 114, 115]]
    assert torch.equal(unstack_views(rows, layout), pair)
    single = ViewLayout(8, None, 2, 0)
    assert stack_views(pair[:4], single).tolist() == unstack_views(pair[:4], single).tolist() == pair[:4].tolist()


def test_what_can_be_stacked():
    borders = ((0, 4, 8),)
    assert stackable(ViewLayout(8), None) and stackable(ViewLayout(8, 0), None)
    assert not stackable(ViewLayout(8, 4), None) and not stackable(ViewLayout(8, 0), borders)


@pytest.mark.parametrize("start", [None, 0])
def test_one_call_equals_view_attention(start):
    layout = ViewLayout(LENGTH, start)
    inputs = random_inputs(layout.pair_length)
    asked = []

    def attention(query, key, value):
        asked.append((tuple(query.shape), tuple(key.shape)))
        return causal_attention(query, key, value, SCALE)

    ours = outputs_and_gradients(lambda q, k, v: stacked_attention(q, k, v, layout, attention), inputs)
    expected = outputs_and_gradients(lambda q, k, v: view_attention(q, k, v, layout, None, SCALE), inputs)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    rows = 2 if start is None else 4
    assert asked == [((LENGTH, rows, 4, 8), (LENGTH, rows, 2, 8))]


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_the_zigzag_is_megatrons(cp_size, monkeypatch):
    """Its batches under context parallelism, which are what Transformer Engine's attention expects."""
    length = 4 * cp_size
    for rank in range(cp_size):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: cp_size)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        batch = {"tokens": torch.arange(length)[None]}
        dealt = utils._get_batch_on_this_cp_rank_per_sequence_balancing(batch, cp_group=None)
        assert dealt["tokens"][0].tolist() == ViewLayout(length, 0, cp_size, rank).standard_tokens().tolist()
