"""Tokens of prompts: the counted ones, and never two BOS."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from tests.ruler_prompts import BOS, save_tokenizer
from tests.unit.evaluation.questions import question, with_prompt


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def adding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("adding"), adds_bos=True)


@pytest.mark.parametrize(
    ("kind", "bos", "wanted"),
    [("plain", "auto", 0), ("plain", "add", 1), ("plain", "none", 0), ("adding", "auto", 1), ("adding", "add", 1),
     ("adding", "none", 0)],
)  # fmt: skip
def test_bos(plain: Path, adding: Path, kind: str, bos: str, wanted: int) -> None:
    tokens = PromptTokens(plain if kind == "plain" else adding, bos)
    sample = question(0, tokens)
    bare = tokens.counter.encode([sample.prompt])[0].ids
    assert tokens.bos_id == 0 and 0 not in bare and len(bare) == sample.prompt_tokens
    assert tokens.prompt_ids(sample) == [0] * wanted + bare
    ids, start, _ = tokens.answer_ids(sample)
    assert list(ids[:start]) == tokens.prompt_ids(sample)
    templated = with_prompt(sample, BOS + sample.prompt, tokens)
    assert tokens.begins_with_bos(templated.prompt) and tokens.prompt_ids(templated) == [0, *bare]
    ids, start, _ = tokens.answer_ids(templated)
    assert list(ids[:start]) == [0, *bare]


def test_what_cannot_be(plain: Path, tmp_path: Path) -> None:
    tokens = PromptTokens(plain)
    wrong = question(0, tokens)
    with pytest.raises(ValueError, match=f"has {wrong.prompt_tokens} tokens by .*, {wrong.prompt_tokens + 1} by its"):
        tokens.prompt_ids(replace(wrong, prompt_tokens=wrong.prompt_tokens + 1))
    (tmp_path / "tokenizer.json").write_bytes((plain / "tokenizer.json").read_bytes())
    bare = PromptTokens(tmp_path)
    assert bare.bos_id is None and bare.eos_ids == frozenset() and not bare.adds_bos("x")
    with pytest.raises(ValueError, match="--bos add: .* names no BOS"):
        PromptTokens(tmp_path, "add")


def test_vt_answers_behind_the_blank(plain: Path) -> None:
    tokens = PromptTokens(plain)
    names = ("ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY")
    chain = with_prompt(replace(question(), task="vt", outputs=names), "5 variables are assigned: ", tokens)
    ids, start, references = tokens.answer_ids(chain)
    assert tokens.text(list(ids[start:])) == " " + " ".join(names)
    for name, (word, first, last) in zip(names, references, strict=True):
        assert word == name and tokens.text(list(ids[first:last])).strip() == name
