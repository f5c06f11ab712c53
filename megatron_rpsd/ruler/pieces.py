"""Splitting a text where a tokenizer splits it itself, so that the token count of a piece can be kept and used again.

A tokenizer.json names a pre-tokenizer, a rule that cuts a text before the vocabulary is looked at; no token crosses a
cut. For the rules below the same cuts are found here by one regular expression, and a text's token count is the sum of
its pieces' counts. A word with a character outside ASCII is one piece, whatever the rule does inside it, with the one
blank before it: all these rules cut between a visible character and a blank. Every other tokenizer, and a text in which
that would not be certain, is counted whole. `TokenCounter` compares both ways while it runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# What the ByteLevel pre-tokenizer does by itself (GPT-2's rule), alone and behind a cut at every digit.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
_GPT2_DIGITS = r"[0-9]{1,3}|'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+"
# Rules that are written out in tokenizer.json: Llama 3's (GPT-4's) and Qwen's, which differ in the length of a number.
_WRITTEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_WRITTEN_ASCII = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# What stands in RULER's prompts thousands of times: one piece where it begins at a cut and a blank is behind it.
_PHRASE = r"One of the special magic (?:numbers|uuids) for(?= )|The grass is green. The sky is blue. The sun(?= )"
_WORD = r"(?=[^\s\x80-\U0010ffff]*[^\x00-\x7f])\S+"
_BLANK_WORD = r"[^\S\r\n]?" + _WORD
# Blanks outside ASCII, and characters that some Unicode versions count as blanks.
_OTHER_BLANKS = "\x85\xa0\u1680\u180e\u2000-\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
# Where a run of blanks is cut depends on what is behind it, which may be a digit of another script.
_UNCERTAIN = re.compile(rf"\s[{_OTHER_BLANKS}]|[{_OTHER_BLANKS}]\s|\s\s[^\x00-\x7f]", re.ASCII)


@dataclass(frozen=True)
class PieceRule:
    """Cuts texts as one tokenizer does; no token of it crosses a cut."""

    ascii: re.Pattern
    mixed: re.Pattern
    """The same for texts with characters outside ASCII."""
    special: re.Pattern | None
    """Tokens that are found before anything else, in a group."""
    special_starts: tuple[str, ...]
    """The first two characters of those."""

    def split(self, text: str) -> list[str] | None:
        """Pieces that joined give `text`; None where the cuts are not certain."""
        if self.special is None or not any(start in text for start in self.special_starts):
            return self._split_plain(text)
        pieces: list[str] = []
        for number, part in enumerate(self.special.split(text)):
            own = [part] if number % 2 else self._split_plain(part)
            if own is None:
                return None
            pieces += own
        return pieces

    def _split_plain(self, text: str) -> list[str] | None:
        if text.isascii():
            return self.ascii.findall(text)
        return None if _UNCERTAIN.search(text) else self.mixed.findall(text)


def _patterns(pre_tokenizer: dict | None) -> tuple[str, str] | None:
    """The rule for ASCII texts and for others, None for a pre-tokenizer that is not known here."""
    if pre_tokenizer == {"type": "Whitespace"}:
        return r"\s*\w+|\s*[^\w\s]+|\s+", rf"\s*{_WORD}|\s*\w+|\s*[^\w\s]+|\s+"
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if steps[-1].get("use_regex", True):
        rules = {(): _GPT2, (("Digits", True),): _GPT2_DIGITS}
        found = rules.get(tuple((step["type"], step.get("individual_digits")) for step in steps[:-1]))
        return found and (found, f"{_BLANK_WORD}|{found}")
    if len(steps) == 2 and steps[0]["type"] == "Split" and steps[0]["behavior"] == "Isolated":
        for number in ("{1,3}", ""):
            if not steps[0]["invert"] and steps[0]["pattern"] == {"Regex": _WRITTEN % number}:
                # Three digits are one or three tokens. Punctuation takes the line breaks behind it, and a line break
                # the blanks before it.
                return _WRITTEN_ASCII, rf"{_BLANK_WORD}(?:\s*[\r\n]+)?|{_WRITTEN_ASCII}"
    return None


def _special_tokens(added: Sequence[dict]) -> list[str] | None:
    """Their texts, None when one of them takes blanks or looks at its neighbours."""
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return None
    contents = sorted((token["content"] for token in added), key=len, reverse=True)
    return None if any(len(content) < 2 for content in contents) else contents


def piece_rule(tokenizer: dict) -> PieceRule | None:
    """The rule of a tokenizer.json's content, None where none is known to be exact."""
    model = tokenizer["model"]
    if model["type"] not in ("BPE", "WordLevel") or model.get("dropout"):
        return None
    if tokenizer.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    patterns, special = _patterns(tokenizer.get("pre_tokenizer")), _special_tokens(tokenizer.get("added_tokens", []))
    if patterns is None or special is None:
        return None
    found = re.compile(f"({'|'.join(map(re.escape, special))})") if special else None
    plain, mixed = (re.compile(f"{_PHRASE}|{pattern}", re.ASCII) for pattern in patterns)
    return PieceRule(plain, mixed, found, tuple({content[:2] for content in special}))
