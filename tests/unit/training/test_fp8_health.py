"""The parts of FP8's health check that no model is needed for; the figures: tests/distributed/test_fp8_health.py."""

from __future__ import annotations

import sys
import types
from argparse import Namespace

import pytest
import torch
from megatron.training import training

from megatron_rpsd.attention import TransformerEngineAttention
from megatron_rpsd.training import fp8_health
from tests.transformer_engine_stand_in import DotProductAttention


def scaling(value: float = 1.0) -> dict:
    state = types.SimpleNamespace(amax_history=torch.full((1, 3), value), scale=torch.full((3,), value))
    return {"scaling_fwd": state, "recipe": "a recipe", "num_gemms": 3}


def values(part) -> set[float]:
    state = part.fp8_meta["scaling_fwd"]
    return {*state.scale.tolist(), *state.amax_history.flatten().tolist()}


def test_scaling_is_as_before_and_what_is_new_begins_anew():
    layer, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    layer.engine = TransformerEngineAttention(4, 2, 8, 0.4, 1, module=DotProductAttention)
    layer.fp8_meta, other.fp8_meta = scaling(5.0), {}
    model = [torch.nn.Sequential(layer, other)]
    with fp8_health.scaling_kept(model):
        for tensor in vars(layer.fp8_meta["scaling_fwd"]).values():
            tensor.fill_(7.0)
        other.fp8_meta, layer.engine.modules[0].fp8_meta = scaling(7.0), scaling(7.0)
    assert values(layer) == {5.0}
    for part in (other, layer.engine.modules[0]):
        assert part.fp8_meta["scaling_fwd"].scale.eq(1).all() and not part.fp8_meta["scaling_fwd"].amax_history.any()


@pytest.mark.parametrize(
    ("fp8", "recipe", "passes"), [("hybrid", "delayed", 2), ("hybrid", "tensorwise", 0), (None, "delayed", 0)]
)
def test_delayed_scaling_is_calibrated(fp8, recipe, passes, monkeypatch):
    done = []
    manager = types.SimpleNamespace(reduce_and_update_fp8_tensors=lambda forward: done.append(("scales", forward)))
    module = types.SimpleNamespace(FP8GlobalStateManager=manager)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.quantization", module)
    monkeypatch.setattr(fp8_health, "_read", lambda *given: done.append("pass"))
    model = torch.nn.Module()
    model.config = types.SimpleNamespace(fp8=fp8, fp8_recipe=recipe)
    step = types.SimpleNamespace(length=8, objective=types.SimpleNamespace(vocab_size=97))
    fp8_health.calibrate([model], step)
    assert done == ["pass", ("scales", True)] * passes


def test_only_a_run_in_fp8_is_measured_and_once(monkeypatch):
    def original(*given):
        raise AssertionError("not to be run")

    monkeypatch.setattr(training, "train", original)
    fp8_health.install_fp8_health(Namespace(fp8=None), lambda: None)
    assert training.train is original
    fp8_health.install_fp8_health(Namespace(fp8="hybrid"), lambda: None)
    wrapped = training.train
    fp8_health.install_fp8_health(Namespace(fp8="hybrid"), lambda: None)
    assert wrapped is not original and training.train is wrapped


def test_the_future_begins_within_a_tile_and_at_the_last_token():
    assert fp8_health.cuts(4096) == (2049, 4095)
    one, other = (fp8_health.probe_sample(16, 2, 97) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one) and one["tokens"].max() < 97
