"""The objective's arithmetic: a written-out definition, and the same over vocabulary shards."""

from megatron_rpsd.loss.definitions import clm_per_token, objective, reverse_kl_per_token
from megatron_rpsd.loss.vocab_parallel import vocab_parallel_cross_entropy, vocab_parallel_reverse_kl

__all__ = [
    "clm_per_token",
    "objective",
    "reverse_kl_per_token",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_reverse_kl",
]
