import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rpsd.checkpoint.hf_folder import HFFolder, rope_of


def test_dimensions_and_rope_of_a_saved_model(save_model):
    folder = HFFolder(save_model("qwen3")[0])
    dims = folder.dimensions()
    assert (dims.num_layers, dims.hidden_size, dims.ffn_hidden_size, dims.vocab_size) == (2, 24, 36, 97)
    assert (dims.num_attention_heads, dims.num_query_groups, dims.head_dim) == (6, 3, 8)
    assert (dims.tied, dims.qk_norm, dims.qkv_bias) == (False, True, False)
    assert folder.rope() == (10000.0, None, 64)
    assert HFFolder(save_model("llama")[0]).rope() == (500000.0, None, 64)


def test_absent_keys_mean_what_transformers_takes_them_for(save_model, edit_config):
    path, _ = save_model("llama-tied")
    edit_config(path, head_dim=..., num_key_value_heads=..., architectures=...)
    dims = HFFolder(path).dimensions()
    assert (dims.head_dim, dims.num_query_groups) == (4, 6)
    edit_config(path, head_dim=None, num_key_value_heads=None)
    assert HFFolder(path).dimensions() == dims
    path, _ = save_model("qwen3")
    edit_config(path, head_dim=...)
    assert HFFolder(path).dimensions().head_dim == 128
    edit_config(path, intermediate_size=...)
    with pytest.raises(ValueError, match=r"intermediate_size=\(absent\)"):
        HFFolder(path).dimensions()


def test_tensors_are_read_from_every_shard(save_model):
    path, model = save_model("llama", max_shard_size="10KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    folder = HFFolder(path)
    state = model.state_dict()
    assert folder.names() == sorted(state)
    for name in folder.names():
        assert torch.equal(folder.tensor(name), state[name])
    with pytest.raises(ValueError, match="no tensor nothing.weight"):
        folder.tensor("nothing.weight")


def test_folder_of_links_is_read(save_model, tmp_path):
    """The Hugging Face cache keeps files elsewhere and fills a snapshot folder with links."""
    path, model = save_model("llama", max_shard_size="10KB")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in path.iterdir():
        os.symlink(file, snapshot / file.name)
    name = "model.norm.weight"
    assert torch.equal(HFFolder(snapshot).tensor(name), model.state_dict()[name])


def test_missing_or_broken_config_is_one_line(tmp_path, save_model):
    with pytest.raises(ValueError, match="config.json does not exist") as caught:
        HFFolder(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    path, _ = save_model("llama")
    for text, words in (("{", "not valid JSON"), ("[]", "must hold a JSON object")):
        (path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            HFFolder(path)


def test_pickles_are_never_read(save_model):
    path, _ = save_model("llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin; pickles are never read"):
        HFFolder(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="needs model.safetensors or model.safetensors.index.json"):
        HFFolder(path)


def test_broken_safetensors_is_one_line(save_model):
    path, _ = save_model("llama")
    (path / "model.safetensors").write_bytes(b"\x07")
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file"):
        HFFolder(path)


@pytest.mark.parametrize("escape", ["../outside.safetensors", "{outside}", "a/../../outside.safetensors"])
def test_index_may_not_leave_the_folder(save_model, tmp_path, escape):
    path, _ = save_model("llama", max_shard_size="10KB")
    index_path = path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name = "model.norm.weight"
    # The file exists, so that nothing but the check of its name stands in the way.
    shutil.copy(path / index["weight_map"][name], tmp_path / "outside.safetensors")
    index["weight_map"][name] = escape.format(outside=tmp_path / "outside.safetensors")
    index_path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not the name of a safetensors file inside the folder"):
        HFFolder(path)


@pytest.mark.parametrize(
    ("file_name", "words"), [("pytorch_model.bin", "not the name"), ("absent.safetensors", "is not in the folder")]
)
def test_index_names_only_safetensors_that_exist(save_model, file_name, words):
    path, _ = save_model("llama", max_shard_size="10KB")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file_name}}))
    with pytest.raises(ValueError, match=words):
        HFFolder(path)


def rewrite_tensors(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_unmapped_and_missing_tensors_stop_the_reading_before_it_starts(save_model):
    path, _ = save_model("llama")
    rewrite_tensors(path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}))
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj.bias.*would lose"):
        next(HFFolder(path).full_tensors())
    rewrite_tensors(path, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.bias"))
    rewrite_tensors(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensor\(s\).*model.layers.1.mlp.up_proj.weight"):
        next(HFFolder(path).full_tensors())


def test_tensor_of_another_shape_is_named(save_model, edit_config):
    path, _ = save_model("llama")
    edit_config(path, intermediate_size=40)
    with pytest.raises(
        ValueError,
        match=r"model.layers.0.mlp.gate_proj.weight has shape \[36, 24\]; by config.json it should be \[40, 24\]",
    ):
        list(HFFolder(path).full_tensors())


def test_output_weight_of_a_tied_model_must_equal_the_embedding(save_model):
    path, model = save_model("llama-tied")
    embedding = model.state_dict()["model.embed_tokens.weight"].clone()
    rewrite_tensors(path, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    names = [mapped.megatron_name for mapped, _ in HFFolder(path).full_tensors()]
    assert "output_layer.weight" not in names and len(names) == 2 + 2 * 6
    embedding[96, 23] += 1e-6
    rewrite_tensors(path, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    with pytest.raises(ValueError, match="tie_word_embeddings is true, yet lm_head.weight differs"):
        next(HFFolder(path).full_tensors())


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", dict(attention_bias=True), "attention_bias=true"),
        ("llama", dict(mlp_bias=True), "mlp_bias=true"),
        ("qwen3", dict(attention_bias=True), "attention_bias=true"),
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
        ("llama", dict(num_key_value_heads=4), "6 % 4 = 2"),
        ("llama", dict(num_hidden_layers="two"), "num_hidden_layers=two"),
        ("mistral", dict(sliding_window=63), "sliding_window=63 < max_position_embeddings=64"),
        ("mistral", dict(sliding_window=..., max_position_embeddings=4097), r"sliding_window=4096 \(the default"),
        ("qwen2", dict(use_sliding_window=True, layer_types=...), "use_sliding_window=true"),
    ],
)
def test_features_outside_the_common_decoder_are_refused(save_model, edit_config, kind, changes, words):
    path, _ = save_model(kind)
    edit_config(path, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        HFFolder(path).dimensions()
    assert "\n" not in str(caught.value)


def test_harmless_window_settings_pass(save_model, edit_config):
    path, _ = save_model("mistral")
    edit_config(path, sliding_window=64)
    HFFolder(path).dimensions()
    path, _ = save_model("qwen2")
    edit_config(path, use_sliding_window=False, sliding_window=4)
    HFFolder(path).dimensions()


@pytest.mark.parametrize("change", [dict(quantization_config={"bits": 4}), dict(architectures=["Qwen2MoeForCausalLM"])])
def test_quantised_and_expert_models_are_refused_on_opening(save_model, edit_config, change):
    path, _ = save_model("llama")
    edit_config(path, **change)
    with pytest.raises(ValueError, match="quantization_config is set|mixture-of-experts"):
        HFFolder(path)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (dict(), (10000.0, None)),
        (dict(rope_theta=500000), (500000.0, None)),
        (dict(rope_theta=1e6, rope_scaling=None), (1e6, None)),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), (1e6, None)),
        (
            dict(rope_theta=7.0, rope_scaling={"type": "linear", "factor": 4.0}),
            (7.0, {"rope_type": "linear", "factor": 4.0}),
        ),
        (
            dict(rope_parameters={**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 32}),
            (5e5, {**LLAMA3, "original_max_position_embeddings": 32}),
        ),
        (
            dict(rope_theta=5e5, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            (5e5, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        ),
        (
            dict(rope_parameters={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}),
            (10000.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
        ),
        # Both schemas agree, as this project writes them.
        (
            dict(
                rope_theta=9.0,
                rope_scaling={"rope_type": "linear", "factor": 2.0},
                rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0},
            ),
            (9.0, {"rope_type": "linear", "factor": 2.0}),
        ),
    ],
)
def test_both_rope_schemas_are_read(keys, expected):
    assert rope_of({"max_position_embeddings": 64, **keys}) == (*expected, 64)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), "different RoPE bases: rope_theta=10000"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type='dynamic' is not supported"),
        (dict(rope_scaling={"type": "linear"}), "needs a factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(rope_parameters={"full_attention": {"rope_theta": 1.0}}), "per layer type"),
        (
            dict(rope_parameters={"rope_theta": 1e6}, rope_scaling={"type": "linear", "factor": 2.0}),
            "write rope_theta at the top level",
        ),
    ],
)
def test_unsupported_rope_is_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        rope_of({"max_position_embeddings": 64, **keys})
