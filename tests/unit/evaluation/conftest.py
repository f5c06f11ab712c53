"""A tiny model that reads RULER's prompts, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from tests.ruler_prompts import tiny_reader


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 1,024 positions, whose tokenizer adds no BOS. Copy it before changing a file."""
    return tiny_reader(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="session")
def tokens(folder: Path) -> PromptTokens:
    return PromptTokens(folder)
