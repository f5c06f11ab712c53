"""The answer that a prompt asks for, as text behind the prompt and as tokens, for scores without generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rpsd.ruler.counting import TokenCounter, token_spans
from megatron_rpsd.ruler.prompts import Span
from megatron_rpsd.ruler.tasks import RULER_TASKS


@dataclass(frozen=True)
class ForcedTokens:
    """A prompt and its gold answer, read in one piece.

    Attributes:
        ids: token ids of both.
        start: where the answer begins in `ids`; it ends where they end.
        references: half-open spans in `ids` of the references that the answer holds, in its order.
    """

    ids: tuple[int, ...]
    start: int
    references: tuple[Span, ...]


def _leads(family: str, count: int) -> list[str]:
    """What stands before each of `count` references."""
    if family == "cwe":
        return [f" {number}. " for number in range(1, count + 1)]
    if family == "vt" or count == 1:
        return [" "] * count
    return [" ", *[", "] * (count - 2), " and " if count == 2 else ", and "]


def gold_answer(task: str, outputs: Sequence[str]) -> tuple[str, list[Span]]:
    """The answer that follows the answer prefix, and where each of its references stands in it, in characters.

    VT and CWE answer as their own solved examples do, QA with its first reference (any one is right), the others with
    an English list. It starts with a blank.

    Args:
        task: a task's name; what follows an "@" names a variant of it.
    """
    base = task.split("@")[0]
    if base not in RULER_TASKS:
        raise ValueError(f"{task} is none of RULER's tasks: {', '.join(RULER_TASKS)}")
    family = RULER_TASKS[base].family
    if family == "qa":
        outputs = outputs[:1]
    text, spans = "", []
    for lead, word in zip(_leads(family, len(outputs)), outputs, strict=True):
        text += lead + word
        spans.append((len(text) - len(word), len(text)))
    return text, spans


def bos_of_tokenizer(folder: Path) -> int | None:
    """The token that a folder's tokenizer puts before every text; None where it puts none there."""
    if not (folder / "tokenizer_config.json").is_file():  # a bare tokenizer.json names no BOS
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a").input_ids[:1] == [bos] else None


def forced_tokens(
    counter: TokenCounter, name: str, prompt: str, answer: str, references: Sequence[Span], bos_id: int | None = None
) -> ForcedTokens:
    """Tokens of `prompt` + `answer`, tokenised together, as a model would have read and written them.

    Args:
        name: of the sample, for errors.
        references: character spans in `answer`.
        bos_id: a token put before everything unless the prompt begins with it (by its chat template), or None.

    Raises:
        ValueError: the answer changes the prompt's own tokens, so that no generation could have led there.
    """
    alone, both = counter.encode([prompt, prompt + answer])
    start = len(alone.ids)
    # Offsets too: an unknown piece has the same id as another one.
    kept = both.ids[:start] == alone.ids and both.offsets[:start] == alone.offsets
    if not kept or len(both.ids) == start:
        raise ValueError(
            f"{name}: with its answer {answer!r} behind it the prompt's last token changes (this tokenizer joins "
            f"{prompt[-8:]!r} and {answer[:8]!r}), so a teacher-forced score would not be that of a generation"
        )
    bos = [] if bos_id in (None, both.ids[0]) else [bos_id]
    spans = token_spans(both, [(len(prompt) + a, len(prompt) + b) for a, b in references])
    return ForcedTokens((*bos, *both.ids), len(bos) + start, tuple((len(bos) + a, len(bos) + b) for a, b in spans))
