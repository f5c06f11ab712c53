"""Training text and held-out windows: Python's own standard library, split by document."""

from __future__ import annotations

import json
import tokenize
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_rpsd.data.documents import python_sources, split_documents, standard_library


def source_text(path: Path) -> str:
    """A Python file's text, decoded as Python itself would."""
    with tokenize.open(path) as file:
        return file.read()


def write_training_text(paths: Sequence[Path], output: Path) -> None:
    """One JSON line {"path": ..., "text": ...} per document, written aside and renamed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    root = standard_library()
    with partial.open("w", encoding="utf-8") as file:
        for path in paths:
            file.write(json.dumps({"path": path.relative_to(root).as_posix(), "text": source_text(path)}) + "\n")
    partial.replace(output)


def held_out_windows(paths: Sequence[Path], tokenizer_folder: Path, count: int, length: int, offset: int) -> tuple:
    """One window from each of `count` documents, taken at even distances among those that are long enough.

    Returns:
        int64 [count, length], and the documents' paths below the standard library.

    Raises:
        ValueError: fewer than `count` documents hold offset + length tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    candidates = []
    for path in paths:
        tokens = tokenizer(source_text(path), add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= offset + length:
            candidates.append((path.relative_to(standard_library()).as_posix(), tokens[offset : offset + length]))
    if len(candidates) < count:
        raise ValueError(
            f"only {len(candidates)} of {len(paths)} held-out files hold {offset} + {length} tokens, {count} are "
            "needed; this Python's standard library is not complete"
        )
    chosen = [candidates[index * len(candidates) // count] for index in range(count)]
    return np.array([tokens for _, tokens in chosen], dtype=np.int64), [name for name, _ in chosen]


def split_sources(held_out_fraction: float) -> tuple[list[Path], list[Path]]:
    """The standard library's files for training and those held out."""
    return split_documents(python_sources(), held_out_fraction)


def save_windows(path: Path, windows: np.ndarray) -> None:
    """Write the .npy aside and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.save(file, windows)
    partial.replace(path)
