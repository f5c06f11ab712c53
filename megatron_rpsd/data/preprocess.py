"""Text files to Megatron's `.bin/.idx` with a manifest: the library behind tools/preprocess_data.py."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_rpsd.data.documents import Document, document_text, iter_documents
from megatron_rpsd.data.manifest import InputFile, Manifest, write_manifest
from megatron_rpsd.data.staging import staging_folder

# A batch is what one worker gets at a time: small documents travel together, a long one travels alone.
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class PreprocessConfig:
    """Settings of `preprocess`, named as the flags of tools/preprocess_data.py."""

    inputs: Sequence[Path]
    """files; one document a line in `.jsonl`, one document a file otherwise"""
    tokenizer: Path
    """Hugging Face folder with tokenizer.json"""
    output_prefix: Path
    """P of P.bin, P.idx and P.json; existing ones are replaced"""
    seq_length: int
    """tokens a sample feeds to the model"""
    append_eod: bool = True
    """end every document with the tokenizer's end-of-sequence token"""
    json_key: str = "text"
    """key of the text in a JSONL line"""
    workers: int = 1
    """processes that tokenize"""

    def __post_init__(self) -> None:
        for flag, value in (("--seq-length", self.seq_length), ("--workers", self.workers)):
            if value < 1:
                raise ValueError(f"{flag} {value}: it must be at least 1")
        if not self.inputs:
            raise ValueError("--input names no file")
        for path in self.inputs:
            if not path.is_file():
                what = "is a folder: name its files" if path.is_dir() else "does not exist"
                raise ValueError(f"--input {path} {what}")
        if not self.tokenizer.is_dir():
            raise ValueError(f"--tokenizer {self.tokenizer} is not a folder")
        if not (self.tokenizer / "tokenizer.json").is_file():
            raise ValueError(f"--tokenizer {self.tokenizer} holds no tokenizer.json")


@dataclass(frozen=True)
class _Tokenizer:
    """A Hugging Face tokenizer with what is needed to encode documents."""

    hf: Any
    eod_id: int | None
    json_key: str

    def encode(self, document: Document) -> np.ndarray | None:
        """Token ids of `document`, int64 [t], the end-of-document token last; None when it holds no text.

        The tokenizer's own defaults hold: a beginning-of-sequence token is there exactly when the tokenizer adds one,
        and an end token that it adds itself is not doubled.
        """
        text = document_text(document, self.json_key)
        if not text.strip():
            return None
        ids = self.hf(text, verbose=False)["input_ids"]
        if self.eod_id is not None and (not ids or ids[-1] != self.eod_id):
            ids = [*ids, self.eod_id]
        return np.asarray(ids, dtype=np.int64)


def _load_tokenizer(config: PreprocessConfig) -> _Tokenizer:
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(config.tokenizer), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--tokenizer {config.tokenizer} cannot be loaded: {reason}") from error
    if config.append_eod and hf.eos_token_id is None:
        raise ValueError(
            f"--append-eod: the tokenizer in {config.tokenizer} has no end-of-sequence token; use --no-append-eod"
        )
    return _Tokenizer(hf, hf.eos_token_id if config.append_eod else None, config.json_key)


_worker_tokenizer: _Tokenizer | None = None


def _start_worker(config: PreprocessConfig) -> None:
    global _worker_tokenizer
    _worker_tokenizer = _load_tokenizer(config)


def _encode_in_worker(batch: list[Document]) -> list[np.ndarray | None]:
    assert _worker_tokenizer is not None, "the pool's initializer did not run"
    return [_worker_tokenizer.encode(document) for document in batch]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.raw)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    config: PreprocessConfig, tokenizer: _Tokenizer, documents: Iterable[Document]
) -> Iterator[tuple[Document, np.ndarray | None]]:
    """Every document with its tokens, in order. At most a few batches a worker are in memory."""
    if config.workers == 1:
        for document in documents:
            yield document, tokenizer.encode(document)
        return
    # spawn: the tokenizers library has its own threads, and a fork of a process with threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(config.workers, context, _start_worker, (config,))
    try:
        pending: deque = deque()
        for batch in _batches(documents):
            pending.append((batch, pool.submit(_encode_in_worker, batch)))
            if len(pending) >= 4 * config.workers:
                done, future = pending.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in pending:
            yield from zip(done, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _megatron_indexed_dataset() -> ModuleType:
    """Megatron's indexed_dataset, imported without its remarks on missing GPU libraries, which this use never calls."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset
    finally:
        logger.setLevel(level)
    return indexed_dataset


def _read_inputs(inputs: Sequence[Path], records: list[InputFile]) -> Iterator[Document]:
    """All documents of all files; appends each file's record when the file has been read."""
    for path in inputs:
        digest = hashlib.sha256()
        size = 0
        for document in iter_documents(path, digest):
            size += len(document.raw)
            yield document
        records.append(InputFile(str(path), size, digest.hexdigest()))


def _write(config: PreprocessConfig, tokenizer: _Tokenizer, prefix: Path) -> Manifest:
    """Writes the `.bin/.idx` of `prefix` and returns the manifest; the caller checks that there is enough of it."""
    indexed_dataset = _megatron_indexed_dataset()
    # Ids may have gaps, so the largest id decides with the count.
    cardinality = max(len(tokenizer.hf), 1 + max(tokenizer.hf.get_vocab().values()))
    dtype = indexed_dataset.DType.optimal_dtype(cardinality)
    builder = indexed_dataset.IndexedDatasetBuilder(indexed_dataset.get_bin_path(str(prefix)), dtype=dtype)
    stored = empty = tokens = 0
    max_token_id = -1
    records: list[InputFile] = []
    total = sum(path.stat().st_size for path in config.inputs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None) as bar:
        for document, ids in _encoded(config, tokenizer, _read_inputs(config.inputs, records)):
            if ids is None:
                empty += 1
            else:
                assert 0 <= ids.min() and ids.max() < cardinality, f"{document.label}: token id outside the vocabulary"
                builder.add_document(ids, [len(ids)])
                stored += 1
                tokens += len(ids)
                max_token_id = max(max_token_id, int(ids.max()))
            bar.update(len(document.raw))
    builder.finalize(indexed_dataset.get_idx_path(str(prefix)))
    return Manifest(
        tokenizer_sha256=hashlib.sha256((config.tokenizer / "tokenizer.json").read_bytes()).hexdigest(),
        vocab_size=len(tokenizer.hf),
        max_token_id=max_token_id,
        dtype=np.dtype(dtype).name,
        eod_id=tokenizer.eod_id,
        documents=stored,
        empty_documents=empty,
        tokens=tokens,
        seq_length=config.seq_length,
        windows=max(tokens - 1, 0) // config.seq_length,
        inputs=tuple(records),
    )


def preprocess(config: PreprocessConfig) -> Manifest:
    """Tokenizes `config.inputs` into P.bin and P.idx and describes them in P.json; returns that manifest.

    Document boundaries are kept: one Megatron document with one sequence for each, in the order of the inputs.
    Everything is written aside and renamed at the end, P.json last; an older P.json goes first, so that no moment
    shows a manifest beside data that it does not describe. Raises ValueError, leaving nothing, when the tokenizer
    cannot be loaded, a document cannot be read, or all of them hold fewer than seq_length + 1 tokens.
    """
    tokenizer = _load_tokenizer(config)
    target = config.output_prefix
    with staging_folder(target) as folder:
        manifest = _write(config, tokenizer, folder / "data")
        if manifest.windows < 1:
            raise ValueError(
                f"--seq-length {config.seq_length} needs {config.seq_length} + 1 = {config.seq_length + 1} tokens for "
                f"one sample, the input holds {manifest.tokens}: give more text or a shorter --seq-length"
            )
        write_manifest(folder / "data", manifest)
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{target}.json").unlink(missing_ok=True)
        for suffix in (".bin", ".idx", ".json"):
            (folder / f"data{suffix}").replace(f"{target}{suffix}")
    return manifest
