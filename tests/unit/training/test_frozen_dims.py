"""Which rows a frozen frequency means, against the table that converts checkpoints."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch

from megatron_rpsd.checkpoint.layouts import ModelDimensions, Qkv
from megatron_rpsd.training.frozen_dims import FrozenDims, check_frozen_dims, frozen_mask, parse_dims

HEAD_DIM, HEADS, GROUPS, HIDDEN = 8, 4, 2, 6
DIMS = ModelDimensions(2, HIDDEN, 12, HEADS, GROUPS, HEAD_DIM, 17, tied=True, qk_norm=False, qkv_bias=True)


def test_lists_of_indices_and_ranges():
    assert parse_dims("0-3,12", 32) == [0, 1, 2, 3, 12]
    assert parse_dims(" 5 , 1 - 2,1", 16) == [1, 2, 5]
    assert parse_dims("7", 16) == [7]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("16", "head_dim / 2 = 16, 0 to 15"),
        ("3-16", "there is no frequency 16"),
        ("3-1", "runs backwards; write 1-3"),
        ("", '"" is no index'),
        ("1,,2", '"" is no index'),
        ("-1", '"-1" is no index'),
        ("1-", '"1-" is no index'),
        ("a-b", '"a-b" is no index'),
    ],
)
def test_other_lists_are_refused(text, problem):
    with pytest.raises(ValueError, match=f"--freeze-rope-dims {text}") as refused:
        parse_dims(text, 32)
    assert problem in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("shape", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_the_mask_is_that_of_hugging_faces_rows(tp_size, shape):
    frozen = [1, 3]
    channels = [1, 3, 1 + HEAD_DIM // 2, 3 + HEAD_DIM // 2]

    def marked(heads: int, mark: bool) -> torch.Tensor:
        rows = torch.zeros(heads, HEAD_DIM, *shape, dtype=torch.bool)
        rows[:, channels] = mark
        return rows.flatten(0, 1)

    full = Qkv().to_megatron([marked(HEADS, True), marked(GROUPS, True), marked(GROUPS, False)], DIMS)
    name = f"decoder.layers.1.self_attention.linear_qkv.{'weight' if shape else 'bias'}"
    for rank in range(tp_size):
        local = Qkv().split(full, tp_size, rank, DIMS)
        assert torch.equal(frozen_mask(name, torch.empty(local.shape), frozen, HEAD_DIM, HEADS // GROUPS), local)


def test_norms_of_queries_and_keys_are_frozen_and_nothing_else():
    layer = "decoder.layers.0.self_attention."
    for name in ("q_layernorm.weight", "k_layernorm.weight"):
        mask = frozen_mask(layer + name, torch.empty(HEAD_DIM), [0], HEAD_DIM, 2)
        assert mask.tolist() == [True, False, False, False] * 2
    for name in ("linear_proj.weight", "linear_qkv.layer_norm_weight"):
        assert frozen_mask(layer + name, torch.empty(32, HIDDEN), [0], HEAD_DIM, 2) is None
    assert frozen_mask("decoder.layers.0.input_layernorm.weight", torch.empty(HIDDEN), [0], HEAD_DIM, 2) is None


def test_optimizers_that_keep_their_values_elsewhere_are_refused():
    args = argparse.Namespace(
        freeze_rope_dims="0", kv_channels=None, hidden_size=32, num_attention_heads=4, optimizer="adam"
    )
    check_frozen_dims(args)
    for name, value in (
        ("optimizer", "muon"),
        ("optimizer_cpu_offload", True),
        ("use_precision_aware_optimizer", True),
    ):
        other = argparse.Namespace(**{**vars(args), name: value})
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
            check_frozen_dims(other)


class Attention(torch.nn.Module):
    """A stage with one fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=HEAD_DIM)
        self.linear_qkv = torch.nn.Linear(HIDDEN, (HEADS + 2 * GROUPS) * HEAD_DIM)


class Optimizer:
    """The part of Megatron's optimizers that is stepped: gradients are handed over, then torch's optimizer steps."""

    is_stub_optimizer = False

    def __init__(self, stage: Attention) -> None:
        self.parameters = list(stage.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.1, weight_decay=0.5)

    def prepare_grads(self) -> None:
        for parameter in self.parameters:
            parameter.grad = parameter.main_grad

    def step(self) -> None:
        for parameter in self.parameters:
            parameter.main_grad = torch.ones_like(parameter)
        self.prepare_grads()
        self.optimizer.step()


def test_momentum_and_weight_decay_leave_frozen_rows_as_they_are():
    stage = Attention()
    optimizer = Optimizer(stage)
    optimizer.step()  # not frozen yet: momentum
    before = [parameter.detach().clone() for parameter in stage.parameters()]
    FrozenDims([stage], optimizer, [0, 2])
    for _ in range(3):
        optimizer.step()
    for (name, parameter), old in zip(stage.named_parameters(), before, strict=True):
        mask = frozen_mask(name, parameter, [0, 2], HEAD_DIM, HEADS // GROUPS)
        assert torch.equal(parameter == old, mask), name
        assert not parameter.main_grad[mask].any() and parameter.main_grad[~mask].all()
