"""Tiny models and the rank pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.models import tiny_model
from tests.distributed.pool import RankPool


@pytest.fixture(scope="session")
def ranks():
    """Gloo ranks, new for every call."""
    return RankPool()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A random Llama with tied embeddings, grouped heads and a vocabulary that no tensor parallelism divides."""
    return tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory) -> Path:
    """A random Qwen3 with an output layer of its own and normalised queries and keys."""
    return tiny_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory) -> Path:
    """A random Qwen2 with biases on queries, keys and values."""
    return tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")
