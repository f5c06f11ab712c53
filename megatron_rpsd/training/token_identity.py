"""Whether two models mean the same tokens by the same ids: a hash over (id, token) of both tokenizers.

Only what a column of the logits means is hashed: how text is split, and what templates or settings a folder carries
beside, may differ. Both models are fed the same ids.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

_NO_TOKENIZER = "NullTokenizer"
"""Megatron's name for ids without text: two of them mean the same where their vocabularies are equally long."""


@dataclass(frozen=True)
class TokenIdentity:
    """A tokenizer's.

    Attributes:
        digest: sha256 of its (id, token) pairs, the name of Megatron's tokenizer without text, or None: not known.
        source: where it was read, for messages.
    """

    digest: str | None
    source: str

    def __str__(self) -> str:
        known = self.digest if self.digest in (None, _NO_TOKENIZER) else f"sha256 {self.digest[:16]}"
        return f"{self.source} ({known})"


def token_identity(tokenizer_type: str | None, tokenizer_model: str | None) -> TokenIdentity:
    """Of Megatron's tokenizer arguments; `digest` is None where no tokenizer.json is found."""
    if tokenizer_type == _NO_TOKENIZER:
        return TokenIdentity(_NO_TOKENIZER, "no text")
    if tokenizer_model is None:
        return TokenIdentity(None, "no tokenizer")
    path = Path(tokenizer_model) / "tokenizer.json"
    return TokenIdentity(tokens_digest(path) if path.is_file() else None, str(tokenizer_model))


def tokens_digest(path: Path) -> str:
    """sha256 over the (id, token) pairs of a tokenizer.json, added tokens included, in the order of ids.

    Raises:
        ValueError: the file is not a tokenizer of Hugging Face's form.
    """
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, dict):
            pairs = {index: token for token, index in vocabulary.items()}
        else:  # a unigram model lists (token, score)
            pairs = {index: entry[0] for index, entry in enumerate(vocabulary)}
        pairs |= {int(token["id"]): token["content"] for token in tokenizer.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not a tokenizer.json with a vocabulary") from error
    return hashlib.sha256(json.dumps(sorted(pairs.items()), ensure_ascii=True).encode()).hexdigest()


def check_same_tokens(student: TokenIdentity, teacher: TokenIdentity) -> None:
    """Refuse a teacher whose columns do not mean the student's tokens.

    Raises:
        ValueError: they differ, or one of them is not known.
    """
    if teacher.digest is None:
        raise ValueError(
            f"the teacher's tokenizer is not known: {teacher.source} holds no tokenizer.json; name the folder that "
            "does with --teacher-tokenizer DIR"
        )
    if student.digest is None:
        raise ValueError(
            f"the student's tokenizer is not known: {student.source} holds no tokenizer.json, so that it cannot be "
            "compared with the teacher's; name a folder that does with --tokenizer-model DIR"
        )
    if student.digest != teacher.digest:
        raise ValueError(
            f"the teacher's tokens, {teacher}, are not the student's, {student}: logits are compared id by id; choose "
            "a teacher of the student's tokenizer, or name the right folders with --teacher-tokenizer and "
            "--tokenizer-model"
        )
