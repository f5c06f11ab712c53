"""Input files to shards of tokens, going on from the shards of an interrupted run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_rpsd.data.documents import Document
from megatron_rpsd.data.encoders import TokenizerSpec
from megatron_rpsd.data.encoding import EMPTY, FAULTY, EncodedBatch, encode
from megatron_rpsd.data.manifest import InputFile
from megatron_rpsd.data.readers import iter_documents
from megatron_rpsd.data.shards import ShardStore, ShardWriter

# Small documents travel together, a long one travels alone.
BATCH_BYTES = 1 << 18


@dataclass(frozen=True)
class Source:
    """Inputs that are tokenized together."""

    inputs: Sequence[Path]
    json_key: str = "text"
    append_eod: bool = True
    seed: int = 0
    """of the order of files within a repository"""
    on_error: str = "stop"
    """stop or skip"""

    def recipe(self, spec: TokenizerSpec) -> dict:
        """What the tokens of a document depend on, beside its bytes."""
        return {
            "format": 2,
            "tokenizer": [spec.kind, spec.sha256, spec.state if spec.kind == "huggingface" else None],
            "json_key": self.json_key,
            "append_eod": self.append_eod,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Tokenized:
    """Shards of a source, and what was read for them."""

    store: ShardStore
    inputs: tuple[InputFile, ...]
    empty: tuple[str, ...]
    """labels of documents without text"""
    faults: tuple[str, ...]
    """what was skipped"""


@dataclass(frozen=True)
class Batch:
    """Documents that a worker gets together, and how far the input has been read behind them."""

    documents: list[Document]
    seen: int
    """documents up to the end of this batch"""
    digest: Any
    """hashlib object that has seen their bytes"""
    error: ValueError | None = None
    """what stopped the reading behind them"""


class _Reading:
    """One reading of all inputs: a running digest of all documents, and the record of each file."""

    def __init__(self, source: Source) -> None:
        self.source, self.seen = source, 0
        self.digest = hashlib.sha256()
        self.records: list[InputFile] = []
        self.faults: list[str] = []

    def __iter__(self) -> Iterator[Document]:
        for number, path in enumerate(self.source.inputs):
            digest, size = hashlib.sha256(), 0
            try:
                for document in iter_documents(path, digest, self.source.json_key, self.source.seed):
                    self.seen, size = self.seen + 1, size + len(document.raw)
                    self.digest.update(f"{document.label}\0{len(document.raw)}\0".encode(errors="surrogateescape"))
                    self.digest.update(document.raw)
                    yield replace(document, number=number) if number else document
            except (ValueError, OSError) as error:
                if self.source.on_error == "stop":
                    raise ValueError(str(error)) from error
                self.faults.append(f"{error}; what follows in this file is left out")
            self.records.append(
                InputFile(str(path), size if path.is_dir() else path.stat().st_size, digest.hexdigest())
            )

    def batches(self, done: int) -> Iterator[Batch]:
        """The documents behind the first `done`, in groups of about BATCH_BYTES."""
        documents: list[Document] = []
        size, error = 0, None
        try:
            for document in self:
                if self.seen > done:
                    documents.append(document)
                    size += len(document.raw)
                if size >= BATCH_BYTES:
                    yield Batch(documents, self.seen, self.digest.copy())
                    documents, size = [], 0
        except ValueError as found:
            error = found  # told when the workers have come so far: an earlier document may be bad, too
        if documents or error:
            yield Batch(documents, self.seen, self.digest.copy(), error)


def _still_valid(source: Source, store: ShardStore) -> int:
    """How many shards were made from the input as it is now."""
    ends = {shard.seen: place for place, shard in enumerate(store.shards, start=1)}
    valid, reading = 0, _Reading(replace(source, on_error="skip"))
    for _ in reading if ends else ():
        place = ends.get(reading.seen)
        if place is None:
            continue
        shard = store.shards[place - 1]
        if shard.input_sha256 != reading.digest.hexdigest() or (shard.faults and source.on_error == "stop"):
            break
        valid = place
        if valid == len(store.shards):
            break
    return valid


def tokenize(
    source: Source,
    spec: TokenizerSpec,
    folder: Path,
    workers: int,
    shard_tokens: int,
    report: Callable[[str], None] = lambda line: None,
) -> Tokenized:
    """All documents of `source` as shards in `folder`.

    Args:
        shard_tokens: a shard is finished when it holds as many.
        report: called with a line on what an earlier run left.

    Raises:
        ValueError: with on_error stop, the first document that cannot be read, by file and line; finished shards stay.
    """
    store = ShardStore(folder, spec.dtype, source.recipe(spec))
    left = len(store.shards)
    store.keep(_still_valid(source, store))
    done = store.shards[-1].seen if store.shards else 0
    if left:
        report(f"taking {len(store.shards)} of {left} finished shards of an earlier run: {done} documents")
    reading, writer = _Reading(source), None
    total = sum(path.stat().st_size for path in source.inputs if path.is_file())
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None) as bar:
        for batch, encoded in encode(reading.batches(done), spec, source.append_eod, source.json_key, workers):
            writer = store.begin() if writer is None else writer
            _store(batch.documents, encoded, writer, source)
            if batch.error is not None:
                raise batch.error
            bar.update(sum(len(document.raw) for document in batch.documents))
            if writer.tokens >= shard_tokens:
                store.finish(writer, batch.seen, batch.digest.hexdigest())
                writer = None
        if writer is not None:
            store.finish(writer, batch.seen, batch.digest.hexdigest())
    return Tokenized(
        store,
        tuple(reading.records),
        tuple(label for shard in store.shards for label in shard.empty),
        (*(fault for shard in store.shards for fault in shard.faults), *reading.faults),
    )


def _store(documents: list[Document], encoded: EncodedBatch, writer: ShardWriter, source: Source) -> None:
    """Put a batch into a shard."""
    for index, (document, length) in enumerate(zip(documents, encoded.lengths.tolist(), strict=True)):
        if length == EMPTY:
            writer.empty.append(document.label)
        elif length != FAULTY:
            writer.records.append((document.number, document.line or 0, document.offset, length))
        elif source.on_error == "stop":
            raise ValueError(encoded.faults[index])
        else:
            writer.faults.append(encoded.faults[index])
    writer.special_tokens += encoded.special
    writer.add(encoded.tokens)
