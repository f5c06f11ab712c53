"""A prompt's token ids as the model reads them: the tokens that were counted, and at most one BOS before them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from megatron_rpsd.evaluation.engines.base import Forced
from megatron_rpsd.evaluation.samples import Sample
from megatron_rpsd.ruler.answers import forced_tokens, gold_answer
from megatron_rpsd.ruler.counting import TokenCounter


class PromptTokens:
    """Tokens of prompts by a folder's tokenizer.json, the file that the prompts were measured with.

    RULER counts without special tokens. `auto` puts a BOS before a prompt where the model's own tokenizer does and the
    prompt (by its chat template) does not begin with one already; there are never two.

    Attributes:
        bos_id: the tokenizer's BOS, None where it has none.
        added_by_tokenizer: whether the model's tokenizer puts it before every text.
        eos_ids: the tokenizer's EOS, empty where it has none.
        vocab_size: largest token id + 1.
    """

    def __init__(self, folder: Path, bos: str = "auto") -> None:
        self.folder, self.bos = folder, bos
        self.counter = TokenCounter(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.added_by_tokenizer, self.eos_ids = _special_tokens(folder)
        if bos == "add" and self.bos_id is None:
            raise ValueError(f"--bos add: the tokenizer in {folder} names no BOS; use --bos none")

    def begins_with_bos(self, prompt: str) -> bool:
        """Whether the text itself has the BOS, as chat templates write it."""
        head = self.counter.encode([prompt[:200]])[0].ids
        return self.bos_id is not None and head[:1] == [self.bos_id]

    def adds_bos(self, prompt: str) -> bool:
        """Whether a BOS goes before this prompt."""
        wanted = self.bos == "add" or (self.bos == "auto" and self.added_by_tokenizer)
        return wanted and not self.begins_with_bos(prompt)

    def prompt_ids(self, sample: Sample) -> list[int]:
        """Token ids of the whole prompt; ValueError where their number is not the counted one."""
        ids = self.counter.encode([sample.prompt])[0].ids
        if len(ids) != sample.prompt_tokens:
            raise ValueError(
                f"{sample.id} has {len(ids)} tokens by {self.folder}, {sample.prompt_tokens} by its evidence file"
            )
        return [self.bos_id, *ids] if self.adds_bos(sample.prompt) else ids

    def answer_ids(self, sample: Sample) -> tuple[tuple[int, ...], int, list[tuple[str, int, int]]]:
        """Prompt and gold answer as ids, where the answer begins, and each of its references' half-open span in ids."""
        text, spans = gold_answer(sample.task, sample.outputs)
        bos = self.bos_id if self.adds_bos(sample.prompt) else None
        both = forced_tokens(self.counter, sample.id, sample.prompt, text, spans, bos)
        words = [text[start:stop] for start, stop in spans]
        return both.ids, both.start, [(word, *span) for word, span in zip(words, both.references, strict=True)]

    def text(self, ids: list[int]) -> str:
        """Text of generated tokens, without special ones."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _special_tokens(folder: Path) -> tuple[int | None, bool, frozenset[int]]:
    """BOS id, whether the tokenizer puts it before a text, EOS ids. A bare tokenizer.json names neither."""
    if not (folder / "tokenizer_config.json").is_file():
        return None, False, frozenset()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return bos, bos is not None and tokenizer("a").input_ids[:1] == [bos], frozenset(() if eos is None else (eos,))


def forced_score(nlls: list[float], greedy: list[bool], start: int, references: list[tuple[str, int, int]]) -> Forced:
    """Scores of a gold answer from its tokens' own.

    Args:
        nlls: nats, of each answer token.
        greedy: whether each is the model's first choice.
        start: the answer's first token, counted as the references' spans are.
    """

    def over(first: int, last: int) -> dict:
        return {
            "nll": sum(nlls[first:last]) / (last - first),
            "greedy_exact": all(greedy[first:last]),
            "tokens": last - first,
        }

    each = tuple({"reference": word, **over(a - start, b - start)} for word, a, b in references)
    return Forced(**over(0, len(nlls)), references=each if len(each) > 1 else ())
