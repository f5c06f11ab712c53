"""Counting by pieces equals the tokenizer, token for token, for every rule that is taken as known."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from megatron_rpsd.ruler.counting import TokenCounter, token_spans
from megatron_rpsd.ruler.pieces import piece_rule

WRITTEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = (
    "The grass is green, isn't it? They'll say 1,234 things; we've said 20 (twenty).\n\nOne of the special magic "
    "numbers for well-to-do-zoo is: 8301447.\nDocument 12:\nCafé — “naïve” 10² müde straße\tein\n   two  three.\n"
)


def _written(number: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(WRITTEN % number), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
RULES = {
    "gpt2": GPT2,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "llama3": _written("{1,3}"),
    "qwen": _written(""),
    "whitespace": pre_tokenizers.Whitespace(),
}


def make_tokenizer(rule: str) -> Tokenizer:
    if rule == "whitespace":
        tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = RULES[rule]
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = RULES[rule]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    if rule == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    if rule == "llama3":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    return tokenizer


@pytest.fixture(scope="module", params=RULES)
def counter(request, tmp_path_factory: pytest.TempPathFactory) -> TokenCounter:
    folder = tmp_path_factory.mktemp(request.param)
    make_tokenizer(request.param).save(str(folder / "tokenizer.json"))
    counter = TokenCounter(folder)
    assert counter.pieces is not None
    return counter


def messy(stream: random.Random, size: int, foreign: bool) -> str:
    """Words, digits, marks and all kinds of blanks, in an order that no template has."""
    stock = ["word", "The", "a", "12", "7", "2025", "'s", "'LL", "'", ".", "...", "-", "_", '"', "(", ":", "/", "\x1c"]
    stock += ["One of the special magic numbers for", "The grass is green. The sky is blue. The sun"]
    stock += [" ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", " \n", "\n ", "\x0b", "<|", "<|start|>", "<|end|>"]
    if foreign:
        stock += [
            "é",
            "straße",
            "—",
            "“a”",
            "²",
            "Ⅷ",
            "漢字",
            "\xa0",
            "\u200b",
            "\u3000",
            "e\u0301",
            "\u0301",
            "😀",
            "ſ",
        ]
    return "".join(stream.choice(stock) for _ in range(size))


@pytest.mark.parametrize("foreign", [False, True])
def test_counts_and_spans_of_messy_texts(counter: TokenCounter, foreign: bool) -> None:
    stream, whole = random.Random(3), 0
    for size in [2, 3, 5, 9, 30, 200] * 100:
        text = messy(stream, size, foreign)
        pieces = counter.pieces.split(text)
        whole += pieces is None
        if pieces is not None:
            assert "".join(pieces) == text
        encoding = counter._tokenizer.encode(text, add_special_tokens=False)
        assert counter.count(text) == len(encoding) == counter.whole(text), repr(text)
        visible = [place for place, character in enumerate(text) if not character.isspace()]
        if visible and len(encoding):
            starts = [stream.choice(visible) for _ in range(6)]
            spans = [(start, stream.choice([place for place in visible if place >= start]) + 1) for start in starts]
            tokens = counter.measure([text])[0]
            assert tokens.spans(spans) == token_spans(encoding, spans), repr(text)
            for start in [*starts, len(text)]:
                assert tokens.before(start) == counter.whole(text[:start]), repr(text[:start])
    assert (0 < whole < 400) if foreign else whole == 0


def test_prompts_are_counted_by_pieces(counter: TokenCounter) -> None:
    assert counter.pieces.split(TEXT) is not None and counter.agree(TEXT * 20)


def test_what_is_not_known_is_counted_whole(tmp_path: Path) -> None:
    def rule(**changed: object):
        tokenizer = make_tokenizer("gpt2")
        for name, value in changed.items():
            setattr(tokenizer, name, value)
        return piece_rule(json.loads(tokenizer.to_str()))

    assert rule() is not None
    assert rule(pre_tokenizer=pre_tokenizers.Metaspace()) is None
    assert rule(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)) is None
    assert rule(normalizer=normalizers.Lowercase()) is None
    assert rule(model=models.Unigram([("a", 0.0)])) is None
    assert rule(model=models.BPE(dropout=0.1)) is None
    greedy = make_tokenizer("gpt2")
    greedy.add_special_tokens([AddedToken("<|x|>", lstrip=True)])
    assert piece_rule(json.loads(greedy.to_str())) is None
    (tmp_path / "tokenizer.json").write_text(greedy.to_str())
    assert TokenCounter(tmp_path).count(TEXT) == len(greedy.encode(TEXT, add_special_tokens=False))
