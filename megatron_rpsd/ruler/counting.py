"""Counting tokens, and which tokens hold a span of characters."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from megatron_rpsd.ruler.pieces import piece_rule
from megatron_rpsd.ruler.prompts import Span

# Counts of pieces that are kept; about 100 bytes each.
MOST_KNOWN = 1_000_000


class Tokens:
    """The tokens of one text, from an encoding with character offsets."""

    def __init__(self, text: str, encoding: Encoding, counter: TokenCounter) -> None:
        self._text, self._encoding, self._counter = text, encoding, counter

    def __len__(self) -> int:
        return len(self._encoding)

    def spans(self, spans: Sequence[Span]) -> list[Span]:
        """For each half-open character span the half-open span of the tokens that hold any of its characters."""
        return token_spans(self._encoding, spans)

    def before(self, offset: int) -> int:
        """Tokens of the text up to a character, as a text by itself."""
        return self._counter.count(self._text[:offset])


class _PieceTokens(Tokens):
    """The same from the counts of a text's pieces; only what lies around a span is encoded."""

    def __init__(self, text: str, pieces: list[str], counter: TokenCounter) -> None:
        self._text, self._pieces, self._counter = text, pieces, counter
        self._length = sum(map(counter.known.__getitem__, pieces))

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Characters and tokens before each piece, and all of them behind the last."""
        known = self._counter.known
        return tuple(
            np.concatenate(([0], np.cumsum(np.fromiter(values, np.int64, len(self._pieces)))))
            for values in (map(len, self._pieces), map(known.__getitem__, self._pieces))
        )

    def spans(self, spans: Sequence[Span]) -> list[Span]:
        ends, token_ends = self._ends
        starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
        # From one piece before a span, as an encoding may treat its very first blank otherwise, to two behind it, as
        # a rule may look at the character behind a run of blanks.
        firsts = np.maximum(np.searchsorted(ends, starts, "right") - 2, 0)
        lasts = np.minimum(np.searchsorted(ends, stops, "left") + 2, len(self._pieces))
        at = ends[firsts].tolist()
        windows = [self._text[start:stop] for start, stop in zip(at, ends[lasts].tolist(), strict=True)]
        found = []
        for span, start, base, encoding in zip(
            spans, at, token_ends[firsts].tolist(), self._counter.encode(windows), strict=True
        ):
            ((inner, outer),) = token_spans(encoding, [(span[0] - start, span[1] - start)])
            found.append((inner + base, outer + base))
        return found

    def before(self, offset: int) -> int:
        ends, token_ends = self._ends
        # Two whole pieces before the cut: what is cut off can change no piece but those that touch it.
        first = max(int(np.searchsorted(ends, offset, "left")) - 3, 0)
        return int(token_ends[first]) + self._counter.whole(self._text[ends[first] : offset])


class _Counts(dict):
    """Piece -> its number of tokens, found out when first wanted."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, piece: str) -> int:
        if len(self) >= MOST_KNOWN:
            self.clear()
        self[piece] = count = len(self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0])
        return count


class TokenCounter:
    """A folder's tokenizer.json, without special tokens, truncation or padding.

    Texts are counted by pieces where the tokenizer's rule is known (`pieces`), and whole where it is not.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"--tokenizer {folder} holds no tokenizer.json")
        content = path.read_bytes()
        self.folder, self.sha256 = folder, hashlib.sha256(content).hexdigest()
        self._tokenizer = Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.known = _Counts(self._tokenizer)
        self.pieces = piece_rule(json.loads(content))
        self._settled = False

    def whole(self, text: str) -> int:
        """Counts by the tokenizer alone."""
        return len(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])

    def count(self, text: str) -> int:
        pieces = self.pieces and self.pieces.split(text)
        return self.whole(text) if pieces is None else sum(map(self.known.__getitem__, pieces))

    def settle(self, text: str) -> None:
        """Compares both ways once, on the first text it is given, and counts whole from then on where they differ."""
        if not self._settled:
            self._settled = True
            if not self.agree(text):
                self.pieces = None

    def agree(self, text: str) -> bool:
        """Whether both ways of counting give the same."""
        return self.pieces is None or self.count(text) == self.whole(text)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Ids, and with them character offsets; several texts go to several cores."""
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def measure(self, texts: Sequence[str]) -> list[Tokens]:
        """Texts that are counted whole go to several cores together."""
        split = [self.pieces and self.pieces.split(text) for text in texts]
        whole = [text for text, pieces in zip(texts, split, strict=True) if pieces is None]
        encodings = iter(self.encode(whole))
        return [
            Tokens(text, next(encodings), self) if pieces is None else _PieceTokens(text, pieces, self)
            for text, pieces in zip(texts, split, strict=True)
        ]


def token_spans(encoding: Encoding, spans: Sequence[Span]) -> list[Span]:
    """For each half-open character span the half-open span of the tokens that hold any of its characters."""
    starts, stops = zip(*encoding.offsets, strict=True)
    return [(bisect_right(stops, start), bisect_left(starts, stop)) for start, stop in spans]
