"""The objective's arithmetic: written out, over vocabulary shards, and fused with the output layer."""

from megatron_rpsd.loss.chunks import DEFAULT_CHUNK_BYTES
from megatron_rpsd.loss.definitions import (
    clm_per_token,
    divergence_per_token,
    objective,
    reverse_kl_per_token,
)
from megatron_rpsd.loss.divergences import DIRECTIONS, Divergence
from megatron_rpsd.loss.fused_linear import LinearLoss, Teacher, fused_linear_loss
from megatron_rpsd.loss.known_top_k import KnownTopK, likeliest_tokens
from megatron_rpsd.loss.unfused import unfused_linear_loss
from megatron_rpsd.loss.vocab_parallel import (
    vocab_parallel_argmax,
    vocab_parallel_cross_entropy,
    vocab_parallel_reverse_kl,
)

__all__ = [
    "DEFAULT_CHUNK_BYTES",
    "DIRECTIONS",
    "Divergence",
    "KnownTopK",
    "LinearLoss",
    "Teacher",
    "clm_per_token",
    "divergence_per_token",
    "fused_linear_loss",
    "likeliest_tokens",
    "objective",
    "reverse_kl_per_token",
    "unfused_linear_loss",
    "vocab_parallel_argmax",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_reverse_kl",
]
