"""Attention over a view pair on one rank against a dense mask over the pair axis (several ranks: tests/distributed)."""

from __future__ import annotations

import pytest
import torch

from megatron_rpsd.attention import causal_attention, view_attention
from megatron_rpsd.parallel import ViewLayout

LENGTH, BATCH, HEADS, GROUPS, DIM, SCALE = 12, 2, 4, 2, 8, 0.4
STARTS = [0, 1, 6, LENGTH - 1]


def random_inputs(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, BATCH, heads, DIM, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def upstream(tokens: int) -> torch.Tensor:
    shape = (tokens, BATCH, HEADS, DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def pair_mask(start: int | None) -> torch.Tensor:
    """Which keys of the pair axis a query sees, by the definition of the views, entry by entry: bool [2L-t, 2L-t]."""
    tokens = [("standard", i) for i in range(LENGTH)]
    if start is not None:
        tokens += [("perturbed", i) for i in range(start, LENGTH)]

    def sees(query: tuple[str, int], key: tuple[str, int]) -> bool:
        if key[1] > query[1]:
            return False
        if query[0] == "standard":
            return key[0] == "standard"
        # The perturbed view's own keys from t on; before t it has the standard view's.
        return (key[0] == "perturbed") if key[1] >= start else (key[0] == "standard")

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


def dense(query, key, value, visible) -> torch.Tensor:
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, dim=2) for tensor in (key, value))
    scores = SCALE * torch.einsum("qbnd,kbnd->bnqk", query, key)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, value)


def outputs_and_gradients(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    output.backward(upstream(output.shape[0]))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("start", [None, *STARTS])
def test_a_pair_equals_dense_attention_over_the_pair_axis(start):
    layout = ViewLayout(LENGTH, start)
    inputs = random_inputs(layout.pair_length)
    ours = outputs_and_gradients(lambda q, k, v: view_attention(q, k, v, layout, None, SCALE), inputs)
    expected = outputs_and_gradients(lambda q, k, v: dense(q, k, v, pair_mask(start)), inputs)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_mask_of_the_smallest_pair_by_hand():
    """Guards the oracle: t = 11 of L = 12 adds one query, which sees standard keys 0..10 and itself, not key 11."""
    mask = pair_mask(LENGTH - 1)
    assert mask[:LENGTH, :LENGTH].equal(torch.ones(LENGTH, LENGTH).tril().bool())
    assert not mask[:LENGTH, LENGTH].any()
    assert mask[LENGTH].tolist() == [True] * 11 + [False, True]


@pytest.mark.parametrize("start", STARTS[1:])
def test_a_shared_prefix_equals_a_whole_second_view(start):
    """Where the second view's prefix has the standard view's keys, its suffix and all gradients are the same."""
    standard, suffix = random_inputs(LENGTH), random_inputs(LENGTH - start, seed=1)

    def shared(*leaves):
        pair = [torch.cat([leaves[i], leaves[i + 3]]) for i in range(3)]
        return view_attention(*pair, ViewLayout(LENGTH, start), None, SCALE)

    def whole(*leaves):
        pair = [torch.cat([leaves[i], leaves[i][:start], leaves[i + 3]]) for i in range(3)]
        both = view_attention(*pair, ViewLayout(LENGTH, 0), None, SCALE)
        return torch.cat([both[:LENGTH], both[LENGTH + start :]])

    one, other = (outputs_and_gradients(function, [*standard, *suffix]) for function in (shared, whole))
    for got, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", STARTS)
def test_the_standard_half_is_bitwise_the_single_view(start, dtype):
    layout = ViewLayout(LENGTH, start)
    pair = random_inputs(layout.pair_length, dtype=dtype)
    both = view_attention(*pair, layout, None, SCALE)
    single = view_attention(*(tensor[:LENGTH] for tensor in pair), ViewLayout(LENGTH), None, SCALE)
    assert torch.equal(both[:LENGTH], single)


@pytest.mark.parametrize("start", STARTS)
def test_a_second_view_with_the_same_keys_says_the_same(start):
    single = random_inputs(LENGTH)
    pair = [torch.cat([tensor, tensor[start:]]) for tensor in single]
    both = view_attention(*pair, ViewLayout(LENGTH, start), None, SCALE)
    torch.testing.assert_close(both[LENGTH:], both[start:LENGTH], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("start", STARTS)
def test_standard_queries_do_not_depend_on_the_suffix(start):
    layout = ViewLayout(LENGTH, start)
    leaves = [tensor.requires_grad_() for tensor in random_inputs(layout.pair_length)]
    view_attention(*leaves, layout, None, SCALE)[:LENGTH].sum().backward()
    assert all(not leaf.grad[LENGTH:].any() for leaf in leaves)


@pytest.mark.parametrize(("start", "keys"), [(None, [12]), (0, [12, 12]), (5, [12, 12])])
def test_a_kernel_gets_queries_that_end_where_their_keys_end(start, keys):
    """Any causal kernel serves: what it is asked for is plain bottom-right causal attention."""
    asked = []

    def kernel(query, key, value, scale):
        asked.append((query.shape[0], key.shape[0], value.shape[0], scale))
        return causal_attention(query, key, value, scale)

    layout = ViewLayout(LENGTH, start)
    view_attention(*random_inputs(layout.pair_length), layout, None, SCALE, kernel=kernel)
    queries = [LENGTH] if start is None else [LENGTH, LENGTH - start]
    assert asked == [(query, key, key, SCALE) for query, key in zip(queries, keys, strict=True)]
