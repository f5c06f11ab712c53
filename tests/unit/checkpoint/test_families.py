from dataclasses import replace

import pytest
import torch

from megatron_rpsd.checkpoint.families import (
    check_names,
    entries,
    family_of,
    hf_tensors,
    local_spec_name,
    transformer_engine_name,
    unmapped,
)
from megatron_rpsd.checkpoint.layouts import ModelDimensions

DIMS = ModelDimensions(
    num_layers=11,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=4,
    vocab_size=13,
    tied=False,
    qk_norm=False,
    qkv_bias=False,
)


def hf_names(dims: ModelDimensions) -> list[str]:
    return [name for mapped in entries(dims) for name in mapped.hf_names]


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        (dict(architectures=["LlamaForCausalLM"], model_type="llama"), "llama"),
        (dict(model_type="qwen2"), "qwen2"),
        (dict(architectures=["Qwen3ForCausalLM"]), "qwen3"),
        (dict(architectures=["MistralForCausalLM"], model_type="mistral"), "mistral"),
    ],
)
def test_family_is_found(config, model_type):
    assert family_of(config).model_type == model_type


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe"), "Qwen3MoeForCausalLM.*mixture-of-"),
        (dict(architectures=["MixtralForCausalLM"], model_type="mixtral"), "MixtralForCausalLM.*mixture-of-experts"),
        (dict(architectures=["LlamaForCausalLM"], num_local_experts=8), "mixture-of-experts"),
        (dict(architectures=["GPT2LMHeadModel"], model_type="gpt2"), "GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        (dict(architectures=["LlamaModel"], model_type="llama"), "LlamaModel"),
        (dict(architectures=["LlamaForCausalLM"], model_type="mistral"), "contradict"),
        (dict(), "None"),
    ],
)
def test_other_models_are_refused_in_one_line(config, words):
    with pytest.raises(ValueError, match=words) as caught:
        family_of(config)
    assert "\n" not in str(caught.value)


def test_optional_tensors_follow_the_dimensions():
    plain = {mapped.megatron_name for mapped in entries(DIMS)}
    assert len(plain) == 3 + 11 * 6
    layer = "decoder.layers.10.self_attention."
    assert {mapped.megatron_name for mapped in entries(replace(DIMS, tied=True))} == plain - {"output_layer.weight"}
    with_bias = {mapped.megatron_name for mapped in entries(replace(DIMS, qkv_bias=True))} - plain
    assert layer + "linear_qkv.bias" in with_bias and len(with_bias) == 11
    with_norms = {mapped.megatron_name for mapped in entries(replace(DIMS, qk_norm=True))} - plain
    assert {layer + "q_layernorm.weight", layer + "k_layernorm.weight"} <= with_norms and len(with_norms) == 22


def test_surplus_and_missing_names():
    names = hf_names(DIMS)
    extra = ["model.layers.3.self_attn.q_proj.bias", "adapter.weight"]
    buffers = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    assert unmapped(names + buffers, DIMS) == []
    assert unmapped(names + buffers + extra, DIMS) == sorted(extra)
    with pytest.raises(ValueError, match=r"2 tensor\(s\).*adapter.weight"):
        check_names(names + extra, DIMS)
    with pytest.raises(ValueError, match=r"lacks 5 tensor\(s\).*first model.embed_tokens.weight"):
        unmapped(names[5:], DIMS)
    # The layer after the last one is surplus, not silently dropped.
    assert unmapped(hf_names(replace(DIMS, num_layers=12)), DIMS)[0].startswith("model.layers.11.")


def test_tied_model_may_carry_an_output_weight_and_untied_needs_it():
    tied = replace(DIMS, tied=True)
    assert unmapped([*hf_names(tied), "lm_head.weight"], tied) == []
    with pytest.raises(ValueError, match="lm_head.weight"):
        unmapped(hf_names(tied), DIMS)


def test_transformer_engine_names_are_aliases():
    pairs = {
        "decoder.layers.7.input_layernorm.weight": "decoder.layers.7.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.7.pre_mlp_layernorm.weight": "decoder.layers.7.mlp.linear_fc1.layer_norm_weight",
    }
    for local, fused in pairs.items():
        assert transformer_engine_name(local) == fused and local_spec_name(fused) == local
    for unchanged in ("decoder.final_layernorm.weight", "decoder.layers.7.self_attention.q_layernorm.weight"):
        assert transformer_engine_name(unchanged) == unchanged == local_spec_name(unchanged)


def full_tensors(dims: ModelDimensions) -> list[tuple[str, torch.Tensor]]:
    rows = {"linear_qkv": 16, "linear_fc1": 24, "embedding": 13, "output_layer": 13}
    full = []
    for mapped in entries(dims):
        size = next((rows[part] for part in rows if part in mapped.megatron_name), 8)
        full.append((mapped.megatron_name, torch.randn(size, 8)))
    return full


def test_export_takes_any_order_and_either_spec_and_knows_what_is_absent():
    full = full_tensors(DIMS)
    renamed = [(transformer_engine_name(name), tensor) for name, tensor in reversed(full)]
    exported = dict(hf_tensors(renamed, DIMS))
    assert sorted(exported) == sorted(hf_names(DIMS))
    by_name = dict(full)
    norm, up = exported["model.layers.4.input_layernorm.weight"], exported["model.layers.4.mlp.up_proj.weight"]
    assert torch.equal(norm, by_name["decoder.layers.4.input_layernorm.weight"])
    assert torch.equal(up, by_name["decoder.layers.4.mlp.linear_fc1.weight"][12:])
    with pytest.raises(ValueError, match=r"Megatron checkpoint lacks 1 tensor\(s\).*embedding.word_embeddings.weight"):
        list(hf_tensors(full[1:], DIMS))
    with pytest.raises(ValueError, match="decoder.layers.0.mlp.router.weight has no counterpart"):
        list(hf_tensors([("decoder.layers.0.mlp.router.weight", torch.ones(1))], DIMS))
    with pytest.raises(ValueError, match="came twice"):
        list(hf_tensors([full[0], full[0]], DIMS))
