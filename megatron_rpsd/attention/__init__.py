"""Core attention over a view pair, context-parallel, with exchangeable kernels."""

from megatron_rpsd.attention.choice import BLOCK_KERNELS, KERNELS, PACKAGES
from megatron_rpsd.attention.kernels import causal_attention
from megatron_rpsd.attention.stacking import stackable, stacked_attention
from megatron_rpsd.attention.transformer_engine import TransformerEngineAttention
from megatron_rpsd.attention.views import view_attention

__all__ = [
    "BLOCK_KERNELS",
    "KERNELS",
    "PACKAGES",
    "TransformerEngineAttention",
    "causal_attention",
    "stackable",
    "stacked_attention",
    "view_attention",
]
