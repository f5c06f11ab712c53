"""The causal kernel against softmax attention written out in fp64 with an explicit mask."""

from __future__ import annotations

import pytest
import torch

from megatron_rpsd.attention import causal_attention


def written_out(query, key, value, visible, scale) -> torch.Tensor:
    """softmax(scale q.k) v over the visible keys, head by head: [sq, b, n, d]; `visible` bool [sq, sk]."""
    group = query.shape[2] // key.shape[2]
    output = torch.empty_like(query)
    for b in range(query.shape[1]):
        for head in range(query.shape[2]):
            scores = scale * query[:, b, head] @ key[:, b, head // group].T
            weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
            output[:, b, head] = weights @ value[:, b, head // group]
    return output


def bottom_right(sq: int, sk: int) -> torch.Tensor:
    return torch.tensor([[j <= i + sk - sq for j in range(sk)] for i in range(sq)])


def random_inputs(sq, sk, heads, groups, dtype=torch.float64, batch=2, d=8):
    generator = torch.Generator().manual_seed(sq * 100 + sk)
    shapes = [(sq, batch, heads, d), (sk, batch, groups, d), (sk, batch, groups, d)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


SHAPES = pytest.mark.parametrize(("sq", "sk"), [(1, 1), (5, 5), (2, 5), (1, 7), (16, 33), (70, 600)])
HEADS = pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)])


@SHAPES
@HEADS
def test_output_and_gradients_equal_the_written_out_softmax(sq, sk, heads, groups):
    inputs = random_inputs(sq, sk, heads, groups)
    copies = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    ours = causal_attention(*inputs, scale=0.3)
    expected = written_out(*copies, bottom_right(sq, sk), scale=0.3)
    assert ours.shape == (sq, 2, heads, 8)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view(ours.shape)
    ours.backward(upstream)
    expected.backward(upstream)
    for tensor, copy in zip(inputs, copies, strict=True):
        torch.testing.assert_close(tensor.grad, copy.grad, rtol=1e-12, atol=1e-12)


def test_the_scale_is_used():
    inputs = random_inputs(4, 6, 2, 2)
    assert not torch.allclose(causal_attention(*inputs, scale=0.3), causal_attention(*inputs, scale=0.6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@HEADS
def test_error_in_low_precision_is_at_most_twice_that_of_the_written_out_form(dtype, heads, groups):
    inputs = [tensor.detach() for tensor in random_inputs(16, 33, heads, groups, dtype)]
    exact = written_out(*(tensor.double() for tensor in inputs), bottom_right(16, 33), 0.3)
    standard = written_out(*inputs, bottom_right(16, 33), 0.3)
    ours = causal_attention(*inputs, scale=0.3)
    assert ours.dtype == dtype
    error, standard_error = ((output.double() - exact).abs().max() for output in (ours, standard))
    assert error <= 2 * standard_error, f"{error:.2e} against {standard_error:.2e}"


@pytest.mark.parametrize("first", [True, False], ids=["early", "late"])
def test_scores_that_dwarf_all_others_stay_exact(first):
    """One key of a thousandfold score, before the queries or among them: every query that sees it copies its value."""
    query, key, value = (tensor.detach() for tensor in random_inputs(4, 9, 2, 2))
    query = query.abs() + 1
    at = 1 if first else 5  # the queries stand at tokens 5..8
    key[at] = 1e3
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = causal_attention(*inputs, scale=0.3)
    output.sum().backward()
    torch.testing.assert_close(output, value[at].expand_as(output), rtol=1e-12, atol=1e-12)
    assert all(torch.isfinite(tensor.grad).all() for tensor in inputs)


def test_inputs_are_not_modified():
    inputs = random_inputs(3, 5, 4, 2)
    before = [tensor.detach().clone() for tensor in inputs]
    causal_attention(*inputs, scale=0.3).sum().backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))
