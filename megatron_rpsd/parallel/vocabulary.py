"""Vocabulary shards: which columns of the output layer a tensor-parallel rank holds, and which of them are real."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_rpsd.parallel.collectives import group_rank, group_size


@dataclass(frozen=True)
class VocabularyShard:
    """Columns [vocab_start, vocab_stop) of a padded vocabulary, held by one tensor-parallel rank.

    Columns from `vocab_size` on are padding (Megatron pads to a multiple of 128 x TP). They never take probability and
    get no gradient. A rank may hold padding only.
    """

    vocab_size: int
    vocab_start: int
    vocab_stop: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_rank(cls, vocab_size: int, local_columns: int, group: dist.ProcessGroup | None) -> VocabularyShard:
        """The shard of this rank, where every rank of `group` holds `local_columns` columns."""
        start = group_rank(group) * local_columns
        padded = local_columns * group_size(group)
        if padded < vocab_size:
            raise ValueError(f"an output layer of {padded} columns cannot hold a vocabulary of {vocab_size}")
        return cls(vocab_size, start, start + local_columns, group)

    @property
    def columns(self) -> int:
        """Real columns of this rank: the first ones."""
        return max(0, min(self.vocab_stop, self.vocab_size) - self.vocab_start)
