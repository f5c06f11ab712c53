"""Where the evidence is said to stand is where it stands, in characters and in tokens."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_rpsd.ruler.counting import TokenCounter, token_spans
from megatron_rpsd.ruler.generate import Recipe, generate
from megatron_rpsd.ruler.sources import Sources
from megatron_rpsd.ruler.tasks import find_task


def held(name: str, counter: TokenCounter, length: int = 4096, sources=None) -> list[tuple[str, str, list[str]]]:
    """(prompt, reference, texts of its evidence) of 6 samples; the tokens' text is the characters' text."""
    found = []
    for number, (fields, where) in enumerate(
        generate(Recipe(find_task(name), length, 6), counter, sources or Sources(None))
    ):
        text = fields["input"] + fields["answer_prefix"]
        encoding = counter.encode([text])[0]
        assert where["sample"] == number and where["prompt_tokens"] == len(encoding)
        assert where["prompt_tokens"] + find_task(name).generated_tokens == fields["length"] <= length
        assert [entry["reference"] for entry in where["evidence"]] == fields["outputs"]
        for entry in where["evidence"]:
            texts = [text[start:stop] for start, stop in entry["characters"]]
            for span, (first, last) in zip(entry["characters"], entry["tokens"], strict=True):
                starts, stops = zip(*encoding.offsets[first:last], strict=True)
                assert (starts[0], stops[-1]) == tuple(span)
            found.append((text, entry["reference"], texts))
    return found


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_a_needle_holds_its_value_and_its_key(name: str, ws) -> None:
    for text, reference, (needle,) in held(name, ws):
        key = re.search(r"What is the special magic \w+ for (\S+) mentioned", text).group(1)
        assert needle.startswith("One of the special magic") and needle.endswith(f" for {key} is: {reference}.")


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_multiquery", "niah_single_3"])
def test_needles_in_an_essay(name: str, ws) -> None:
    essay = "It was a long day. Nobody spoke of it again.".split() * 300
    for text, reference, (needle,) in held(name, ws, sources=SimpleNamespace(essay_words=essay)):
        assert re.fullmatch(rf"One of the special magic \w+ for \S+ is: {reference}\.", needle)
        assert text.count(needle) == 1


def test_a_chains_links(ws) -> None:
    samples = held("vt", ws)
    for first in range(0, len(samples), 5):
        names = [reference for _, reference, _ in samples[first : first + 5]]
        (opening,), *links = [texts for _, _, texts in samples[first : first + 5]]
        assert re.fullmatch(rf"VAR {names[0]} = \d{{5}}", opening)
        assert links == [[f"VAR {new} = VAR {old}"] for old, new in zip(names, names[1:], strict=False)]


def test_every_place_of_a_common_word(ws) -> None:
    for text, reference, texts in held("cwe", ws):
        assert texts == [reference] * 30
        main = text[text.rindex("Below is a numbered list") :]
        assert len(re.findall(rf"(?<=\d\. ){re.escape(reference)}(?= \d+\. |\n)", main)) == 30


def test_first_and_last_place_of_a_frequent_word(ws) -> None:
    for fields, where in generate(Recipe(find_task("fwe"), 4096, 3), ws, Sources(None)):
        for entry in where["evidence"]:
            places = [match.span() for match in re.finditer(rf"\b{entry['reference']}\b", fields["input"])]
            assert entry["occurrences"] == len(places) > 2
            assert [tuple(span) for span in entry["characters"]] == [places[0], places[-1]]
    assert {texts == [reference] * 2 for _, reference, texts in held("fwe", ws)} == {True}


def test_documents(ws) -> None:
    paragraphs = [f"Paragraph {n} says that number {n} is {n * 37} and no more than that." for n in range(30)]
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": paragraph,
                        "qas": [{"question": "?", "answers": [{"text": str(n * 37)}], "is_impossible": False}],
                    }
                ]
            }
            for n, paragraph in enumerate(paragraphs)
        ]
    }
    short = held("qa_1", ws, 450, SimpleNamespace(squad=squad))
    assert [texts for _, _, texts in short] == [[paragraphs[n]] for n in range(6)]
    # With more room than documents they repeat, and so does the evidence.
    for text, reference, texts in held("qa_1", ws, 1500, SimpleNamespace(squad=squad)):
        assert len(texts) == text.count(f" is {reference} and") >= 2 and len(set(texts)) == 1


def test_supporting_documents_alone(ws) -> None:
    item = {
        "question": "Which?",
        "answer": "yes",
        "context": [[f"T{n}", [f"First of {n}. ", f"Second of {n}."]] for n in range(10)],
        "supporting_facts": [["T2", 0], ["T8", 1], ["T8", 0]],
    }
    more = [item | {"context": [[f"U{m}{n}", ["Other text."]] for n in range(10)]} for m in range(5)]
    _, _, texts = held("qa_2", ws, 400, SimpleNamespace(hotpotqa=[item, *more], first_hotpotqa_item=lambda: item))[0]
    assert sorted(texts) == [f"T{n}\nFirst of {n}. Second of {n}." for n in (2, 8)]


def test_token_spans_cover_parts_of_tokens(tmp_path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoding = TokenCounter(tmp_path).encode(["alpha beta gamma"])[0]
    assert token_spans(encoding, [(0, 5), (2, 3), (4, 7), (5, 6), (6, 16)]) == [(0, 1), (0, 1), (0, 2), (1, 1), (1, 3)]
