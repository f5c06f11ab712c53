"""What a `.bin/.idx` pair was made from, kept beside it as `P.json`, so that training can refuse data of another model.

Megatron's own index names no vocabulary: tokens of a larger one fail as an embedding index error on some rank, and
tokens of another one of the same size train on noise without any message.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from megatron_rpsd.data.shards import file_sha256

FORMAT = 1
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes of a token, by the index's code for its type; Megatron's codes of whole numbers."""


@dataclass(frozen=True)
class InputFile:
    """One input, as named on the command line."""

    path: str
    size: int
    """bytes"""
    sha256: str


@dataclass(frozen=True)
class LengthBucket:
    """Stored documents of low to high tokens, both included."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """Contents of `P.json`."""

    tokenizer_sha256: str
    """SHA-256 of the tokenizer folder's tokenizer.json, of the model file, or of tiktoken's ranks"""
    vocab_size: int
    """entries of the tokenizer, added tokens included: its `len()`"""
    max_token_id: int
    """largest token id in the data"""
    dtype: str
    """NumPy's name of the stored type"""
    eod_id: int | None
    """token that ends every document; None when none was appended"""
    documents: int
    """documents of the inputs that are stored, whole or in part"""
    empty_documents: int
    """documents left out because they hold no text"""
    tokens: int
    seq_length: int
    """L, tokens that a sample feeds to the model"""
    windows: int
    """whole samples of L + 1 tokens, neighbours sharing one token as in Megatron's GPTDataset: (tokens - 1) // L"""
    inputs: tuple[InputFile, ...]
    format: int = FORMAT
    mode: str = "concatenate"
    """how documents were arranged"""
    json_key: str = "text"
    seed: int = 0
    """of the order of files within a repository"""
    skipped: int = 0
    """documents and rests of files that could not be read; P.skipped.jsonl names them"""
    left_out_documents: int = 0
    """documents of which the arrangement stored nothing: too short or too long for it"""
    left_out_tokens: int = 0
    """tokens of them, and of the rests of others"""
    cut_documents: int = 0
    """documents that end up in more than one window, or lose a rest"""
    padding_tokens: int = 0
    """of `tokens`"""
    padding_id: int | None = None
    """token that pads"""
    special_tokens: int = 0
    """special tokens that texts spelled and that the tokenizer would not read as text"""
    lengths: tuple[LengthBucket, ...] = ()
    """documents of the inputs, stored or not, by length"""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of P.bin, P.idx and P.sources, by suffix"""


def _beside(prefix: str | Path, suffix: str) -> Path:
    """`P.suffix`; a dot inside the prefix's own name stays, unlike with Path.with_suffix."""
    return Path(f"{prefix}{suffix}")


def write_manifest(prefix: str | Path, manifest: Manifest) -> Path:
    """Writes `P.json` and returns its path."""
    path = _beside(prefix, ".json")
    path.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
    return path


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of `prefix`, or None when there is none: data that another tool made.

    Raises ValueError when `P.json` is not a manifest of this format.
    """
    path = _beside(prefix, ".json")
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text())
        if fields.get("format") != FORMAT:
            raise ValueError(f"format is {fields.get('format')!r}, not {FORMAT}")
        parts = {"inputs": tuple(InputFile(**entry) for entry in fields["inputs"])}
        parts["lengths"] = tuple(LengthBucket(**entry) for entry in fields.get("lengths", ()))
        return Manifest(**{**fields, **parts})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of tools/preprocess_data.py: {error}") from None


def check_files(prefix: str | Path) -> None:
    """Compares the files of a prefix with the manifest's checksums.

    Raises:
        ValueError: a file is missing or damaged (all such are named), or there is no manifest to compare with.
    """
    manifest = read_manifest(prefix)
    if manifest is None or not manifest.files:
        raise ValueError(f"{prefix}.json is missing or older than checksums: make the data with preprocess_data.py")
    found = []
    for suffix, expected in manifest.files.items():
        path = _beside(prefix, suffix)
        if not path.is_file():
            found.append(f"{path} is missing")
        elif (digest := file_sha256(path)) != expected:
            found.append(f"{path} is damaged: its SHA-256 is {digest[:12]}..., the manifest says {expected[:12]}...")
    if found:
        raise ValueError("; ".join(found))


def check_prefix(prefix: str | Path, vocab_size: int) -> Manifest | None:
    """Checks that a model of `vocab_size` tokens can train on `prefix`; returns the manifest when there is one.

    Without a manifest the two files must be there, and the first documents must fit the vocabulary. `vocab_size` is the
    model's own, without padding for tensor parallelism: padded entries have no meaning. It may exceed the tokenizer's
    count, as Qwen's does.

    Raises ValueError when `P.bin` or `P.idx` is missing, the tokenizer has more entries than the model, or the data
    hold a token id that the model has not.
    """
    missing = [str(path) for path in (_beside(prefix, ".bin"), _beside(prefix, ".idx")) if not path.is_file()]
    if missing:
        raise ValueError(
            f"--data-path {prefix}: no {' and no '.join(missing)}: make them with tools/preprocess_data.py "
            f"--output-prefix {prefix}"
        )
    manifest = read_manifest(prefix)
    _check_pair(prefix)
    largest = _largest_of_the_first(prefix) if manifest is None else manifest.max_token_id
    if largest >= vocab_size:
        raise ValueError(
            f"--data-path {prefix}: the data hold token id {largest}, the model's vocab_size is "
            f"{vocab_size} (ids 0 to {vocab_size - 1}): preprocess the text with this model's tokenizer"
        )
    if manifest is not None and manifest.vocab_size > vocab_size:
        raise ValueError(
            f"--data-path {prefix}: made with a tokenizer of {manifest.vocab_size} entries, the model's vocab_size is "
            f"{vocab_size}: preprocess the text with this model's tokenizer"
        )
    return manifest


def _check_pair(prefix: str | Path) -> None:
    """Refuse an index that is none or breaks off, and a `.bin` that is shorter than its index says: sizes alone."""
    index, tokens = _beside(prefix, ".idx"), _beside(prefix, ".bin")
    with index.open("rb") as file:
        head = file.read(34)
        if len(head) < 34 or head[:17] != b"MMIDIDX\x00\x00" + struct.pack("<Q", 1):
            raise ValueError(f"--data-path {prefix}: {index} is no index of Megatron's, or is damaged: make it again")
        code, sequences, borders = struct.unpack("<BQQ", head[17:])
        needed = 34 + 12 * sequences + 8 * borders
        if index.stat().st_size < needed or code not in _TOKEN_BYTES:
            raise ValueError(
                f"--data-path {prefix}: {index} is damaged; {sequences} documents of type {code} need {needed} bytes, "
                f"it has {index.stat().st_size}: make it again"
            )
        if not sequences:
            raise ValueError(f"--data-path {prefix}: {index} holds no document")
        file.seek(34 + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", file.read(4))
        file.seek(34 + 4 * sequences + 8 * (sequences - 1))
        (start,) = struct.unpack("<q", file.read(8))
    end = start + length * _TOKEN_BYTES[code]
    if tokens.stat().st_size < end:
        raise ValueError(
            f"--data-path {prefix}: {tokens} breaks off: it has {tokens.stat().st_size} bytes, its index says {end}: "
            "make it again"
        )


def _largest_of_the_first(prefix: str | Path, tokens: int = 2**20) -> int:
    """Largest token id among about the first `tokens` tokens of an indexed dataset: a moment's look, not a proof."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset, seen, largest = IndexedDataset(str(prefix)), 0, -1
    for index in range(len(dataset)):
        document = dataset[index]
        if len(document):
            largest = max(largest, int(document.max()))
        seen += len(document)
        if seen >= tokens:
            break
    return largest
