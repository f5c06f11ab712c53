"""How Transformer Engine's attention is called, against a stand-in with its signature (several ranks:
tests/distributed/test_attention_kernels.py)."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

from megatron_rpsd.attention import TransformerEngineAttention, stacked_attention, view_attention
from megatron_rpsd.parallel import ViewLayout
from tests.transformer_engine_stand_in import DotProductAttention
from tests.unit.attention.test_views import LENGTH, SCALE, outputs_and_gradients, random_inputs


@pytest.fixture
def engine(monkeypatch) -> TransformerEngineAttention:
    monkeypatch.setattr(DotProductAttention, "calls", [])
    return TransformerEngineAttention(4, 2, 8, SCALE, 1, module=DotProductAttention)


@pytest.mark.parametrize("start", [None, 0])
def test_whole_views_are_one_causal_call(start, engine):
    layout = ViewLayout(LENGTH, start)
    inputs = random_inputs(layout.pair_length)
    ours = outputs_and_gradients(lambda q, k, v: stacked_attention(q, k, v, layout, engine.whole), inputs)
    expected = outputs_and_gradients(lambda q, k, v: view_attention(q, k, v, layout, None, SCALE), inputs)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    shape = (LENGTH, 2 if start is None else 4)
    assert engine.modules[0].calls == [(shape, shape, "causal", True)]


def test_a_shared_prefix_is_a_rectangle_with_a_bottom_right_mask(engine):
    layout = ViewLayout(LENGTH, 5)
    inputs = random_inputs(layout.pair_length)
    ours = outputs_and_gradients(lambda q, k, v: view_attention(q, k, v, layout, None, SCALE, engine.block), inputs)
    expected = outputs_and_gradients(lambda q, k, v: view_attention(q, k, v, layout, None, SCALE), inputs)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    asked = [(query[0], key[0], mask) for query, key, mask, _ in engine.modules[0].calls]
    assert asked == [(LENGTH, LENGTH, "causal"), (LENGTH - 5, LENGTH, "causal_bottom_right")]


def test_its_modules_follow_the_layer_into_evaluation(engine):
    engine.train(False)
    layout = ViewLayout(LENGTH)
    stacked_attention(*random_inputs(LENGTH), layout, engine.whole)
    assert [call[-1] for call in engine.modules[0].calls] == [False]
    assert len(engine.modules) == 1


def test_the_stand_in_has_transformer_engines_parameters():
    """Where the package is installed its source is read; to import it may take a GPU's libraries."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None:
        pytest.skip("needs the transformer_engine package: its source is compared")
    folder = Path(spec.submodule_search_locations[0])
    source = folder / "pytorch" / "attention" / "dot_product_attention" / "dot_product_attention.py"
    (found,) = (
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "DotProductAttention"
    )
    for name in ("__init__", "forward"):
        (theirs,) = (node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == name)
        known = {argument.arg for argument in theirs.args.args}
        assert set(inspect.signature(getattr(DotProductAttention, name)).parameters) <= known
