"""Counting tokens, and which tokens hold a span of characters."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from megatron_rpsd.ruler.prompts import Span


class TokenCounter:
    """A folder's tokenizer.json, without special tokens, truncation or padding."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"--tokenizer {folder} holds no tokenizer.json")
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """With character offsets; several texts go to several cores."""
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)


def token_spans(encoding: Encoding, spans: Sequence[Span]) -> list[Span]:
    """For each half-open character span the half-open span of the tokens that hold any of its characters."""
    starts, stops = zip(*encoding.offsets, strict=True)
    return [(bisect_right(stops, start), bisect_left(starts, stop)) for start, stop in spans]
