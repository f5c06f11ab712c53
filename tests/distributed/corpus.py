"""A small tokenised corpus and the arguments of a run on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

from tests.distributed.models import LENGTH, VOCABULARY


def write_corpus(prefix: Path, documents: int = 12, tokens: int = 200) -> Path:
    """Random documents as Megatron's P.bin and P.idx."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=DType.optimal_dtype(VOCABULARY))
    generator = np.random.default_rng(3)
    for _ in range(documents):
        builder.add_document(torch.from_numpy(generator.integers(0, VOCABULARY, tokens)), [tokens])
    builder.finalize(get_idx_path(str(prefix)))
    return prefix


def run_arguments(checkpoint: Path, prefix: Path, steps: int) -> list[str]:
    """A run that adapts `checkpoint` on the corpus; global batch 4."""
    return [
        "--device", "cpu", "--use-checkpoint-args", "--pretrained-checkpoint", str(checkpoint),
        "--tokenizer-type", "NullTokenizer", "--data-path", str(prefix), "--split", "100,0,0",
        "--data-cache-path", str(prefix.parent / "cache"),
        "--seq-length", str(LENGTH), "--micro-batch-size", "1", "--global-batch-size", "4",
        "--train-iters", str(steps), "--lr", "1e-3", "--lr-decay-style", "cosine", "--lr-warmup-iters", "1",
        "--eval-iters", "0", "--log-interval", "1", "--num-workers", "0", "--objective", "rpsd",
        "--ckpt-format", "torch_dist",
    ]  # fmt: skip
