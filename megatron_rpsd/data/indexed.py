"""Megatron's `.bin/.idx` and our `.sources`, written as a stream: memory does not follow the number of documents.

`.idx`, little-endian: 9 bytes MMIDIDX\\0\\0, version 1 (8 bytes), the type's code (1), number of sequences and of
document borders (8 each), lengths in tokens (4 each), byte offsets (8 each), borders (8 each; a sequence a document).
`.sources` holds PIECE records: whence every token of the `.bin` came.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_rpsd.data.arrangement import PIECE, Arranged
from megatron_rpsd.data.shards import TokenReader

_HEADER = b"MMIDIDX\x00\x00"
_CODES = {"int32": 4, "uint16": 8}
_PART = 1 << 17


class _HashedOutput:
    """A file under way and the SHA-256 of what was written."""

    def __init__(self, path: Path) -> None:
        self._file, self._digest = path.open("wb"), hashlib.sha256()

    def write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._digest.update(raw)

    def close(self) -> str:
        self._file.close()
        return self._digest.hexdigest()


def write_indexed(
    prefix: Path, arranged: Iterable[Arranged], reader: TokenReader, dtype: str, padding: int
) -> tuple[int, dict[str, str]]:
    """Writes P.bin, P.idx and P.sources.

    Args:
        prefix: P.
        padding: token id where a piece is padding.

    Returns:
        tokens written, and the files' SHA-256 by suffix.
    """
    files = {suffix: _HashedOutput(Path(f"{prefix}{suffix}")) for suffix in (".bin", ".sources")}
    lengths_path = Path(f"{prefix}.lengths")
    place = 0
    with lengths_path.open("wb") as lengths:
        for part in arranged:
            for start, count in _runs(part):
                if start < 0:
                    files[".bin"].write(np.full(count, padding, dtype).tobytes())
                else:
                    for raw in reader.read(start, count):
                        files[".bin"].write(raw)
            tokens = part.pieces["tokens"].astype(np.int64)
            ends = place + np.cumsum(tokens)
            part.pieces["place"] = ends - tokens
            place = int(ends[-1]) if len(ends) else place
            files[".sources"].write(part.pieces.tobytes())
            lengths.write(part.lengths.astype("<i4").tobytes())
    reader.close()
    sums = {suffix: file.close() for suffix, file in files.items()}
    assert Path(f"{prefix}.bin").stat().st_size == place * np.dtype(dtype).itemsize
    sums[".idx"] = _write_index(Path(f"{prefix}.idx"), lengths_path, dtype)
    lengths_path.unlink()
    return place, dict(sorted(sums.items()))


def _runs(part: Arranged) -> Iterator[tuple[int, int]]:
    """(first token in the stream, tokens) of pieces that lie behind one another there; -1 for padding."""
    sources, tokens = part.sources, part.pieces["tokens"].astype(np.int64)
    if not len(sources):
        return
    joined = (sources[1:] == sources[:-1] + tokens[:-1]) & (sources[:-1] >= 0)
    starts = np.concatenate([[0], np.flatnonzero(~joined) + 1])
    yield from zip(sources[starts].tolist(), np.add.reduceat(tokens, starts).tolist(), strict=True)


def _write_index(path: Path, lengths_path: Path, dtype: str) -> str:
    """The index of sequences whose lengths lie, 4 bytes each, in a file; returns its SHA-256."""
    count = lengths_path.stat().st_size // 4
    output = _HashedOutput(path)
    output.write(_HEADER + struct.pack("<QBQQ", 1, _CODES[dtype], count, count + 1))
    for part in _parts(lengths_path):
        output.write(part.tobytes())
    offset, size = 0, np.dtype(dtype).itemsize
    for part in _parts(lengths_path):
        ends = offset + np.cumsum(part.astype(np.int64) * size)
        output.write((ends - part.astype(np.int64) * size).astype("<i8").tobytes())
        offset = int(ends[-1])
    for start in range(0, count + 1, _PART):
        output.write(np.arange(start, min(start + _PART, count + 1), dtype="<i8").tobytes())
    return output.close()


def _parts(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while raw := file.read(4 * _PART):
            yield np.frombuffer(raw, "<i4")


def sequence_lengths(prefix: str | Path) -> np.ndarray:
    """Tokens of every sequence of an `.idx`, int32 [n], mapped.

    Raises:
        ValueError: it is no index of Megatron's, or it breaks off.
    """
    path = Path(f"{prefix}.idx")
    with path.open("rb") as file:
        head = file.read(34)
    if len(head) < 34 or not head.startswith(_HEADER):
        raise ValueError(f"{path} is no index of Megatron's: make the data again with tools/preprocess_data.py")
    count = struct.unpack("<QBQQ", head[9:])[2]
    if path.stat().st_size < 34 + 4 * count:
        raise ValueError(
            f"{path} breaks off: {count} lengths need {34 + 4 * count} bytes, it has {path.stat().st_size}"
        )
    return np.memmap(path, "<i4", mode="r", offset=34, shape=(count,)) if count else np.empty(0, "<i4")


def read_pieces(prefix: str | Path) -> np.ndarray:
    """The `.sources` of a prefix, PIECE [n], mapped.

    Raises:
        ValueError: there is none, or it is no whole number of records.
    """
    path = Path(f"{prefix}.sources")
    if not path.is_file():
        raise ValueError(f"{path} is missing: data of another tool cannot be traced; make them with preprocess_data.py")
    if path.stat().st_size % PIECE.itemsize or not path.stat().st_size:
        raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes are no whole number of {PIECE.itemsize}")
    return np.memmap(path, PIECE, mode="r")
