"""Core attention over a view pair, context-parallel, with exchangeable kernels."""

from megatron_rpsd.attention.kernels import causal_attention
from megatron_rpsd.attention.views import view_attention

__all__ = ["causal_attention", "view_attention"]
