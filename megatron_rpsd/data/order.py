"""Megatron's own order of training samples: of one prefix, or of the blend that --data-args-path names.

A blend's sample is a sample of one source: of the one that is furthest behind its share of the samples so far. Each
source is shuffled by itself.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from megatron_rpsd.data.indexed import sequence_lengths


@dataclass(frozen=True)
class Order:
    """Which of the data's windows a run's sample is."""

    seed: int
    """--seed"""
    split: str
    """--split, percentages of train, validation and test documents"""
    train_samples: int | None
    """training samples of the run; None is one epoch, of a single prefix alone"""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Megatron's remarks on missing GPU libraries and ranks, which this use has no need of."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def read_blend(path: str | Path) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a file for --data-args-path; weights are None where it has none.

    Raises:
        ValueError: it cannot be read, or names nothing.
    """
    with _quiet():
        from megatron.core.datasets.utils import get_blend_from_list
    try:
        prefixes, weights = get_blend_from_list(Path(path).read_text().split())
    except (OSError, UnicodeDecodeError, AssertionError) as error:
        raise ValueError(f"{path} cannot be read as weights and prefixes: {error}") from None
    if not prefixes:
        raise ValueError(f"{path} names no data: it holds a weight and a prefix for each source")
    return list(prefixes), weights


def training_dataset(
    prefixes: Sequence[str], weights: Sequence[float] | None, vocab_size: int, seq_length: int, order: Order
):
    """Megatron's training dataset, GPTDataset or BlendedDataset, by its own builder.

    Validation and test datasets are not made: Megatron's builder never ends where one of them has no document.

    Raises:
        ValueError: --split leaves a prefix no training token, or a blend's number of samples is not known.
    """
    with _quiet():
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    # The order depends on no token, so a stand-in for the tokenizer serves.
    tokenizer = SimpleNamespace(
        eod=-1, pad=-2, eos=-1, vocab_size=vocab_size, unique_identifiers={}, special_tokens_dict={}
    )
    if weights is not None and order.train_samples is None:
        raise ValueError("--train-samples is needed: how a blend's sources are dealt out depends on the run's length")
    with tempfile.TemporaryDirectory() as cache, _quiet():
        config = GPTDatasetConfig(
            random_seed=order.seed,
            sequence_length=seq_length,
            blend=(list(prefixes), None if weights is None else list(weights)),
            split=order.split,
            path_to_cache=cache,
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        bounds = config.split_matrix[0]
        for prefix in prefixes:
            sizes = sequence_lengths(prefix)
            begin, end = (round(edge * len(sizes)) for edge in bounds or (0, 0))
            if not sizes[begin:end].any():
                raise ValueError(f"--split {order.split} leaves no training document of the {len(sizes)} of {prefix}")
        config.split_matrix = [bounds, None, None]
        return BlendedMegatronDatasetBuilder(GPTDataset, [order.train_samples, 0, 0], lambda: True, config).build()[0]
