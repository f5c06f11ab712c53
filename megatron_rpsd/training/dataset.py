"""Megatron's datasets, with the sample's place in the stream beside its tokens."""

from __future__ import annotations

import argparse

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer
from megatron.training.utils.common_utils import get_blend_and_blend_per_split

from megatron_rpsd.training.chat_dataset import ConversationDataset


class IndexedSamples(torch.utils.data.Dataset):
    """Adds `sample_index`, the sample's index in the stream: with the seed, all that a view depends on."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset
        # Megatron's loader asks for the split to choose between training and evaluation batch sizes.
        self.index_split = getattr(dataset, "split", None) or dataset.index_split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample = dict(self.dataset[index])
        sample["sample_index"] = index
        return sample


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Megatron's dataset configuration of the parsed arguments, without attention masks ([s, s] at 128K is 16 GiB)."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )


def datasets_provider(num_samples: list[int | None], vp_stage: int | None = None) -> tuple:
    """Train, validation and test datasets on *every* rank.

    Every rank reads its own samples (memory-mapped, a few bytes a token) rather than receiving them from
    tensor-parallel rank 0: middle pipeline stages need the positions too, and there is no broadcast to disagree with.
    """
    args = get_args()
    kind = ConversationDataset if args.conversations else MockGPTDataset if args.mock_data else GPTDataset
    built = BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, dataset_config(args)).build()
    return tuple(None if dataset is None else IndexedSamples(dataset) for dataset in built)


datasets_provider.is_distributed = True
