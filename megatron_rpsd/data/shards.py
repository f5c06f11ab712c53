"""Finished tokens in checksummed shards, from which an interrupted run goes on.

A shard is three files in the work folder, the last of them written when the others are complete:

    00003.bin    tokens of consecutive documents
    00003.docs   a `DOCUMENT` record for each
    00003.json   counts, faults, checksums, and a digest of all input up to here

The digest tells whether the input is still the one that the shard was made from: after a bad line was mended, the
shards before it are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

DOCUMENT = np.dtype([("file", "<u4"), ("line", "<u4"), ("offset", "<u8"), ("tokens", "<u4")])
"""A stored document: its input's number, line (0 where the file is the document), byte offset, and tokens."""
_PART = 1 << 16


@dataclass(frozen=True)
class Shard:
    """Contents of a shard's `.json`."""

    seen: int
    """documents of the input up to the end of this shard, stored or not"""
    input_sha256: str
    """of their bytes"""
    documents: int
    """stored in this shard"""
    tokens: int
    max_token_id: int
    bin_sha256: str
    docs_sha256: str
    empty: tuple[str, ...]
    """labels of documents without text"""
    faults: tuple[str, ...]
    """what was skipped, one line each"""
    special_tokens: int
    """special tokens that texts spelled"""


class ShardStore:
    """The shards in a folder, made by one recipe."""

    def __init__(self, folder: Path, dtype: str, recipe: dict) -> None:
        """Shards that another recipe left are removed.

        Args:
            recipe: what the tokens depend on, as JSON; inputs by path.
        """
        self.folder, self.dtype = folder, np.dtype(dtype)
        self.shards: list[Shard] = []
        folder.mkdir(parents=True, exist_ok=True)
        note, text = folder / "recipe.json", json.dumps(recipe, indent=1, sort_keys=True)
        if not note.exists() or note.read_text() != text:
            for path in folder.glob("[0-9]*"):
                path.unlink()
            write_durably(note, text.encode())
        while (shard := self._read(len(self.shards))) is not None:
            self.shards.append(shard)

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:05d}.{kind}"

    def _read(self, number: int) -> Shard | None:
        """The shard of a number, None unless it is whole."""
        if not self._path(number, "json").exists():
            return None
        fields = json.loads(self._path(number, "json").read_text())
        shard = Shard(**{**fields, "empty": tuple(fields["empty"]), "faults": tuple(fields["faults"])})
        for kind, digest in (("bin", shard.bin_sha256), ("docs", shard.docs_sha256)):
            path = self._path(number, kind)
            if not path.exists() or file_sha256(path) != digest:
                return None
        return shard

    def keep(self, count: int) -> None:
        """Forget all but the first shards."""
        del self.shards[count:]

    def begin(self) -> ShardWriter:
        """One more shard, to be written."""
        self._path(len(self.shards), "json").unlink(missing_ok=True)
        return ShardWriter(self._path(len(self.shards), "bin"))

    def finish(self, writer: ShardWriter, seen: int, input_sha256: str) -> None:
        """Take the shard that `begin` gave; the other arguments are as in `Shard`."""
        records = np.array(writer.records, dtype=DOCUMENT).tobytes()
        write_durably(self._path(len(self.shards), "docs"), records)
        shard = Shard(
            seen=seen,
            input_sha256=input_sha256,
            documents=len(writer.records),
            tokens=writer.tokens,
            max_token_id=writer.max_token_id,
            bin_sha256=writer.close(),
            docs_sha256=hashlib.sha256(records).hexdigest(),
            empty=tuple(writer.empty),
            faults=tuple(writer.faults),
            special_tokens=writer.special_tokens,
        )
        write_durably(self._path(len(self.shards), "json"), json.dumps(asdict(shard)).encode())
        self.shards.append(shard)

    def documents(self) -> Iterator[np.ndarray]:
        """Records of all stored documents, DOCUMENT [n], some at a time."""
        for number in range(len(self.shards)):
            with self._path(number, "docs").open("rb") as file:
                while raw := file.read(_PART * DOCUMENT.itemsize):
                    yield np.frombuffer(raw, DOCUMENT)

    def reader(self) -> TokenReader:
        """Reads the tokens of all shards as one stream."""
        sizes = [shard.tokens for shard in self.shards]
        return TokenReader([self._path(number, "bin") for number in range(len(sizes))], sizes, self.dtype)


class ShardWriter:
    """A shard under way: tokens go to its file at once, records wait for the end."""

    def __init__(self, path: Path) -> None:
        self._file, self._digest = path.open("wb"), hashlib.sha256()
        self.records: list[tuple[int, int, int, int]] = []
        """file, line, offset, tokens, as DOCUMENT has them"""
        self.empty: list[str] = []
        self.faults: list[str] = []
        self.tokens, self.max_token_id, self.special_tokens = 0, -1, 0

    def add(self, tokens: np.ndarray) -> None:
        """Tokens of the documents whose records are appended."""
        raw = tokens.tobytes()
        self._file.write(raw)
        self._digest.update(raw)
        self.tokens += len(tokens)
        self.max_token_id = max(self.max_token_id, int(tokens.max(initial=0)) if len(tokens) else -1)

    def close(self) -> str:
        """Flush to the disk; the SHA-256 of what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()


class TokenReader:
    """Tokens of consecutive files by their place in the whole; one file is open, and nothing is mapped."""

    def __init__(self, paths: list[Path], sizes: list[int], dtype: np.dtype) -> None:
        self._paths, self._dtype = paths, dtype
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._number, self._file = -1, None

    def read(self, start: int, count: int) -> Iterator[bytes]:
        """The bytes of tokens start..start + count - 1, a few MiB at a time."""
        size, limit = self._dtype.itemsize, 1 << 21
        while count:
            number = int(np.searchsorted(self._starts, start, side="right")) - 1
            if number != self._number:
                self.close()
                self._number, self._file = number, self._paths[number].open("rb", buffering=0)
            part = min(count, limit, int(self._starts[number + 1]) - start)
            raw = os.pread(self._file.fileno(), part * size, (start - int(self._starts[number])) * size)
            assert len(raw) == part * size, f"{self._paths[number]} is shorter than its record says"
            yield raw
            start, count = start + part, count - part

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def write_durably(path: Path, content: bytes) -> None:
    """Write aside, flush to the disk, rename."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read a block at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
