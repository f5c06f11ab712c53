"""Chat templates: around the task, counted, the same evidence, and base prompts untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rpsd.ruler.counting import TokenCounter
from megatron_rpsd.ruler.generate import Recipe, generate, write_prompts
from megatron_rpsd.ruler.sources import Sources
from megatron_rpsd.ruler.tasks import NOISE, VT_TEMPLATE, find_task
from megatron_rpsd.ruler.templates import model_template
from tests.chat_tokenizer import PLAIN, save_chat_tokenizer

TASKS = ("niah_multiquery@synthetic", "niah_multikey_2", "vt", "cwe", "fwe", "qa_1@synthetic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of RULER's noise and parts of other words, with the special tokens of the template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([NOISE, VT_TEMPLATE], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<e>")
    saved.chat_template = PLAIN
    saved.save_pretrained(folder := tmp_path_factory.mktemp("chat"))
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_the_task_is_the_users_turn_and_the_prefix_begins_the_answer(name: str, folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(find_task(name), 8192, 2, model_template="chat")
    manifest = write_prompts(recipe, folder, None, tmp_path / "x.jsonl")
    assert manifest["model_template"] == "chat" and manifest["template_has_bos"] is True
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines, places = ((tmp_path / f"x{kind}.jsonl").read_text().splitlines() for kind in ("", ".evidence"))
    for fields, where in zip(map(json.loads, lines), map(json.loads, places), strict=True):
        user = fields["input"].removeprefix("<s>user\n").removesuffix("<e>\n<s>assistant\n")
        turn = [{"role": "user", "content": user}]
        rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert rendered == fields["input"] and fields["answer_prefix"].startswith(find_task(name).prefix[:8])
        text = fields["input"] + fields["answer_prefix"]
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert tokens == where["prompt_tokens"] == fields["length"] - find_task(name).generated_tokens
        assert fields["length"] == fields["length_w_model_temp"] <= 8192 and "/chat/" in where["id"]
        for entry in where["evidence"]:
            for start, stop in entry["characters"]:
                assert text[start:stop].strip() and (name.startswith("qa") or entry["reference"] in text[start:stop])


def test_base_is_untouched(folder: Path, tmp_path: Path) -> None:
    assert model_template("base", tmp_path).wrap("anything", "") == "anything"
    manifest = write_prompts(Recipe(find_task("vt"), 8192, 1), folder, None, tmp_path / "x.jsonl")
    assert (manifest["model_template"], manifest["template_has_bos"]) == ("base", False)
    (fields, _), *_ = generate(Recipe(find_task("vt"), 8192, 1), TokenCounter(folder), Sources(None))
    assert json.loads((tmp_path / "x.jsonl").read_text()) == fields and fields["input"].startswith("Memorize")


def test_templates_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        model_template("chat", save_chat_tokenizer(tmp_path / "none", None))
    deaf = save_chat_tokenizer(tmp_path / "deaf", "{{ '<s>' }}{% if add_generation_prompt %}A:{% endif %}")
    with pytest.raises(ValueError, match="does not show a user's turn"):
        model_template("chat", deaf)
    plain = model_template("chat", save_chat_tokenizer(tmp_path / "other", "User: {{ messages[0].content }}\nA:"))
    assert (plain.head, plain.tail, plain.has_bos) == ("User: ", "\nA:", False)
