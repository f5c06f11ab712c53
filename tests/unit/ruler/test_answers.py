"""Gold answers as text and as tokens behind their prompts."""

from __future__ import annotations

import re

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megatron_rpsd.ruler.answers import bos_of_tokenizer, forced_tokens, gold_answer
from megatron_rpsd.ruler.counting import TokenCounter
from megatron_rpsd.ruler.tasks import RULER_TASKS
from tests.ruler_prompts import lines, make_prompts, save_tokenizer

WRITTEN = {
    "niah_single_1": (["123"], " 123"),
    "niah_multiquery@grid": (["1", "2", "3", "4"], " 1, 2, 3, and 4"),
    "niah_multivalue": (["1", "2"], " 1 and 2"),
    "vt": (["ABCDE", "FGHIJ"], " ABCDE FGHIJ"),
    "cwe": (["one", "two", "ten"], " 1. one 2. two 3. ten"),
    "fwe@synthetic": (["aaa", "bbb", "ccc"], " aaa, bbb, and ccc"),
    "qa_1@shuffle": (["Denver", "in Denver"], " Denver"),
}


@pytest.mark.parametrize("task", WRITTEN)
def test_answers_as_written(task):
    outputs, expected = WRITTEN[task]
    text, spans = gold_answer(task, outputs)
    assert text == expected
    assert [text[start:stop] for start, stop in spans] == (outputs[:1] if "qa" in task else outputs)


def test_every_task_has_one_and_others_are_refused():
    for task in RULER_TASKS:
        assert gold_answer(task, ["a", "b"])[0].startswith(" ")
    with pytest.raises(ValueError, match="niah_single_4 is none of RULER's tasks"):
        gold_answer("niah_single_4", ["a"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_vts_answer_is_that_of_its_solved_example(tokenizer, tmp_path):
    (record,) = lines(make_prompts(tmp_path, tokenizer, "vt", 1000, 1))
    solved = re.match(r".*?they are: ( [A-Z ]+)\n", record["input"], re.DOTALL)[1]
    assert gold_answer("vt", solved.split())[0] == solved


@pytest.mark.parametrize("task, length", [("niah_multikey_2", 700), ("vt", 1000)])
def test_answer_tokens_follow_the_prompts_own(task, length, tokenizer, tmp_path):
    path, counter = make_prompts(tmp_path, tokenizer, task, length, 2), TokenCounter(tokenizer)
    whole = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    for record, where in zip(lines(path), lines(path.with_suffix(".evidence.jsonl")), strict=True):
        prompt = record["input"] + record["answer_prefix"]
        text, spans = gold_answer(task, record["outputs"])
        both = forced_tokens(counter, "x", prompt, text, spans)
        assert both.start == where["prompt_tokens"]
        assert list(both.ids[: both.start]) == whole.encode(prompt).ids
        assert whole.decode(both.ids[both.start :]) == text
        for (start, stop), word in zip(both.references, record["outputs"], strict=True):
            assert whole.decode(both.ids[start:stop]).strip(" ,") == word
        with_bos = forced_tokens(counter, "x", prompt, text, spans, bos_id=0)
        assert with_bos.ids == (0, *both.ids) and with_bos.start == both.start + 1
        assert with_bos.references == tuple((a + 1, b + 1) for a, b in both.references)


def test_a_prompt_that_begins_with_the_bos_gets_no_second_one(tokenizer):
    counter = TokenCounter(tokenizer)
    assert forced_tokens(counter, "x", "<s>Some text", " 1", [(1, 2)], bos_id=0).ids.count(0) == 1


def test_an_answer_that_changes_the_prompts_tokens_is_refused(tmp_path):
    joined = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    joined.pre_tokenizer = pre_tokenizers.Split(Regex(r" +|\w+"), "isolated")  # a run of blanks is one token
    joined.save(str(tmp_path / "tokenizer.json"))
    counter = TokenCounter(tmp_path)
    with pytest.raises(ValueError, match="sample 3: with its answer ' ABC' behind it the prompt's last token changes"):
        forced_tokens(counter, "sample 3", "they are: ", " ABC", [(1, 4)])
    assert forced_tokens(counter, "sample 3", "they are:", " ABC", [(1, 4)]).start > 0


def test_the_bos_is_the_one_that_the_tokenizer_itself_puts_before_a_text(tokenizer, tmp_path):
    assert bos_of_tokenizer(tokenizer) is None
    assert bos_of_tokenizer(save_tokenizer(tmp_path / "bos", adds_bos=True)) == 0
    (tmp_path / "bos" / "tokenizer_config.json").unlink()
    assert bos_of_tokenizer(tmp_path / "bos") is None
