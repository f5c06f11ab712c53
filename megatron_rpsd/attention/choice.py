"""The attention kernels that a run can name."""

from __future__ import annotations

from collections.abc import Callable

from megatron_rpsd.attention.gpu_kernels import cudnn_attention, flash_attention
from megatron_rpsd.attention.kernels import causal_attention

BLOCK_KERNELS: dict[str, Callable] = {"sdpa": causal_attention, "flash": flash_attention, "cudnn": cudnn_attention}
"""Functions like `causal_attention`, by their name."""

KERNELS = (*BLOCK_KERNELS, "te")
"""All of them; te is a module with a state (`transformer_engine`)."""

PACKAGES = {"flash": "flash_attn", "te": "transformer_engine"}
"""What a kernel imports beside torch."""
