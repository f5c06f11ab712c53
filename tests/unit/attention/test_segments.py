"""Attention cut at document borders against a dense mask written entry by entry, on every rank of a zigzag."""

from __future__ import annotations

import pytest
import torch

from megatron_rpsd.attention import causal_attention, view_attention
from megatron_rpsd.attention.segments import row_groups, segments, take_ranges
from megatron_rpsd.parallel import ViewLayout
from tests.unit.attention.test_views import SCALE, dense, outputs_and_gradients, random_inputs

LENGTH = 24
BORDERS = [(0, 24), (0, 1, 24), (0, 6, 7, 12, 24), (0, 3, 17, 18, 23, 24), tuple(range(25))]
STARTS = [None, 0, 4, 12, 20]


def document(token: int, borders: tuple[int, ...]) -> int:
    return sum(border <= token for border in borders)


def pair_mask(start: int | None, borders: tuple[int, ...]) -> torch.Tensor:
    """Which keys of the pair axis a query sees: bool [2L-t, 2L-t]."""
    tokens = [("standard", i) for i in range(LENGTH)]
    if start is not None:
        tokens += [("perturbed", i) for i in range(start, LENGTH)]

    def sees(query: tuple[str, int], key: tuple[str, int]) -> bool:
        if key[1] > query[1] or document(key[1], borders) != document(query[1], borders):
            return False
        own = query[0] == "perturbed" and key[1] >= start  # before t the perturbed view has the standard view's keys
        return key[0] == ("perturbed" if own else "standard")

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("borders", BORDERS)
def test_rows_with_borders_of_their_own_equal_dense_attention(borders, start):
    layout, other = ViewLayout(LENGTH, start), (0, 9, 24)
    inputs = random_inputs(layout.pair_length)

    def ours(*leaves):
        return view_attention(*leaves, layout, None, SCALE, documents=(borders, other))

    def expected(*leaves):
        masks = [pair_mask(start, each) for each in (borders, other)]
        return torch.cat(
            [dense(*(leaf[:, row : row + 1] for leaf in leaves), mask) for row, mask in enumerate(masks)], dim=1
        )

    for got, wanted in zip(*(outputs_and_gradients(form, inputs) for form in (ours, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("cp_size", "start"), [*((1, t) for t in STARTS), *((2, t) for t in STARTS), (3, None), (3, 12)]
)
@pytest.mark.parametrize("borders", BORDERS)
def test_every_ranks_segments_are_the_masks_rows(borders, cp_size, start):
    mask = pair_mask(start, borders)
    for rank in range(cp_size):
        layout = ViewLayout(LENGTH, start, cp_size, rank)
        held, covered = layout.local_indices().tolist(), []
        for segment in segments(layout, borders):
            keys = [key for first, last in segment.keys for key in range(first, last)]
            queries = range(*segment.queries)
            covered += queries
            for place, query in enumerate(queries):  # bottom-right causal: all keys but the later queries' own
                seen = keys[: len(keys) - len(queries) + place + 1]
                assert mask[held[query]].nonzero().flatten().tolist() == sorted(seen)
        assert covered == list(range(len(held)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_document_is_bitwise_the_whole_window(dtype):
    layout = ViewLayout(LENGTH, 8)
    inputs = random_inputs(layout.pair_length, dtype=dtype)
    whole, one = (
        outputs_and_gradients(lambda q, k, v, b=b: view_attention(q, k, v, layout, None, SCALE, documents=b), inputs)
        for b in (None, ((0, LENGTH),) * 2)
    )
    assert all(torch.equal(*pair) for pair in zip(whole, one, strict=True))


def test_rows_of_the_same_borders_are_one_call_a_document():
    layout, asked = ViewLayout(LENGTH), []

    def kernel(query, key, value, scale):
        asked.append((tuple(query.shape[:2]), tuple(key.shape[:2])))
        return causal_attention(query, key, value, scale)

    inputs = random_inputs(LENGTH)
    view_attention(*inputs, layout, None, SCALE, kernel, documents=((0, 10, 24),) * 2)
    assert asked == [((10, 2), (10, 2)), ((14, 2), (14, 2))]
    assert len(row_groups(layout, ((0, 10, 24), (0, 11, 24)))) == 2


def test_ranges_that_overlap_add_their_gradients():
    source = torch.arange(12.0).view(6, 2).requires_grad_()
    both, row = take_ranges(source, [(slice(None), ((0, 2), (4, 5))), (slice(1, 2), ((1, 6),))])
    assert both.tolist() == source[[0, 1, 4]].tolist() and row.flatten().tolist() == [3, 5, 7, 9, 11]
    (both.sum() + 10 * row.sum()).backward()
    assert source.grad.tolist() == [[1, 1], [1, 11], [0, 10], [0, 10], [1, 11], [0, 10]]
