"""Which Hugging Face models convert, and the table of their tensor names.

The supported families share one decoder: pre-norm, grouped-query attention with rotary positions, SwiGLU. They differ
in two optional parts (a bias on Q, K and V; a norm on each query and key head), so one table serves all of them.
A further family of this shape is one line in ``FAMILIES``; a further tensor is one ``Entry``, and a class in
``layouts`` when its rows change order.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megatron_rpsd.checkpoint.layouts import GatedMlp, Layout, ModelDimensions, Qkv, Replicated, Row, Vocabulary

# Words in the names, and keys in the configurations, of mixture-of-experts models.
_EXPERT_MODELS = ("moe", "mixtral", "deepseek", "gptoss", "gpt_oss", "dbrx", "jamba", "grok", "llama4", "arctic")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class Family:
    """What a Hugging Face model class fixes, beyond its config.json.

    The defaults are those of the model's own configuration class, which decides when a key is absent from config.json.
    """

    architecture: str
    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    default_head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    default_key_value_heads: int | None = None
    """None: as many as query heads."""
    default_sliding_window: int | None = None
    refused_switches: tuple[str, ...] = ()
    """Keys of config.json that add bias tensors Megatron's layer would not have; they must be absent or false."""


FAMILIES = (
    Family("LlamaForCausalLM", "llama", refused_switches=("attention_bias", "mlp_bias")),
    Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, default_key_value_heads=32),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        qk_norm=True,
        default_head_dim=128,
        default_key_value_heads=32,
        refused_switches=("attention_bias",),
    ),
    Family("MistralForCausalLM", "mistral", default_key_value_heads=8, default_sliding_window=4096),
)


Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Entry:
    """One line of the table. ``{i}`` in the patterns stands for the layer index."""

    megatron_name_pattern: str
    hf_name_patterns: tuple[str, ...]
    layout: Layout
    hf_shapes: Callable[[ModelDimensions], Shapes]
    """Shape of each Hugging Face tensor of the line."""
    condition: Callable[[ModelDimensions], bool] = lambda dims: True
    """Whether a model of these dimensions has the tensor."""


_LAYER, _HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."


def _qkv_names(kind: str) -> tuple[str, ...]:
    return tuple(f"{_HF_LAYER}self_attn.{letter}_proj.{kind}" for letter in "qkv")


def _hidden(dims: ModelDimensions) -> Shapes:
    return ((dims.hidden_size,),)


def _head(dims: ModelDimensions) -> Shapes:
    return ((dims.head_dim,),)


def _vocabulary(dims: ModelDimensions) -> Shapes:
    return ((dims.vocab_size, dims.hidden_size),)


def _qkv_rows(dims: ModelDimensions) -> tuple[int, int, int]:
    keys = dims.num_query_groups * dims.head_dim
    return dims.num_attention_heads * dims.head_dim, keys, keys


EMBEDDING = "model.embed_tokens.weight"
TIED_OUTPUT = "lm_head.weight"

BEFORE_LAYERS = (Entry("embedding.word_embeddings.weight", (EMBEDDING,), Vocabulary(), _vocabulary),)

LAYER_TABLE = (
    Entry(_LAYER + "input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",), Replicated(), _hidden),
    Entry(
        _LAYER + "self_attention.linear_qkv.weight",
        _qkv_names("weight"),
        Qkv(),
        lambda dims: tuple((rows, dims.hidden_size) for rows in _qkv_rows(dims)),
    ),
    Entry(
        _LAYER + "self_attention.linear_qkv.bias",
        _qkv_names("bias"),
        Qkv(),
        lambda dims: tuple((rows,) for rows in _qkv_rows(dims)),
        lambda dims: dims.qkv_bias,
    ),
    Entry(
        _LAYER + "self_attention.q_layernorm.weight",
        (_HF_LAYER + "self_attn.q_norm.weight",),
        Replicated(),
        _head,
        lambda dims: dims.qk_norm,
    ),
    Entry(
        _LAYER + "self_attention.k_layernorm.weight",
        (_HF_LAYER + "self_attn.k_norm.weight",),
        Replicated(),
        _head,
        lambda dims: dims.qk_norm,
    ),
    Entry(
        _LAYER + "self_attention.linear_proj.weight",
        (_HF_LAYER + "self_attn.o_proj.weight",),
        Row("num_attention_heads"),
        lambda dims: ((dims.hidden_size, dims.num_attention_heads * dims.head_dim),),
    ),
    Entry(_LAYER + "pre_mlp_layernorm.weight", (_HF_LAYER + "post_attention_layernorm.weight",), Replicated(), _hidden),
    Entry(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        GatedMlp(),
        lambda dims: ((dims.ffn_hidden_size, dims.hidden_size),) * 2,
    ),
    Entry(
        _LAYER + "mlp.linear_fc2.weight",
        (_HF_LAYER + "mlp.down_proj.weight",),
        Row("ffn_hidden_size"),
        lambda dims: ((dims.hidden_size, dims.ffn_hidden_size),),
    ),
)

AFTER_LAYERS = (
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated(), _hidden),
    Entry("output_layer.weight", (TIED_OUTPUT,), Vocabulary(), _vocabulary, lambda dims: not dims.tied),
)

# Transformer Engine fuses a norm into the linear layer after it and names the norm's weight there.
_TE_ALIASES = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
)

# Tables that old releases of transformers stored beside the weights; both sides recompute them.
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


class MappedTensor(NamedTuple):
    """One tensor of a model: its name in Megatron, the tensors it consists of in Hugging Face, and how."""

    megatron_name: str
    hf_names: tuple[str, ...]
    layout: Layout
    hf_shapes: Shapes


def family_of(config: dict) -> Family:
    """The family of a parsed config.json.

    Raises:
        ValueError: unknown architecture (mixture-of-experts models among them), or ``architectures[0]`` and
            ``model_type`` name different families.
    """
    architecture = (config.get("architectures") or [None])[0]
    model_type = config.get("model_type")
    supported = ", ".join(family.architecture for family in FAMILIES)
    label = f"config.json: architectures={[architecture]}, model_type={model_type!r}"
    named = f"{architecture} {model_type}".lower()
    if any(word in named for word in _EXPERT_MODELS) or any(config.get(key) for key in _EXPERT_KEYS):
        raise ValueError(f"{label}: mixture-of-experts models do not convert; supported: {supported}")
    key = (architecture, "architecture") if architecture else (model_type, "model_type")
    family = next((family for family in FAMILIES if getattr(family, key[1]) == key[0]), None)
    if family is None:
        raise ValueError(f"{label}: this model does not convert; supported: {supported}")
    if model_type not in (None, family.model_type):
        raise ValueError(f"{label} contradict each other: {architecture} has model_type {family.model_type!r}")
    return family


def entries(dims: ModelDimensions) -> list[MappedTensor]:
    """Every tensor of the model: embedding, layers in order, final norm, output weight."""
    mapped = list(_instances(BEFORE_LAYERS, dims))
    for index in range(dims.num_layers):
        mapped += _instances(LAYER_TABLE, dims, index)
    return mapped + list(_instances(AFTER_LAYERS, dims))


def _instances(table: Iterable[Entry], dims: ModelDimensions, index: int | None = None) -> Iterator[MappedTensor]:
    for entry in table:
        if entry.condition(dims):
            hf_names = tuple(pattern.replace("{i}", str(index)) for pattern in entry.hf_name_patterns)
            name = entry.megatron_name_pattern.replace("{i}", str(index))
            yield MappedTensor(name, hf_names, entry.layout, entry.hf_shapes(dims))


def unmapped(hf_names: Iterable[str], dims: ModelDimensions) -> list[str]:
    """The Hugging Face tensors that no entry maps, sorted.

    Rotary tables that old releases stored are left out of the list. So is the output weight of a tied model: whether it
    equals the embedding can only be seen when tensors are read (``full_tensors`` in ``hf_folder.py`` does).

    Raises:
        ValueError: a tensor that the model needs is not among ``hf_names``.
    """
    present = set(hf_names)
    needed = [name for mapped in entries(dims) for name in mapped.hf_names]
    _refuse_missing([name for name in needed if name not in present], "the Hugging Face checkpoint")
    surplus = present.difference(needed)
    if dims.tied:
        surplus.discard(TIED_OUTPUT)
    return sorted(name for name in surplus if not _HARMLESS.search(name))


def check_names(hf_names: Iterable[str], dims: ModelDimensions) -> None:
    """Raise ValueError unless the names are exactly those of the model: none missing, none that nothing maps."""
    surplus = unmapped(hf_names, dims)
    if surplus:
        raise ValueError(
            f"{len(surplus)} tensor(s) of the Hugging Face checkpoint have no counterpart in the Megatron model, "
            f"first {', '.join(surplus[:3])}: converting would lose them"
        )


def hf_tensors(full: Iterable[tuple[str, Tensor]], dims: ModelDimensions) -> Iterator[tuple[str, Tensor]]:
    """Full Megatron tensors, in any order, -> Hugging Face tensors, one Megatron tensor in memory at a time.

    Args:
        full: (Megatron name of the local or the Transformer Engine spec, full tensor).

    Raises:
        ValueError: a name that is not the model's or comes twice; at the end, tensors that never came.
    """
    pending = {mapped.megatron_name: mapped for mapped in entries(dims)}
    for name, tensor in full:
        mapped = pending.pop(local_spec_name(name), None)
        if mapped is None:
            raise ValueError(f"Megatron tensor {name} has no counterpart in the Hugging Face model, or came twice")
        yield from zip(mapped.hf_names, mapped.layout.to_hf(tensor, dims), strict=True)
    _refuse_missing(list(pending), "the Megatron checkpoint")


def _refuse_missing(names: list[str], where: str) -> None:
    if names:
        raise ValueError(f"{where} lacks {len(names)} tensor(s) of the model, first {', '.join(names[:3])}")


def local_spec_name(megatron_name: str) -> str:
    """A parameter name of the Transformer Engine layer spec -> the local spec's; other names come back unchanged."""
    return _rename_tail(megatron_name, _TE_ALIASES)


def transformer_engine_name(megatron_name: str) -> str:
    """A parameter name of the local layer spec -> the Transformer Engine spec's; other names come back unchanged."""
    return _rename_tail(megatron_name, [(local, fused) for fused, local in _TE_ALIASES])


def _rename_tail(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.endswith("." + old):
            return name[: -len(old)] + new
    return name
