"""Edition 2024-12 against what NVIDIA's own package writes, and where it is unlike 2025-07."""

from __future__ import annotations

import hashlib
import json
import random
import re
from types import SimpleNamespace

import pytest

from megatron_rpsd.ruler.edition_2024 import EarlyChains
from megatron_rpsd.ruler.generate import Recipe, generate
from megatron_rpsd.ruler.prompts import Draws
from megatron_rpsd.ruler.sources import Sources
from megatron_rpsd.ruler.tasks import RULER_TASKS, find_task

# 10 samples at 4096 tokens, seed 42, with the tokenizer `ws`: validation.jsonl as written by the scripts of
# nvidia-long-context-eval 26.3 (data/prepare.py, --tokenizer_type hf, base template) with NLTK 3.10.4.
PACKAGE = {
    "niah_single_1": "8b9c1ecaa94aa05143bfdab013cbddc83d8f34597a066afd6c3620ef0241b69e",
    "niah_single_2": "7b9b1375be032498fb6730d9dac1a68291ccf6cf6ffaac6666fb65692f4a844f",
    "niah_single_3": "e82cec10e7ee5471d123f22f712909929008a593502d13b668bfee349e6c0c53",
    "niah_multikey_1": "4fb643edf53c101f40348a5c9e225cd5f8bf900e77a0ea1d899a88b58552eb85",
    "niah_multikey_2": "8a0c18d126993e6aa69c22c611464e6dee011eaee4544f1447a710e88f4f2fc1",
    "niah_multikey_3": "cc011a58e157650d1a71a4e2b4c0a27b15ca0de1a507c6557539062281125162",
    "niah_multivalue": "87f3ad3d75c0a3e315700f9d33fcfbe200c698b5123ee54ef7dd5deaaf129d12",
    "niah_multiquery": "e9524c7cd33898d4a2c47d8fafdac318bc7ed830dab1de8a5c209fae6df66cfe",
    "vt": "f65252c0132196f514e051e94d63b60cba27e587e3ca7fce26b920ea11db1549",
    "cwe": "5fcb1829ba1f81c6526bf9cae2ed8184af3c9974787ad5a06386fcc00968fbe2",
    "fwe": "979269068effbad5155d1e7dc14f72e4eb55f5ef9e15ff8a9b5565800db5fca6",
    "qa_1": "68c24daad32db9598872103e87b5efee3ad722e1e56f72c8d1ea005d809f780b",
    "qa_2": "017006ed723a15bf77e52f169d74d5e6e75813c611789e6743a0acb5a28f96b1",
}


def early(name: str, counter, sources, length: int = 4096, number: int = 10) -> list[tuple[dict, dict]]:
    return list(generate(Recipe(find_task(name), length, number, edition="2024-12"), counter, sources))


@pytest.mark.parametrize("name", RULER_TASKS)
def test_equals_the_package(name: str, ws, request) -> None:
    reads = RULER_TASKS[name].source in ("essay", "squad", "hotpotqa")
    made = early(name, ws, request.getfixturevalue("rulers_texts") if reads else Sources(None))
    lines = "".join(json.dumps(fields) + "\n" for fields, _ in made)
    assert hashlib.sha256(lines.encode()).hexdigest() == PACKAGE[name]
    for number, (fields, where) in enumerate(made):
        assert list(fields) == ["index", "input", "outputs", "length"] and fields["index"] == where["sample"] == number
        assert where["id"].startswith(f"2024-12/{name}/4096/42/")
        encoding = ws.encode([fields["input"]])[0]
        assert where["prompt_tokens"] == len(encoding)
        for entry in where["evidence"]:
            for (start, stop), (first, last) in zip(entry["characters"], entry["tokens"], strict=True):
                assert (encoding.offsets[first][0], encoding.offsets[last - 1][1]) == (start, stop)
                held = fields["input"][start:stop]
                assert name.startswith("qa") or entry["reference"] in held


def test_vts_links_stand_in_the_main_text(ws) -> None:
    for fields, where in early("vt", ws, Sources(None), number=3):
        main = fields["input"].rindex("Memorize and track")
        assert fields["input"].startswith(" Memorize") and "are assgined the value" in fields["input"]
        spans = [fields["input"][start:stop] for e in where["evidence"] for start, stop in e["characters"]]
        assert all(start > main for e in where["evidence"] for start, _ in e["characters"])
        assert spans[0].startswith(f"VAR {fields['outputs'][0]} = ")
        assert spans[1:] == [
            f"VAR {new} = VAR {old}" for old, new in zip(fields["outputs"], fields["outputs"][1:], strict=False)
        ]


def test_a_chain_among_few_sentences() -> None:
    """With five lines they are cut into sentences, and the blank before each line's end goes."""
    draws = Draws(3)
    for _ in range(20):
        prompt = EarlyChains(find_task("vt"), 500, draws, None, 0).probe(5, None)
        assert ". \n" not in prompt.text and prompt.text.count("There and back again.") == 5
        assert re.findall(r"VAR [A-Z]{3} = (?:\d{5}|VAR [A-Z]{3})", prompt.text) == [
            prompt.text[start:stop] for ((start, stop),) in prompt.evidence
        ]


def squad_of(paragraphs: list[str]) -> SimpleNamespace:
    articles = [
        {
            "paragraphs": [
                {"context": text, "qas": [{"question": "?", "answers": [{"text": "x"}], "is_impossible": False}]}
            ]
        }
        for text in paragraphs
    ]
    return SimpleNamespace(squad={"data": articles})


def test_a_prompt_of_all_documents_shuffles_them_for_good(ws) -> None:
    paragraphs = [f"Paragraph {number:02d} and nothing else." for number in range(24)]
    made = early("qa_1", ws, squad_of(paragraphs), 4096, 4)
    order = sorted(paragraphs)
    for number, (fields, where) in enumerate(made):
        random.Random(42).shuffle(order)
        # 10, 20 and 24 documents are probed or sampled; the last are all there are.
        assert re.findall(r"Paragraph \d\d and nothing else\.", fields["input"]) == order
        (entry,) = where["evidence"]
        ((start, stop),) = entry["characters"]
        assert fields["input"][start:stop] == paragraphs[number]


def test_a_length_that_fits_nothing(ws) -> None:
    for name in ("niah_single_1", "niah_multikey_2", "cwe", "vt"):
        with pytest.raises(ValueError, match="--length 200 cannot hold"):
            early(name, ws, Sources(None), 200, 1)
