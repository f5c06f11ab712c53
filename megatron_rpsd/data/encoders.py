"""Tokenizers as the data preparation uses them: Hugging Face folders, sentencepiece models, tiktoken vocabularies.

A special token that a text spells ("</s>" in a source file) is text: it becomes the tokens of its characters, so that
no document seems to end where it does not. Added tokens that are not special, such as "<think>", stay one token.

A `TokenizerSpec` is read once and sent to the workers, which build an encoder from it. A fast Hugging Face tokenizer
travels as the text of its backend, so that a worker starts without transformers, and encodes as the folder's own class
does, whatever that class changed after reading tokenizer.json.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# Megatron's DType.optimal_dtype: from here on ids take 4 bytes.
_TWO_BYTES = 65500
_TIKTOKEN = "tiktoken:"


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer, ready to be sent to another process."""

    kind: str
    """huggingface, huggingface-slow, sentencepiece, tiktoken"""
    path: str
    """as typed"""
    state: Any
    """what `build_encoder` needs beside the path"""
    vocab_size: int
    """entries, added tokens included"""
    cardinality: int
    """largest id + 1; ids may have gaps"""
    eod_id: int | None
    """end-of-sequence token of the tokenizer"""
    pad_id: int | None
    sha256: str
    """of tokenizer.json, the model file, or the ranks"""
    special_ids: tuple[int, ...] = ()
    """tokens that no text should give; not the one for unknown characters"""

    @property
    def dtype(self) -> str:
        """NumPy's name of the type that ids are stored in, as Megatron chooses it."""
        return "uint16" if self.cardinality < _TWO_BYTES else "int32"


class Encoder(Protocol):
    """Text to ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Ids of each text, with the tokens that the tokenizer adds by itself; special tokens in the text are text."""

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and for each the characters [start, stop) that it stands for."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""


def read_tokenizer(path: str | Path, pattern: str | None = None) -> TokenizerSpec:
    """The tokenizer that --tokenizer names.

    Args:
        path: a Hugging Face folder; a sentencepiece `.model`; a `.tiktoken` file of ranks; or `tiktoken:NAME`, which
            tiktoken looks up in TIKTOKEN_CACHE_DIR before it downloads.
        pattern: for a `.tiktoken` file, the regular expression that splits text before ranks are looked up.

    Raises:
        ValueError: nothing there, or nothing that can be loaded.
    """
    text, place = str(path), Path(path)
    if text.startswith(_TIKTOKEN):
        return _tiktoken_by_name(text)
    if place.suffix == ".model" and place.is_file():
        return _sentencepiece(place)
    if place.suffix == ".tiktoken" and place.is_file():
        return _tiktoken_file(place, pattern)
    if not place.is_dir():
        what = f"is not a folder, a .model or .tiktoken file, or {_TIKTOKEN}NAME"
        raise ValueError(f"--tokenizer {path} {what}")
    if not (place / "tokenizer.json").is_file():
        raise ValueError(f"--tokenizer {path} holds no tokenizer.json")
    return _huggingface(place)


def build_encoder(spec: TokenizerSpec) -> Encoder:
    """The encoder of a specification, in any process."""
    kinds = {
        "huggingface": _Fast,
        "huggingface-slow": _Slow,
        "sentencepiece": _SentencePiece,
        "tiktoken": _Tiktoken,
    }
    return kinds[spec.kind](spec)


def _refuse(path: str | Path, error: BaseException) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"--tokenizer {path} cannot be loaded: {reason}")


def _huggingface(folder: Path) -> TokenizerSpec:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise _refuse(folder, error) from error
    state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
    return TokenizerSpec(
        kind="huggingface" if tokenizer.is_fast else "huggingface-slow",
        path=str(folder),
        state=state,
        vocab_size=len(tokenizer),
        cardinality=max(len(tokenizer), 1 + max(tokenizer.get_vocab().values())),
        eod_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        special_ids=_special_ids(tokenizer),
    )


def _special_ids(tokenizer) -> tuple[int, ...]:
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return tuple(sorted((added | set(tokenizer.all_special_ids)) - ({tokenizer.unk_token_id} - ends)))


class _Fast:
    """The Rust tokenizer alone: `encode_batch_fast` keeps no offsets and gives the same ids."""

    def __init__(self, spec: TokenizerSpec) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(spec.state)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as text

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        # A worker is one process of several: threads of its own would only contend. Read at each call.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._tokenizer.encode(text)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class _Slow:
    """A tokenizer written in Python."""

    def __init__(self, spec: TokenizerSpec) -> None:
        from transformers import AutoTokenizer

        self._tokenizer, self._path = AutoTokenizer.from_pretrained(spec.path, local_files_only=True), spec.path

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        # Some classes ignore the wish; what they make of it is counted (`encoding.DocumentEncoder`).
        return [self._tokenizer(text, verbose=False, split_special_tokens=True)["input_ids"] for text in texts]

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        raise ValueError(f"--tokenizer {self._path}: a tokenizer in Python does not say which characters a token is")

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))


def _sentencepiece(path: Path) -> TokenizerSpec:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise _refuse(path, error) from error
    eod, pad = (None if number < 0 else number for number in (model.eos_id(), model.pad_id()))
    size, digest = model.get_piece_size(), hashlib.sha256(path.read_bytes()).hexdigest()
    special = tuple(token for token in range(size) if model.is_control(token))
    return TokenizerSpec("sentencepiece", str(path), None, size, size, eod, pad, digest, special)


class _SentencePiece:
    def __init__(self, spec: TokenizerSpec) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=spec.path)

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return self._model.encode(list(texts), num_threads=1)

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        # Offsets count UTF-8 bytes or characters, by the release; pieces' surfaces say it either way.
        ids, spans, place = [], [], 0
        for piece in self._model.encode(text, return_type="proto").pieces:
            ids.append(piece.id)
            spans.append((place, place + len(piece.surface)))
            place += len(piece.surface)
        return ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids])


def _tiktoken_by_name(text: str) -> TokenizerSpec:
    import tiktoken

    name = text.removeprefix(_TIKTOKEN)
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # an unknown name, or whatever the download raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--tokenizer {text} cannot be loaded: {reason:.120}; without a network put its file into the folder that "
            "TIKTOKEN_CACHE_DIR names"
        ) from error
    state = (encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)
    return _tiktoken_spec(text, state, encoding.eot_token)


def _tiktoken_file(path: Path, pattern: str | None) -> TokenizerSpec:
    if pattern is None:
        raise ValueError(
            f"--tokenizer {path} holds ranks alone: give the pattern that splits text, --tiktoken-pattern REGEX "
            "(tiktoken calls it pat_str)"
        )
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise ValueError(f"--tokenizer {path} cannot be loaded: lines of base64 and a rank expected: {error}") from None
    if not ranks:
        raise ValueError(f"--tokenizer {path} cannot be loaded: it holds no ranks")
    eod = 1 + max(ranks.values())
    spec = _tiktoken_spec(str(path), (pattern, ranks, {"<|endoftext|>": eod}), eod)
    try:
        build_encoder(spec)
    except ValueError as error:
        raise ValueError(f"--tokenizer {path} --tiktoken-pattern {pattern}: {str(error).splitlines()[0]}") from None
    return spec


def _tiktoken_spec(path: str, state: tuple[str, dict[bytes, int], dict[str, int]], eod: int) -> TokenizerSpec:
    pattern, ranks, special = state
    digest = hashlib.sha256(pattern.encode())
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        digest.update(b"%d %s\n" % (rank, base64.b64encode(token)))
    ids = {*ranks.values(), *special.values()}
    marks = tuple(sorted(special.values()))
    return TokenizerSpec("tiktoken", path, state, len(ids), 1 + max(ids), eod, None, digest.hexdigest(), marks)


class _Tiktoken:
    def __init__(self, spec: TokenizerSpec) -> None:
        import tiktoken

        pattern, ranks, special = spec.state
        self._encoding = tiktoken.Encoding(spec.path, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids = self._encoding.encode_ordinary(text)
        # Byte lengths to characters: a token may end within a character, which then belongs to both.
        ends = np.cumsum([len(self._encoding.decode_single_token_bytes(token)) for token in ids])
        starts_of = np.cumsum([0] + [len(character.encode()) for character in text])
        starts = np.searchsorted(starts_of, np.concatenate([[0], ends[:-1]]), side="right") - 1
        stops = np.searchsorted(starts_of, ends, side="left")
        return ids, list(zip(starts.tolist(), stops.tolist(), strict=True))

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([int(token) for token in ids])
