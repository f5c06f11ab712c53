"""The update spectrum on hand-built models: what changes in one frequency shows in that frequency alone."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_rpsd.analysis.updates import compare_updates, most_changed, open_weights, relative_change, update_record

HEADS, GROUPS, HEAD_DIM, HIDDEN, LAYERS = 4, 2, 8, 20, 3


@pytest.fixture
def folder(tmp_path):
    """A random Llama."""
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=HEAD_DIM, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "before")
    return tmp_path / "before"


def changed_copy(folder, edit, rope_theta: float = 100.0):
    """The model after `edit(tensors)`."""
    copy = folder.with_name("after")
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = rope_theta
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("projection, heads", [("q", HEADS), ("k", GROUPS), ("v", GROUPS)])
@pytest.mark.parametrize("half", [0, 1])
def test_one_changed_frequency_shows_as_exactly_that_index(projection, heads, half, folder):
    layer, head, index = 1, heads - 1, 2
    row = head * HEAD_DIM + index + half * HEAD_DIM // 2
    key = f"model.layers.{layer}.self_attn.{projection}_proj.weight"

    def edit(tensors):
        tensors[key] = tensors[key].clone()
        tensors[key][row] *= 3

    updates = compare_updates(open_weights(folder), open_weights(changed_copy(folder, edit)))
    assert {name: values.shape for name, values in updates.changes.items()} == {
        "W_q": (LAYERS, HEADS, 4), "W_k": (LAYERS, GROUPS, 4), "W_v": (LAYERS, GROUPS, 4),
    }  # fmt: skip
    changed = updates.changes[f"W_{projection}"]
    assert np.argwhere(changed).tolist() == [[layer, head, index]]
    weight = load_file(folder / "model.safetensors")[key].double()
    other = row + HEAD_DIM // 2 if half == 0 else row - HEAD_DIM // 2
    expected = 2 * weight[row].norm() / (weight[row].square().sum() + weight[other].square().sum()).sqrt()
    assert changed[layer, head, index] == pytest.approx(float(expected), rel=1e-6)
    assert all(not values.any() for name, values in updates.changes.items() if name != f"W_{projection}")


def test_scaling_everything_is_the_same_change_at_every_frequency(folder):
    def edit(tensors):
        for name in tensors:
            if "_proj" in name:
                tensors[name] = tensors[name] * 1.5

    updates = compare_updates(open_weights(folder), open_weights(changed_copy(folder, edit)))
    for values in updates.changes.values():
        np.testing.assert_allclose(values, 0.5, rtol=1e-6)


def test_the_table_names_the_frequencies_in_order_and_wavelengths_are_of_the_model_after(folder):
    def edit(tensors):
        key = "model.layers.0.self_attn.q_proj.weight"
        weight = tensors[key].clone().view(HEADS, 2, 4, HIDDEN)
        weight *= torch.tensor([1.0, 1.3, 1.2, 1.1])[:, None]
        tensors[key] = weight.view(-1, HIDDEN)

    updates = compare_updates(open_weights(folder), open_weights(changed_copy(folder, edit, rope_theta=10000.0)))
    assert [row["index"] for row in most_changed(updates)] == [1, 2, 3, 0]
    np.testing.assert_allclose(updates.curve("W_q"), np.array([0, 0.3, 0.2, 0.1]) / LAYERS, atol=1e-6)
    np.testing.assert_allclose(
        updates.wavelengths, [2 * math.pi * 10000 ** (index / 4) for index in range(4)], rtol=1e-6
    )
    record = update_record(updates, 512)
    assert record["rotary_base"] == {"before": 100.0, "after": 10000.0} and record["window"] == 512
    assert np.shape(record["by_layer_and_head"]["W_k"]) == (LAYERS, GROUPS, 4)
    json.dumps(record, allow_nan=False)


def test_a_weight_that_was_0_has_no_relative_change(folder):
    before = torch.zeros(HEAD_DIM, HIDDEN)
    before[1] = 1
    change = relative_change(before, torch.ones(HEAD_DIM, HIDDEN), HEAD_DIM)
    assert np.isnan(change[0, [0, 2, 3]]).all() and change[0, 1] == 1

    def edit(tensors):
        for layer in range(LAYERS):
            tensors[f"model.layers.{layer}.self_attn.k_proj.weight"].zero_()

    updates = compare_updates(open_weights(changed_copy(folder, edit)), open_weights(folder))
    record = update_record(updates, 64)
    assert record["by_layer_and_head"]["W_k"][0][0] == [None] * 4
    json.dumps(record, allow_nan=False)


def test_what_is_no_model_and_other_models_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no Hugging Face folder.*--hf-reference"):
        open_weights(tmp_path / "empty")
    with pytest.raises(ValueError, match="no Megatron checkpoint folder"):
        open_weights(tmp_path / "empty", folder)
    other = transformers.LlamaConfig(
        vocab_size=31, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=HEAD_DIM,
    )  # fmt: skip
    transformers.LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="--before .* and --after .* are different models"):
        compare_updates(open_weights(folder), open_weights(tmp_path / "other"))
