"""Megatron's datasets, with the sample's place in the stream beside its tokens."""

from __future__ import annotations

import argparse

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer
from megatron.training.utils.common_utils import get_blend_and_blend_per_split, print_rank_0

from megatron_rpsd.positions import document_ids
from megatron_rpsd.training.chat_dataset import ConversationDataset
from megatron_rpsd.training.packing import WINDOWS_LOOKED_AT, describe_packing, packing_from_args


class IndexedSamples(torch.utils.data.Dataset):
    """Adds `sample_index`, the sample's index in the stream: with the seed, all that a view depends on.

    With `eod`, the token that ends a document, also `document_ids` int64 [L], which rise by one behind each of them.
    """

    def __init__(self, dataset, eod: int | None = None) -> None:
        self.dataset = dataset
        self.eod = eod
        # Megatron's loader asks for the split to choose between training and evaluation batch sizes.
        self.index_split = getattr(dataset, "split", None) or dataset.index_split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample = dict(self.dataset[index])
        sample["sample_index"] = index
        if self.eod is not None:
            sample["document_ids"] = document_ids(sample["tokens"], self.eod)
        return sample


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Megatron's dataset configuration of the parsed arguments, without attention masks ([s, s] at 128K is 16 GiB).

    Positions and attention are reset by `training.batch`, on the whole sample: the dataset is not asked to.
    """
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


def indexed(built: list, args: argparse.Namespace) -> tuple:
    """Train, validation and test datasets with what views need; says how the first windows are packed."""
    packing = packing_from_args(args)
    borders = packing.reads_documents or args.teacher_document_mask
    eod = get_tokenizer().eod if borders and not args.conversations else None
    datasets = tuple(None if dataset is None else IndexedSamples(dataset, eod) for dataset in built)
    if packing.reads_documents and datasets[0] is not None and len(datasets[0]):
        looked = [datasets[0][index] for index in range(min(WINDOWS_LOOKED_AT, len(datasets[0])))]
        print_rank_0(describe_packing(packing, looked))
    return datasets


def datasets_provider(num_samples: list[int | None], vp_stage: int | None = None) -> tuple:
    """Train, validation and test datasets on *every* rank.

    Every rank reads its own samples (memory-mapped, a few bytes a token) rather than receiving them from
    tensor-parallel rank 0: middle pipeline stages need the positions too, and there is no broadcast to disagree with.
    """
    args = get_args()
    kind = ConversationDataset if args.conversations else MockGPTDataset if args.mock_data else GPTDataset
    built = BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, dataset_config(args)).build()
    return indexed(built, args)


datasets_provider.is_distributed = True
