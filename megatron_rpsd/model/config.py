"""RPSDModelConfig and its builder: Megatron's GPTModel with our core attention and norms."""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_rpsd.model.core_attention import ViewPairAttention
from megatron_rpsd.model.norm import RMSNorm
from megatron_rpsd.model.norm_state import leave_norm_states_out
from megatron_rpsd.positions import RopeConfig, inverse_frequencies


def view_pair_layer_spec(
    config: RPSDModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules | ModuleSpec:
    """Megatron's own layer specification with the core attention replaced, and the norms where TE is absent."""
    transformer = config.transformer
    core_attention = ViewPairAttention
    if config.attention_kernel != "sdpa":
        core_attention = functools.partial(ViewPairAttention, kernel=config.attention_kernel)
    if transformer.transformer_impl == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=transformer.qk_layernorm)
        layer.submodules.self_attention.submodules.core_attention = core_attention
        return layer
    layer = get_gpt_layer_local_spec(qk_layernorm=transformer.qk_layernorm, normalization=transformer.normalization)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = core_attention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(transformer, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


@dataclass(kw_only=True)
class RPSDModelConfig(GPTModelConfig):
    """A dense GPT model whose positions come with every micro-batch.

    Attributes:
        rope: head dimension, base and scaling of the rotary embedding.
        real_vocab_size: the tokenizer's vocabulary; columns beyond it are padding.
        attention_kernel: one of `attention.KERNELS`.
    """

    builder: ClassVar[str] = "megatron_rpsd.model.config.RPSDModelBuilder"
    rope: RopeConfig = None
    real_vocab_size: int = None
    attention_kernel: str = "sdpa"

    def inverse_frequencies(self) -> tuple[torch.Tensor, float]:
        """Rotary frequencies fp32 [d/2] and the factor on cos and sin (YaRN); see `positions.rope`."""
        return inverse_frequencies(self.rope)


class RPSDModelBuilder(GPTModelBuilder):
    """Builds the stages of an `RPSDModelConfig`.

    GPTModel's own rotary embedding ignores position_ids (Megatron-LM issue 453), so it is left out of the model: the
    core attention rotates by the tables that the micro-batch carries.
    """

    def build_model(self, pg_collection, pre_process=None, post_process=None, vp_stage=None) -> GPTModel:
        model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        assert not hasattr(model, "rotary_pos_emb")
        if model.config.transformer_impl == "transformer_engine":
            leave_norm_states_out(model)
        return model


def model_config_from_args(args: argparse.Namespace) -> RPSDModelConfig:
    """The model configuration of Megatron's parsed and validated arguments."""
    config = gpt_config_from_args(args, model_config_cls=RPSDModelConfig)
    scaling = json.loads(args.rope_parameters) if args.rope_parameters else None
    config.rope = RopeConfig(
        head_dim=config.transformer.kv_channels,
        base=float(args.rotary_base),
        scaling=scaling,
        max_position_embeddings=args.max_position_embeddings,
    )
    config.real_vocab_size = args.vocab_size if args.vocab_size is not None else args.padded_vocab_size
    config.attention_kernel = args.attention_kernel
    config.position_embedding_type = "none"
    config.transformer_layer_spec = view_pair_layer_spec
    # The pipeline's messages are as long as the micro-batch's view pair, not as --seq-length.
    config.transformer.variable_seq_lengths = config.transformer.pipeline_model_parallel_size > 1
    # One sum of losses and one count of tokens, divided once: masked and suffix-only losses stay exact under CP and DP.
    config.transformer.calculate_per_token_loss = True
    return config


__all__ = ["RPSDModelBuilder", "RPSDModelConfig", "model_config_from_args", "view_pair_layer_spec"]
