"""Where documents start and end in files: text, JSONL, either of them under gzip or zstandard, parquet, repositories.

| name ends in | documents |
|---|---|
| .jsonl | one a line |
| .parquet | one a row of the text column |
| a folder | the text files of a code repository, joined |
| anything else | the file is one |

.gz and .zst behind a name are read through. Files are read a block at a time; a JSONL file of any size takes the memory
of its longest line.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from megatron_rpsd.data.documents import Document

_BLOCK = 1 << 20
_COMPRESSED = (".gz", ".zst")
_REPOSITORY_HEADER = "File: {path}\n\n"
_REPOSITORY_BORDER = b"\n\n"


def optional_package(name: str, what: str) -> ModuleType:
    """Import a package that only some inputs need.

    Raises:
        ValueError: it is not installed; names it.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise ValueError(f"{what} needs the package {package}: pip install {package}") from None


class _HashedFile(io.RawIOBase):
    """A file that shows a digest every byte that is read from it."""

    def __init__(self, path: Path, digest: Any) -> None:
        self._file, self._digest = path.open("rb", buffering=0), digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def content_suffix(path: Path) -> str:
    """The suffix of what is inside: `.jsonl` of `a.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _decompressed(path: Path, file: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if path.suffix == ".zst":
        zstandard = optional_package("zstandard", f"--input {path}")
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True), _BLOCK)
    return file


def _damage(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged compressed file raises."""
    if path.suffix == ".zst":
        return (optional_package("zstandard", f"--input {path}").ZstdError,)
    return (EOFError, gzip.BadGzipFile, zlib.error)


def iter_documents(path: Path, digest: Any, json_key: str = "text", seed: int = 0) -> Iterator[Document]:
    """Reads `path` once, document by document; `digest` (a hashlib object) has seen every byte of it at the end.

    Args:
        json_key: the text column of a parquet file. (A JSONL line is taken apart by `document_text`.)
        seed: of the order of a repository's files.

    Raises:
        ValueError: a damaged file, at the place where it breaks off, or a package that is not installed.
    """
    if path.is_dir():
        raw = b"".join(part.raw for part in repository_parts(path, seed))
        digest.update(raw)
        yield Document(path, None, raw)
    elif content_suffix(path) == ".parquet":
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        yield from _parquet_rows(path, json_key)
    else:
        yield from _stream_documents(path, digest)


def _stream_documents(path: Path, digest: Any) -> Iterator[Document]:
    hashed = io.BufferedReader(_HashedFile(path, digest), _BLOCK)
    line, offset = 0, 0
    with hashed, _decompressed(path, hashed) as file:
        try:
            if content_suffix(path) != ".jsonl":
                yield Document(path, None, file.read())
            else:
                for line, raw in enumerate(file, start=1):
                    yield Document(path, line, raw, offset, is_json=True)
                    offset += len(raw)
        except _damage(path) as error:
            where = f" behind line {line}" if line else ""
            raise ValueError(f"{path} is damaged{where}: {str(error) or type(error).__name__}") from None
        while hashed.read(_BLOCK):  # what follows the compressed stream
            continue


def _parquet_rows(path: Path, json_key: str) -> Iterator[Document]:
    parquet = optional_package("pyarrow.parquet", f"--input {path}")
    from pyarrow.lib import ArrowException

    try:
        with parquet.ParquetFile(path) as file:
            if json_key not in file.schema_arrow.names:
                raise ValueError(f"{path} has no column {json_key!r} (--json-key), only {file.schema_arrow.names}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[json_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is not None and not isinstance(text, str):
                        raise ValueError(f"{path}:{row}: {json_key!r} (--json-key) holds no string: {text!r:.60}")
                    yield Document(path, row, (text or "").encode())
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable parquet file: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class RepositoryPart:
    """A file of a joined repository."""

    path: Path
    header: int
    """bytes of the line with its path, before its own"""
    raw: bytes
    """header, the file's bytes, and the blank line behind it"""


def repository_parts(folder: Path, seed: int) -> Iterator[RepositoryPart]:
    """The text files of a repository, each under a line with its path, in an order drawn from (seed, path).

    No dependency orders them: a file's definitions stand before its uses as often as behind them, near or far, which is
    what makes joined repositories long-range data (ProLong, arXiv 2410.02660). Left out: hidden files and folders,
    links, and files that are empty or not UTF-8 text.
    """

    def place(path: Path) -> tuple[bytes, str]:
        name = path.relative_to(folder).as_posix()
        return hashlib.sha256(f"{seed}\0{name}".encode()).digest(), name

    found = [
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
        and not path.is_symlink()
    ]
    for path in sorted(found, key=place):
        content = path.read_bytes()
        if not content.strip() or b"\0" in content or not _is_text(content):
            continue
        header = _REPOSITORY_HEADER.format(path=path.relative_to(folder).as_posix()).encode()
        yield RepositoryPart(path, len(header), header + content + _REPOSITORY_BORDER)


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_document(path: Path, line: int, offset: int, json_key: str, seed: int) -> Document:
    """The document that `data.sources` names: read again, for tracing.

    Args:
        line: from 1; 0 where the file is the document.
        offset: as in `Document`.

    Raises:
        ValueError: the file has no such document any more.
    """
    number = line or None
    if content_suffix(path) == ".jsonl" and path.suffix == ".jsonl":
        with path.open("rb") as file:
            file.seek(offset)
            return Document(path, number, file.readline(), offset, is_json=True)
    for document in iter_documents(path, hashlib.sha256(), json_key, seed):
        if document.line == number:
            return document
    raise ValueError(f"{path} has no document {line}: it changed after the data were made")
