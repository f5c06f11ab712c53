"""Who holds which token and which vocabulary column, and the collectives that move them."""

from megatron_rpsd.parallel.collectives import all_gather_tokens, exchange_suffix, group_rank, group_size
from megatron_rpsd.parallel.layout import Chunk, ViewLayout, zigzag_chunks
from megatron_rpsd.parallel.vocabulary import VocabularyShard

__all__ = [
    "Chunk",
    "ViewLayout",
    "VocabularyShard",
    "all_gather_tokens",
    "exchange_suffix",
    "group_rank",
    "group_size",
    "zigzag_chunks",
]
