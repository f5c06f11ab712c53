"""Conversations as training samples: Megatron's `--sft` with the tokenizer's own template and a mask on the assistant.

Conversations packed in one line are the sample's documents (`training.packing`), and so is the padding behind them.
"""

from __future__ import annotations

import argparse
import sys

import torch
from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.training import get_tokenizer
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils.common_utils import get_blend_and_blend_per_split, print_rank_0

from megatron_rpsd.data.chat import ChatEncoder, ConversationFile
from megatron_rpsd.positions import keyed_generator

_ORDER = 0x52505350  # second half of Philox's key, as in positions.sampler
LOOKED_AT = 64
"""Lines of a file that are read with the tokenizer before training starts."""


def chat_encoder(tokenizer) -> ChatEncoder:
    """The encoder of Megatron's tokenizer: of the Hugging Face object inside, which has no accessor."""
    return ChatEncoder(tokenizer._tokenizer.tokenizer)


class ConversationDataset(SFTDataset):
    """A JSONL line a sample: tokens, labels, document_ids int64 [L], loss_mask fp32 [L].

    loss_mask is 1 where the label is a token that the assistant must produce. A line longer than L + 1 tokens keeps
    its beginning; a shorter one is padded, with mask 0 and labels that are valid tokens. document_ids are the number of
    each token's conversation in the line; padding has one of its own. Under --eod-mask-loss a conversation's last token
    does not learn the next one's first. Every epoch has an order of its own, from the seed.

    Raises:
        ValueError: the split leaves no line for this dataset; at a sample, a line that the template refuses.
    """

    def __init__(self, dataset, dataset_path, indices, num_samples, index_split, config: GPTDatasetConfig) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        if num_samples is None:
            self.num_samples = len(indices)
        elif num_samples and not len(indices):
            raise ValueError(
                f"--split {config.split} of the {len(dataset)} lines of {dataset_path} leaves none for "
                f"{index_split.name}"
            )
        self.encoder = chat_encoder(config.tokenizer)
        self.padding = self.encoder.tokenizer.pad_token_id
        if self.padding is None:
            self.padding = self.encoder.tokenizer.eos_token_id or 0
        self._epoch, self._order = -1, None
        self._beyond: set[int] = set()

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> ConversationFile:
        return ConversationFile(dataset_path)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        line, length = self._line(idx), self.config.sequence_length
        ids, mask, owner = self.encoder.encode_line(self.dataset[line], self.dataset.label(line))
        if not any(mask[1 : length + 1]):
            self._report(line, len(ids))
        room = max(0, length + 1 - len(ids))
        ids = torch.tensor(ids[: length + 1] + [self.padding] * room)
        mask = torch.tensor(mask[: length + 1] + [0] * room, dtype=torch.float32)
        owner = torch.tensor(owner[: length + 1] + [-1] * room)
        if self.config.eod_mask_loss:
            mask[1:] *= owner[1:] == owner[:-1]
        return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": mask[1:], "document_ids": owner[:-1]}

    def _line(self, idx: int) -> int:
        """The file's line of a sample."""
        epoch, place = divmod(idx, len(self.indices))
        if epoch != self._epoch:  # samples are asked for in ascending order, so one epoch's order is enough
            drawn = keyed_generator(self.config.random_seed, _ORDER, epoch)
            self._epoch, self._order = epoch, drawn.permutation(len(self.indices))
        return int(self.indices[self._order[place]])

    def _report(self, line: int, tokens: int) -> None:
        """Say that a line teaches nothing: the 1st, 2nd, 4th, 8th ... of them, from one rank of each replica."""
        known = len(self._beyond)
        self._beyond.add(line)
        count = len(self._beyond)
        groups = parallel_state.model_parallel_is_initialized() and (
            parallel_state.get_tensor_model_parallel_rank()
            + parallel_state.get_context_parallel_rank()
            + parallel_state.get_pipeline_model_parallel_rank()
        )
        if count > known and not count & (count - 1) and not groups:
            print(
                f"sft: {self.dataset.label(line)}: all assistant tokens of its {tokens} lie beyond --seq-length "
                f"{self.config.sequence_length}; it teaches nothing (line {count} of this kind so far)",
                flush=True,
            )


def check_chat_tokenizer(args: argparse.Namespace) -> None:
    """Read the first lines of every file with the run's tokenizer, and say once what the window makes of them.

    Raises:
        ValueError: a tokenizer without a chat template, or a template that refuses a line.
    """
    if any(word.split("=")[0] == "--sft-tokenizer-prompt-format" for word in sys.argv):
        raise ValueError(
            f"--sft-tokenizer-prompt-format {args.sft_tokenizer_prompt_format} is not read: conversations follow the "
            "tokenizer's own chat template; leave it out, or give another template by --chat-template"
        )
    if args.tokenizer_type != "HuggingFaceTokenizer":
        raise ValueError(
            f"--sft reads conversations through a chat template: --tokenizer-type {args.tokenizer_type} has none; use "
            "HuggingFaceTokenizer with --tokenizer-model"
        )
    encoder, window = chat_encoder(get_tokenizer()), args.seq_length + 1
    blend, per_split = get_blend_and_blend_per_split(args)
    for path in sorted({path for part in [blend, *(per_split or [])] if part for path in part[0]}):
        file = ConversationFile(path)
        looked = [encoder.encode_line(file[index], file.label(index)) for index in range(min(LOOKED_AT, len(file)))]
        longer = sum(len(ids) > window for ids, _, _ in looked)
        nothing = sum(not any(mask[1:window]) for _, mask, _ in looked)
        kept = sum(sum(mask[1:window]) for _, mask, _ in looked) / (len(looked) * args.seq_length)
        see = "do not see each other" if args.reset_attention_mask else "see each other"
        print_rank_0(
            f"sft: {path}: {len(file)} lines; of the first {len(looked)}, {longer} are longer than --seq-length "
            f"{args.seq_length} and lose their end, {nothing} of them every assistant token; {kept:.1%} of the tokens "
            f"are the assistant's; conversations packed in one line {see}"
        )
