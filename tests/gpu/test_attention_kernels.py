"""On a GPU: view pairs by every kernel against dense fp32 attention, and whole views by Transformer Engine in FP8.

Kernels alone, block by block, are `test_correctness.py`'s matter. Written without a GPU at hand; not run yet.

Tolerances are relative errors in the 2-norm. bf16 keeps 8 bits: inputs are exact (the truth reads the same numbers),
results, probabilities and scores' gradients are rounded. The CPU's bf16 kernel is off by 0.002 to 0.004 on such inputs;
2^-7 is twice that. FP8: e4m3 inputs alone, emulated on the CPU, give 0.04 for outputs and 0.055 for gradients. The
kernels round probabilities to e4m3 and gradients to e5m2, which has half the precision, as well: 2^-3 and 2^-2. A wrong
mask, order or scale gives errors of order 1.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from megatron_rpsd.attention import KERNELS, PACKAGES, TransformerEngineAttention, stacked_attention, view_attention
from megatron_rpsd.attention.choice import BLOCK_KERNELS
from megatron_rpsd.parallel import ViewLayout

pytestmark = pytest.mark.gpu
LENGTH, ROWS = 512, 2
BF16, FP8_OUTPUT, FP8_GRADIENT = 2.0**-7, 2.0**-3, 2.0**-2


def inputs_and_upstream(layout: ViewLayout, heads: int, groups: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(3)
    return [
        torch.randn(layout.pair_length, ROWS, count, size, generator=generator, device="cuda").to(torch.bfloat16)
        for count in (heads, groups, groups, heads)
    ]


def dense(layout: ViewLayout, query, key, value, scale):
    """fp32, with a mask over the pair axis written from the views' definition."""
    start = layout.length if layout.suffix_start is None else layout.suffix_start
    tokens = torch.cat([torch.arange(layout.length), torch.arange(start, layout.length)]).cuda()
    perturbed = torch.arange(layout.pair_length).cuda() >= layout.length
    own = torch.where(perturbed[:, None] & (tokens[None] >= start), perturbed[None], ~perturbed[None])
    visible = own & (tokens[None] <= tokens[:, None])
    key, value = (tensor.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for tensor in (key, value))
    scores = (scale * torch.einsum("qbnd,kbnd->bnqk", query, key)).masked_fill(~visible, float("-inf"))
    return torch.einsum("bnqk,kbnd->qbnd", scores.softmax(dim=-1), value)


def results(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    *leaves, upstream = (tensor.detach().clone() for tensor in tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    output = function(*leaves)
    output.backward(upstream)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def errors(found: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    return [((got.float() - true).norm() / true.norm()).item() for got, true in zip(found, truth, strict=True)]


def truth_of(layout: ViewLayout, tensors: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return results(lambda *qkv: dense(layout, *qkv, scale), [tensor.float() for tensor in tensors])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def engine_of(heads: int, groups: int, size: int) -> TransformerEngineAttention:
    pytest.importorskip("transformer_engine.pytorch")
    return TransformerEngineAttention(heads, groups, size, size**-0.5, 1)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("start", [None, 0, 128, 400])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_view_pair_in_bf16(kernel, start, heads, groups, size):
    if kernel in PACKAGES:
        pytest.importorskip(PACKAGES[kernel])
    layout, scale = ViewLayout(LENGTH, start), size**-0.5
    tensors = inputs_and_upstream(layout, heads, groups, size)
    function = engine_of(heads, groups, size).block if kernel == "te" else BLOCK_KERNELS[kernel]
    found = results(lambda *qkv: view_attention(*qkv, layout, None, scale, function), tensors)
    assert max(errors(found, truth_of(layout, tensors, scale))) < BF16


@pytest.mark.parametrize("start", [None, 0])
def test_whole_views_are_one_call_in_bf16(start):
    layout, scale = ViewLayout(LENGTH, start), 128**-0.5
    tensors, engine = inputs_and_upstream(layout, 8, 2, 128), engine_of(8, 2, 128)
    found = results(lambda *qkv: stacked_attention(*qkv, layout, engine.whole), tensors)
    assert max(errors(found, truth_of(layout, tensors, scale))) < BF16


def in_fp8(engine: TransformerEngineAttention, layout: ViewLayout, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The third of three passes: delayed scaling takes its scales from those before."""
    te, recipe = (importlib.import_module(f"transformer_engine.{name}") for name in ("pytorch", "common.recipe"))
    scaling = recipe.DelayedScaling(fp8_format=recipe.Format.HYBRID, amax_history_len=1, fp8_dpa=True)

    def attention(*qkv):
        with te.autocast(enabled=True, recipe=scaling):
            return stacked_attention(*qkv, layout, engine.whole)

    for _ in range(3):
        found = results(attention, tensors)
    return found


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("start", [None, 0])
def test_whole_views_in_fp8(start, heads, groups):
    layout, scale = ViewLayout(LENGTH, start), 128**-0.5
    tensors = inputs_and_upstream(layout, heads, groups, 128)
    output, *gradients = errors(
        in_fp8(engine_of(heads, groups, 128), layout, tensors), truth_of(layout, tensors, scale)
    )
    assert BF16 < output < FP8_OUTPUT, "as exact as bf16: FP8 did not run"
    assert max(gradients) < FP8_GRADIENT


def test_fp8_with_delayed_scaling_sees_no_future_and_reads_equal_views_alike():
    layout = ViewLayout(LENGTH, 0)
    single = inputs_and_upstream(ViewLayout(LENGTH), 8, 2, 128)
    tensors, cut = [torch.cat([tensor, tensor]) for tensor in single], LENGTH // 2 + 1
    engine = engine_of(8, 2, 128)
    before = in_fp8(engine, layout, tensors)[0]
    assert torch.equal(before[:LENGTH], before[LENGTH:])
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed[:3]:
        tensor[cut:LENGTH] = tensor[cut:LENGTH].flip(0)  # the same largest value: scales stay
    after = in_fp8(engine, layout, changed)[0]
    assert torch.equal(after[:cut], before[:cut]) and not torch.equal(after[cut:LENGTH], before[cut:LENGTH])
