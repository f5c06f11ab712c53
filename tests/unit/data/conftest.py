"""A tokenizer small enough to check by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOD = 256


def save_byte_tokenizer(folder: Path, eos: bool = True) -> Path:
    """Saves a tokenizer in which every UTF-8 byte is one token, in `folder`.

    Ids 0 to 255 follow byte-level BPE's printable alphabet in sorted order; id 256 is the end-of-sequence token.
    """
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|end|>"} if eos else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def endless_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without an end-of-sequence token."""
    return save_byte_tokenizer(tmp_path_factory.mktemp("endless"), eos=False)
