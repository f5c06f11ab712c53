"""What training may read: check_prefix against good, missing, foreign and broken data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_rpsd.data.manifest import InputFile, Manifest, check_prefix, read_manifest, write_manifest

MANIFEST = Manifest(
    tokenizer_sha256="ab",
    vocab_size=300,
    max_token_id=280,
    dtype="uint16",
    eod_id=2,
    documents=1,
    empty_documents=0,
    tokens=9,
    seq_length=4,
    windows=2,
    inputs=(InputFile("a.txt", 5, "cd"),),
)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    builder = IndexedDatasetBuilder(str(tmp_path / "v1.5.bin"), dtype=numpy.uint16)
    builder.add_document(torch.arange(9), [9])
    builder.finalize(str(tmp_path / "v1.5.idx"))
    return str(tmp_path / "v1.5")


def refusal(prefix: str, vocab_size: int) -> str:
    with pytest.raises(ValueError) as error:
        check_prefix(prefix, vocab_size)
    assert "\n" not in str(error.value) and f"--data-path {prefix}" in str(error.value)
    return str(error.value)


def test_round_trip(prefix: str) -> None:
    assert write_manifest(prefix, MANIFEST) == Path(prefix + ".json")
    assert read_manifest(prefix) == MANIFEST
    assert check_prefix(prefix, 300) == MANIFEST
    assert check_prefix(prefix, 512) == MANIFEST


def test_data_of_another_tool_have_no_manifest_and_are_looked_at(tmp_path: Path) -> None:
    prefix = str(tmp_path / "foreign")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.int32)
    for document in ([3, 9, 4], [80, 1]):
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(prefix + ".idx")
    assert read_manifest(prefix) is None
    assert check_prefix(prefix, 81) is None
    assert "token id 80" in refusal(prefix, 80)


def test_missing_files_are_named(prefix: str) -> None:
    Path(prefix + ".idx").unlink()
    message = refusal(prefix, 300)
    assert f"no {prefix}.idx" in message and f"no {prefix}.bin" not in message


def test_another_vocabulary_is_refused(prefix: str) -> None:
    write_manifest(prefix, MANIFEST)
    assert "tokenizer of 300 entries" in refusal(prefix, 299)
    assert "tokenizer of 300 entries" in refusal(prefix, 281)
    assert "token id 280" in refusal(prefix, 280)
    write_manifest(prefix, dataclasses.replace(MANIFEST, max_token_id=310))
    assert "token id 310" in refusal(prefix, 310)
    assert check_prefix(prefix, 311) is not None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2}', '{"format": 1, "inputs": []}'])
def test_a_broken_manifest_is_an_error_not_a_missing_one(prefix: str, text: str) -> None:
    Path(prefix + ".json").write_text(text)
    with pytest.raises(ValueError, match="is not a manifest"):
        read_manifest(prefix)
