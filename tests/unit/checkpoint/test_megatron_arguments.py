import argparse
import json

import pytest

from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.megatron_arguments import megatron_arguments


@pytest.fixture(scope="module")
def megatron_parser():
    """Megatron's own parser, which refuses a flag it does not know."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False))
    parser.add_argument("--rope-parameters", type=json.loads)
    return parser


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "qwen3", "mistral"])
def test_megatron_parses_the_flags_into_the_model(save_model, megatron_parser, kind):
    folder = HFFolder(save_model(kind)[0])
    config = folder.config
    args = megatron_parser.parse_args(megatron_arguments(folder))
    expected = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "group_query_attention": True,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim", 4),
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "seq_length": None,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_base": 500000 if kind == "llama" else 10000,
        "untie_embeddings_and_output_weights": kind not in ("llama-tied", "qwen2"),
        "add_qkv_bias": kind == "qwen2",
        "qk_layernorm": kind == "qwen3",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rope_parameters": None,
    }
    assert {name: getattr(args, name) for name in expected} == expected


def test_scaling_is_passed_as_json(save_model, edit_config, megatron_parser):
    path, _ = save_model("llama")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    edit_config(path, rope_parameters={**scaling, "rope_theta": 1e6})
    args = megatron_parser.parse_args(megatron_arguments(HFFolder(path)))
    assert args.rope_parameters == scaling
    assert args.rotary_base == 1000000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.5}), "rope_theta=10000.5"),
        (dict(rms_norm_eps=...), "rms_norm_eps=None"),
    ],
)
def test_what_megatron_cannot_take_is_refused(save_model, edit_config, change, words):
    path, _ = save_model("llama")
    edit_config(path, **change)
    with pytest.raises(ValueError, match=words):
        megatron_arguments(HFFolder(path))
