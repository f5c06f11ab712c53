"""What a `.bin/.idx` pair was made from, kept beside it as `P.json`, so that training can refuse data of another model.

Megatron's own index names no vocabulary: tokens of a larger one fail as an embedding index error on some rank, and
tokens of another one of the same size train on noise without any message.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1


@dataclass(frozen=True)
class InputFile:
    """One input, as named on the command line."""

    path: str
    size: int
    """bytes"""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of `P.json`."""

    tokenizer_sha256: str
    """SHA-256 of the tokenizer folder's tokenizer.json"""
    vocab_size: int
    """entries of the tokenizer, added tokens included: its `len()`"""
    max_token_id: int
    """largest token id in the data"""
    dtype: str
    """NumPy's name of the stored type"""
    eod_id: int | None
    """token that ends every document; None when none was appended"""
    documents: int
    """documents stored"""
    empty_documents: int
    """documents left out because they hold no text"""
    tokens: int
    seq_length: int
    """L, tokens that a sample feeds to the model"""
    windows: int
    """whole samples of L + 1 tokens, neighbours sharing one token as in Megatron's GPTDataset: (tokens - 1) // L"""
    inputs: tuple[InputFile, ...]
    format: int = FORMAT


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
        return Manifest(**{**fields, "inputs": tuple(InputFile(**entry) for entry in fields["inputs"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of tools/preprocess_data.py: {error}") from None


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
