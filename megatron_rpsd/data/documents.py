"""Documents: the text of one, and long real text that every machine has. `data.readers` finds them in files."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Below the standard library: installed packages, tests, the editor, and code or tables that a program generated.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "__phello__",
}


@dataclass(frozen=True)
class Document:
    """One document as it lies in its file."""

    path: Path
    """the file, or the repository's folder"""
    line: int | None
    """line in a JSONL file or row in a parquet file, from 1; None when the file is the document"""
    raw: bytes
    """the file's bytes, or the line's; the text's, where it comes from a parquet column or a repository"""
    offset: int = 0
    """where a JSONL line begins, in bytes of the (decompressed) file"""
    is_json: bool = False
    """raw is a line of JSON"""
    number: int = 0
    """place of its file among the inputs"""

    @property
    def label(self) -> str:
        """`file` or `file:line`, for messages."""
        return str(self.path) if self.line is None else f"{self.path}:{self.line}"


def document_text(document: Document, json_key: str) -> str:
    """The document's text; "" for a blank JSONL line.

    Raises ValueError, with file and line, for bytes that are not UTF-8, a line that is not a JSON object, or a line
    without a string under `json_key`.
    """
    try:
        text = document.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{document.label} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not document.is_json:
        return text
    if not text.strip():
        return ""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{document.label} is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{document.label} is not a JSON object but a {type(record).__name__}")
    if json_key not in record:
        raise ValueError(f"{document.label} has no key {json_key!r} (--json-key), only {sorted(record)}")
    text = record[json_key]
    if not isinstance(text, str):
        raise ValueError(f"{document.label}: {json_key!r} (--json-key) holds no string: {text!r:.60}")
    if has_half_pair(text):
        raise ValueError(f"{document.label}: {json_key!r} holds half of a surrogate pair, which is no character")
    return text


def has_half_pair(text: str) -> bool:
    """Whether JSON's \\uD800 to \\uDFFF stand alone in a text: they are no characters, and no UTF-8."""
    return not text.isascii() and any(0xD800 <= ord(character) < 0xE000 for character in text)


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def python_sources() -> list[Path]:
    """The standard library's own `.py` files: several MB of long, human-written text on every machine.

    Sorted by path. Left out: installed packages, tests, the IDLE editor and its like, the code tables under
    `encodings`, `_sysconfigdata*` (generated, full of the building machine's paths), and empty files.
    """
    root = standard_library()
    found = []
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        generated = path.name.startswith("_sysconfigdata") or any(name.startswith("config-") for name in folders)
        if not generated and _SKIPPED_FOLDERS.isdisjoint(folders) and path.stat().st_size > 0:
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def split_documents(
    paths: Sequence[Path], held_out_fraction: float, root: Path | None = None
) -> tuple[list[Path], list[Path]]:
    """Splits `paths` into (train, held out): disjoint, together all of them, each in the given order.

    A file is held out when the SHA-256 of its path below `root` (default: the standard library), read as a fraction of
    its range, is under `held_out_fraction`. So a file falls on the same side on every machine, whatever other files are
    in the list, and a larger fraction only moves files from train to held out.

    Raises ValueError for a fraction outside (0, 1), a path outside `root`, or a side that is left empty.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"held_out_fraction is {held_out_fraction}: it must lie between 0 and 1, both excluded")
    root = standard_library() if root is None else root
    train: list[Path] = []
    held_out: list[Path] = []
    for path in paths:
        if not path.is_relative_to(root):
            raise ValueError(f"{path} does not lie under {root}, from which the split takes its relative path")
        head = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()[:8]
        side = held_out if int.from_bytes(head, "big") / 2**64 < held_out_fraction else train
        side.append(path)
    if not train or not held_out:
        raise ValueError(
            f"held_out_fraction {held_out_fraction} of {len(paths)} files leaves {len(train)} to train on and "
            f"{len(held_out)} held out: name more files or another fraction"
        )
    return train, held_out
