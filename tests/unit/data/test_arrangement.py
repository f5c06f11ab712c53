"""Modes of preparation against their definitions, and what is counted."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_tiktoken import EOD, PATTERN, ids_of, save_tiktoken  # noqa: E402

from megatron_rpsd.data.arrangement import best_fit  # noqa: E402
from megatron_rpsd.data.preprocess import PreprocessConfig, preprocess  # noqa: E402

LENGTH = 16


def prepared(tmp_path: Path, texts: list[str], **settings):
    """Manifest and the stored sequences of texts, one a JSONL line."""
    import json

    from megatron.core.datasets.indexed_dataset import IndexedDataset

    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = save_tiktoken(tmp_path / "bytes.tiktoken")
    prefix = tmp_path / settings.get("mode", "concatenate")
    manifest = preprocess(PreprocessConfig([source], tokenizer, prefix, LENGTH, tiktoken_pattern=PATTERN, **settings))
    dataset = IndexedDataset(str(prefix))
    return manifest, [dataset[index].tolist() for index in range(len(dataset))]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(5)
    made = ["".join(draw.choices("abcdef é", k=draw.randrange(1, 60))) + "." for _ in range(150)]
    return [text for text in made if len(ids_of(text)) % LENGTH != 1]  # an end token alone would look like padding


def test_best_fit_by_hand() -> None:
    # 7 opens; 5 opens; 3 fills 7; 3 leaves 2 beside 5; 2 fills that; 1 opens.
    assert best_fit(np.array([3, 7, 5, 3, 2, 1]), 10) == [[0, 1], [2, 3, 4], [5]]
    assert best_fit(np.array([10, 10]), 10) == [[0], [1]]
    assert best_fit(np.array([], dtype=np.int64), 10) == []


def test_best_fit_loses_nothing_and_wastes_little() -> None:
    sizes = np.random.default_rng(0).integers(1, 101, 3000)
    windows = best_fit(sizes, 100)
    assert sorted(piece for window in windows for piece in window) == list(range(3000))
    assert max(int(sizes[window].sum()) for window in windows) <= 100
    # Best-fit decreasing needs at most 11/9 of the fewest windows, and one (Johnson et al. 1974).
    assert len(windows) <= 11 / 9 * -(-int(sizes.sum()) // 100) + 1


def test_whole_keeps_full_windows_of_long_documents(tmp_path: Path, texts: list[str]) -> None:
    manifest, stored = prepared(tmp_path, texts, mode="whole")
    ids = [ids_of(text) for text in texts]
    expected = [tokens[: len(tokens) // LENGTH * LENGTH] for tokens in ids if len(tokens) >= LENGTH]
    assert stored == expected
    assert manifest.left_out_tokens == sum(map(len, ids)) - sum(map(len, expected))
    assert manifest.left_out_documents == len(ids) - len(expected)
    assert (manifest.documents, manifest.padding_tokens) == (len(expected), 0)
    assert manifest.cut_documents == sum(len(tokens) > LENGTH for tokens in ids)


def test_pack_stores_every_token_once(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rpsd.data.arrangement.PACKED_TOGETHER", 40)  # several groups
    manifest, stored = prepared(tmp_path, texts, mode="pack")
    assert {len(window) for window in stored} == {LENGTH}
    expected = []
    for tokens in map(ids_of, texts):
        expected += [tokens[start : start + LENGTH] for start in range(0, len(tokens), LENGTH)]
    # Taken apart again: a window is some of the pieces one behind another, then end tokens as padding.
    found, padding = [], 0
    for window in stored:
        while window:
            piece = next((p for p in sorted(expected, key=len, reverse=True) if window[: len(p)] == p), None)
            if piece is None:
                assert set(window) == {EOD}, window
                padding += len(window)
                break
            found.append(piece)
            expected.remove(piece)
            window = window[len(piece) :]
    assert not expected
    assert (manifest.padding_tokens, manifest.left_out_tokens) == (padding, 0)
    assert manifest.documents == len(texts)
    assert manifest.cut_documents == sum(len(ids_of(text)) > LENGTH for text in texts)
    assert manifest.padding_tokens / manifest.tokens < 0.05
    total = sum(len(ids_of(text)) for text in texts)
    assert sum(bucket.tokens for bucket in manifest.lengths) == total == manifest.tokens - padding
    for bucket in manifest.lengths:
        assert bucket.documents == sum(bucket.low <= len(ids_of(text)) <= bucket.high for text in texts)


def test_bounds_leave_documents_out_and_count_them(tmp_path: Path, texts: list[str]) -> None:
    manifest, stored = prepared(tmp_path, texts, min_tokens=10, max_tokens=30)
    ids = [ids_of(text) for text in texts]
    assert stored == [tokens for tokens in ids if 10 <= len(tokens) <= 30]
    assert manifest.left_out_documents == len(texts) - len(stored)
    assert manifest.left_out_tokens == sum(map(len, ids)) - sum(map(len, stored))


def test_index_is_megatrons_own(tmp_path: Path, texts: list[str]) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prepared(tmp_path, texts)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(257))
    for text in texts:
        builder.add_document(torch.tensor(ids_of(text)), [len(ids_of(text))])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"concatenate{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_ids_take_the_bytes_that_megatron_would_choose() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    from megatron_rpsd.data.encoders import TokenizerSpec

    for size in (65499, 65500, 65536):
        spec = TokenizerSpec("tiktoken", "", None, size, size, None, None, "")
        assert spec.dtype == DType.optimal_dtype(size).__name__
