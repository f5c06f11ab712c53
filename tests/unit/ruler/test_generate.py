"""The JSONL of every task, byte for byte: RULER's published hashes, and a second implementation for the others."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megatron_rpsd.ruler import fitting, sources
from megatron_rpsd.ruler.counting import TokenCounter
from megatron_rpsd.ruler.generate import Recipe, generate
from megatron_rpsd.ruler.sources import Sources
from megatron_rpsd.ruler.tasks import RULER_TASKS, find_task
from megatron_rpsd.ruler.words import word_pairs

_spec = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("plain.py"))
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

# 10 samples at 4096 tokens, seed 42, by RULER's own generator.
PUBLIC = {
    "niah_single_1": "fc530e3667b3b4eae2abad29b82fac1b513f8a35349f933b026b1328e9ef1cac",
    "niah_multikey_2": "833b32eb1a5baf2e1fbcd09035e55c65f6aca8361611f417f03c08d9040961dd",
    "niah_multikey_3": "afc6b4d7ce8a3d9ac51e9c31f6bf379d15d99af8d68e74ff5420c2df0351720c",
    "vt": "b0ffaabde127ac8fe3c11dc723cf672fa3879c3ec0aa3d5f711311f1ddb6f63b",
    "cwe": "5da5ea93d390c7d95399a6b4f33190af3718f1db43c681a7f2e77ee1f0f31b71",
    "fwe": "348506d21ba9256a34bfbb60d605338b84247f2c1591964d4263f768eac0dad1",
}
# The same by this library, and no one else's: values to notice a change by. What shows them right is plain.py.
OWN = {
    "niah_single_2": "fa0f16c6fd4768aa23bb08ece524a1107c7a2d9044a550c1d8e2fbf77451dca3",
    "niah_single_3": "1d7fe65aa67019a9a9e9e8d41c34a3ad5f1d0192395fbceef214ca3a4cba7357",
    "niah_multikey_1": "c2a9b161181588019514b69633224c966df1404dd06d80672c75fc6537bcc444",
    "niah_multivalue": "a2c6403bbd26e9cf8c3aeec2d646bad98fecd2dda652cef1d7acfd05377f8412",
    "niah_multiquery": "834ff019081cdc3921e66cf759b78f5cd7f1e859f395f6a8d100b61dca5d4ef8",
    "qa_1": "60d34da648cd2ef3d767b109fe76c198bfda6e51b2a7de1607295008014d096d",
    "qa_2": "dff497df181672af97ec45866f4f5d94785a6f6e735010a8e59c5fb5bcbeea3f",
}
ESSAY = {
    "niah_single_2": ("numbers", 1, 1, 1),
    "niah_single_3": ("uuids", 1, 1, 1),
    "niah_multikey_1": ("numbers", 4, 1, 1),
    "niah_multivalue": ("numbers", 1, 4, 1),
    "niah_multiquery": ("numbers", 4, 1, 4),
}


def jsonl(name: str, counter, sources, length: int = 4096, number: int = 10, batch: int | None = None) -> str:
    made = generate(Recipe(find_task(name), length, number), counter, sources, batch=batch)
    return "".join(json.dumps(fields) + "\n" for fields, _ in made)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def prose(stream: random.Random, words: int) -> str:
    """Sentences that do not all end where a full stop stands."""
    stock = "the old harbour lay quiet until Dr. Marsh came by at 5 p.m. with e.g. two letters (and a map)".split()
    text = " ".join(stream.choice(stock) + ("." if stream.random() < 0.1 else "") for _ in range(words))
    return text.replace(". t", ". T").replace(". o", "! O")


@pytest.fixture(scope="module")
def made_up() -> SimpleNamespace:
    """Texts in the files' layouts: an essay of 1,500 words, 40 paragraphs, 12 questions with 10 documents each."""
    stream = random.Random(7)
    articles = []
    for article in range(8):
        paragraphs = []
        for number in range(5):
            context = f"{article}{number} {{braces}} " + prose(stream, 50)
            qas = [
                {"question": f"Who {article}.{number}?", "answers": [{"text": "Dr. Marsh"}, {"text": "Marsh é"}]},
                {"question": "Who not?", "answers": []},
            ]
            for entry in qas:
                entry["is_impossible"] = not entry["answers"]
            paragraphs.append({"context": context, "qas": qas})
        articles.append({"paragraphs": paragraphs})
    hotpot = []
    for item in range(12):
        context = [[f"Title {item} {n}", [prose(stream, 12) + " ", prose(stream, 9)]] for n in range(10)]
        facts = [[f"Title {item} 3", 0], [f"Title {item} 7", 1]]
        hotpot.append({"question": f"Which {item}?", "answer": "a map", "context": context, "supporting_facts": facts})
    return SimpleNamespace(
        essay_words=prose(stream, 1500).split(" "),
        squad={"data": articles},
        hotpotqa=hotpot,
        first_hotpotqa_item=lambda: hotpot[0],
    )


def expected(name: str, counter, sources, length: int, number: int) -> str:
    if name in ESSAY:
        kind, k, v, q = ESSAY[name]
        pool = word_pairs()
        return plain.niah_essay(sources.essay_words, pool, kind, k, v, q, counter.count, length, number)
    if name == "qa_1":
        items, docs = plain.squad_items(sources.squad), plain.squad_documents(sources.squad)
    else:
        items, docs = plain.hotpot_items(sources.hotpotqa), plain.hotpot_documents(sources.hotpotqa)
    return plain.qa(items, docs, counter.count, length, number)


def test_every_task_has_a_reference() -> None:
    assert set(OWN) == set(ESSAY) | {"qa_1", "qa_2"} and set(PUBLIC) | set(OWN) == set(RULER_TASKS)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_hash(name: str, ws) -> None:
    assert sha256(jsonl(name, ws, Sources(None))) == PUBLIC[name]


@pytest.mark.parametrize("name, length", [*((name, 4096) for name in (*ESSAY, "qa_1", "qa_2")), ("qa_1", 1400)])
def test_equals_the_plain_implementation_on_made_up_texts(name: str, length: int, ws, made_up) -> None:
    assert jsonl(name, ws, made_up, length, 5) == expected(name, ws, made_up, length, 5)


@pytest.mark.parametrize("name", OWN)
def test_equals_the_plain_implementation_on_rulers_texts(name: str, ws, rulers_texts: Sources) -> None:
    made = jsonl(name, ws, rulers_texts)
    assert "".join(made.splitlines(True)[:3]) == expected(name, ws, rulers_texts, 4096, 3)
    assert sha256(made) == OWN[name]


@pytest.mark.parametrize("name", RULER_TASKS)
def test_drawing_ahead_changes_nothing(name: str, pieces, made_up, monkeypatch) -> None:
    length = {"niah_single_1": 5300, "niah_multikey_3": 4400, "vt": 4400, "qa_1": 4200}.get(name, 5000)
    one_by_one = jsonl(name, pieces, made_up, length, 11, batch=1)
    shrunk = []
    real = fitting._shrink
    monkeypatch.setattr(fitting, "_shrink", lambda *given: shrunk.append(1) or real(*given))
    assert jsonl(name, pieces, made_up, length, 11, batch=4) == one_by_one
    assert shrunk, "no sample was refused: going back was not tested"


def test_a_length_that_fits_nothing_is_one_line(ws, made_up) -> None:
    for name, length in (("qa_1", 300), ("niah_single_1", 150), ("vt", 300), ("cwe", 300), ("fwe", 100)):
        with pytest.raises(ValueError, match=f"--length {length} cannot hold a sample of {name}"):
            jsonl(name, ws, made_up, length, 1)


def test_where_rulers_generator_would_never_end(ws, made_up) -> None:
    """qa_2 has ten documents at least; RULER tries three after thirteen, for ever."""
    rows = [dict(item) for item in made_up.hotpotqa]
    rows[1] |= {"context": [[title, [text * 3 for text in texts]] for title, texts in rows[1]["context"]]}
    data = SimpleNamespace(hotpotqa=rows, first_hotpotqa_item=lambda: rows[0])
    made = list(generate(Recipe(find_task("qa_2"), 1050, 3), ws, data))
    counts = [len(re.findall(r"Document \d+:", fields["input"])) for fields, _ in made]
    assert counts == [23, 10, 23]
    assert [where.get("beyond_ruler", False) for _, where in made] == [False, True, False]


def test_a_tokenizer_too_fine_for_vts_example(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="this --tokenizer cannot make vt's solved example of 500 tokens"):
        jsonl("vt", TokenCounter(tmp_path), Sources(None), 4096, 1)


def test_more_samples_than_questions(ws, made_up) -> None:
    with pytest.raises(ValueError, match="qa_2 has 12 questions"):
        jsonl("qa_2", ws, made_up, 4096, 13)


def test_hotpotqa_is_not_read_for_a_length_that_fits_nothing(ws, made_up, tmp_path: Path, monkeypatch) -> None:
    items = [{"context": []} | made_up.hotpotqa[0], *made_up.hotpotqa[1:]]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(items))
    monkeypatch.setattr(sources, "_checked", lambda content, name, where: content)
    given = Sources(tmp_path)
    with pytest.raises(
        ValueError, match="--length 200 cannot hold a sample of qa_2: its smallest prompt, 10 documents"
    ):
        jsonl("qa_2", ws, given, 200, 1)
    assert "hotpotqa" not in vars(given)
    assert jsonl("qa_2", ws, given, 4096, 3) == jsonl("qa_2", ws, made_up, 4096, 3)


def test_rulers_names_need_rulers_texts(ws, monkeypatch) -> None:
    monkeypatch.setattr(sources, "installed_file", lambda name: None)
    for name in OWN:
        with pytest.raises(ValueError, match="--data-dir is not given"):
            jsonl(name, ws, Sources(None), 4096, 1)


@pytest.mark.parametrize("documents, slot", [(31, 29), (101, 72), (770, 602)])
def test_golds_slot_depends_on_the_number_of_documents_alone(documents: int, slot: int) -> None:
    """The slots that RULER's qa_1 has at 4K, 16K and 128K with cl100k."""
    from megatron_rpsd.ruler.prompts import Draws

    order = list(range(documents))
    Draws(42).private_shuffle(order)
    assert order.index(0) + 1 == slot
