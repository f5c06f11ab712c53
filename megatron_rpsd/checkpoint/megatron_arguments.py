"""The Megatron-LM flags that describe a Hugging Face model."""

import json

from megatron_rpsd.checkpoint.hf_folder import HFFolder


def megatron_arguments(folder: HFFolder) -> list[str]:
    """Flags for Megatron's parser (0.19) and, when RoPE is scaled, this project's ``--rope-parameters``.

    ``--seq-length`` is left out: it is a choice of the training run (at most ``--max-position-embeddings``), not a
    property of the model. So are the padding of the vocabulary, the layer implementation and the dtype. To train beyond
    the model's context, append the larger ``--max-position-embeddings``: the last one given counts.

    Raises:
        ValueError: ``rope_theta`` is not an integer (Megatron parses ``--rotary-base`` as one), or ``rms_norm_eps`` is
            not a positive number; and what ``HFFolder.dimensions`` and ``HFFolder.rope`` refuse.
    """
    dims = folder.dimensions()
    rotary_base, scaling, max_position_embeddings = folder.rope()
    if rotary_base != int(rotary_base):
        raise ValueError(f"config.json: rope_theta={rotary_base!r}: Megatron's --rotary-base takes integers only")
    epsilon = folder.config.get("rms_norm_eps")
    if not isinstance(epsilon, int | float) or not epsilon > 0:
        raise ValueError(f"config.json: rms_norm_eps={epsilon} must be a positive number")
    sizes = {
        "--num-layers": dims.num_layers,
        "--hidden-size": dims.hidden_size,
        "--ffn-hidden-size": dims.ffn_hidden_size,
        "--num-attention-heads": dims.num_attention_heads,
        "--num-query-groups": dims.num_query_groups,
        "--kv-channels": dims.head_dim,
        "--vocab-size": dims.vocab_size,
        "--max-position-embeddings": max_position_embeddings,
        "--position-embedding-type": "rope",
        "--rotary-base": int(rotary_base),
        "--normalization": "RMSNorm",
        "--norm-epsilon": epsilon,
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
    }
    switches = {
        "--group-query-attention": True,
        "--swiglu": True,
        "--disable-bias-linear": True,
        "--untie-embeddings-and-output-weights": not dims.tied,
        "--add-qkv-bias": dims.qkv_bias,
        "--qk-layernorm": dims.qk_norm,
    }
    arguments = [word for flag, value in sizes.items() for word in (flag, str(value))]
    arguments += [flag for flag, on in switches.items() if on]
    if scaling is not None:
        arguments += ["--rope-parameters", json.dumps(scaling, sort_keys=True)]
    return arguments
