"""Instruction data through the training entry: the loss over the assistant's tokens, against transformers in fp64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_rpsd.checkpoint.convert import import_hf
from megatron_rpsd.positions import StepShape, ViewSampler, keyed_generator
from tests.chat_tokenizer import MARKED, PLAIN, assistant, save_chat_tokenizer, system, user, write_chats
from tests.distributed import training_job
from tests.distributed.corpus import run_arguments
from tests.distributed.models import reference
from tests.distributed.test_gradients import CP2
from tests.distributed.test_training import scalars

L = 64
CHATS = [
    [user("2+2?"), assistant("4")],
    [system("be kind"), user("hi"), assistant("hello you there"), user("bye"), assistant("bye bye")],
    [user("count"), assistant("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17")],
    [user("say nothing of this, it is far too long for the window that is left"), assistant("ok")],
]


@pytest.fixture(scope="module")
def folder(ranks, tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    ranks.run(1, import_hf, tiny_llama, folder / "checkpoint")
    write_chats(folder / "chats.jsonl", CHATS)
    save_chat_tokenizer(folder / "tokenizer", PLAIN)
    return folder


def arguments(folder: Path, *flags: str) -> list[str]:
    base = run_arguments(folder / "checkpoint", folder / "chats.jsonl", 2)
    typed = ["--sft", "--seq-length", str(L), "--rpsd-split-granule", "4", "--rpsd-seed", "9"]
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")]
    return [*base, *typed, *tokenizer, *flags]


def first_step(tmp_path: Path) -> tuple[dict[str, torch.Tensor], list]:
    """Samples of the first step by transformers' own assistant masks, in the order of the dataset, and their views."""
    tokenizer = AutoTokenizer.from_pretrained(save_chat_tokenizer(tmp_path / "marked", MARKED))
    rows = []
    for line in keyed_generator(1234, 0x52505350, 0).permutation(len(CHATS)):
        encoded = tokenizer.apply_chat_template(CHATS[line], return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encoded["input_ids"][: L + 1], encoded["assistant_masks"][: L + 1]
        room = L + 1 - len(ids)
        rows.append((ids + [tokenizer.pad_token_id] * room, mask + [0] * room))
    ids, mask = (torch.tensor(part) for part in zip(*rows, strict=True))
    sampler = ViewSampler(9, "skip", L, granule=4, split_sampling="stratified", step=StepShape(4, 1, 1))
    sample = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask[:, 1:].double()}
    return sample, [sampler.view(index) for index in range(4)]


def test_sft_trains_on_the_assistants_tokens_alone(ranks, folder, tiny_llama, tmp_path):
    output = ranks.run(2, training_job.train, [*arguments(folder, *CP2), "--tensorboard-dir", str(tmp_path / "log")])
    sample, views = first_step(tmp_path)
    assert sample["loss_mask"].sum(dim=1).min() == 0  # one line's answer lies beyond the window
    expected, _ = reference(tiny_llama, sample, views, "rpsd", 1.0)
    assert scalars(tmp_path / "log", "lm loss")[0] == pytest.approx(expected["clm"], rel=1e-5)
    assert expected["kl"] > 0.01 and scalars(tmp_path / "log", "view kl")[0] == pytest.approx(expected["kl"], rel=1e-5)
    unmasked = {**sample, "loss_mask": torch.ones(4, L)}
    assert abs(reference(tiny_llama, unmasked, views, "rpsd", 1.0)[0]["clm"] - expected["clm"]) > 0.01
    assert len(scalars(tmp_path / "log", "lm loss")) == 2 and "view kl" in output[0] + output[1]
    said = [line for line in output[0].splitlines() if line.startswith("sft: ")]
    assert "4 lines; of the first 4, 3 are longer" in said[0] and "1 of them every assistant token" in said[0]
    assert "packed in one line do not see each other" in said[0]
    assert any("chats.jsonl:4: all assistant tokens" in line for line in said[1:])


def test_evaluation_weighs_tokens_not_ranks(ranks, folder, tmp_path):
    """Megatron's own --sft averages the means of context-parallel ranks, of which one may keep no token."""
    evaluation = ["--train-data-path", str(folder / "chats.jsonl"), "--valid-data-path", str(folder / "chats.jsonl")]
    base = arguments(folder, "--eval-iters", "1", "--eval-interval", "1", "--lr", "0")
    start = base.index("--data-path")
    base = [*base[:start], *base[start + 2 :], *evaluation]
    base.remove("100,0,0"), base.remove("--split")
    found = []
    for name, world_size, flags in (("one", 1, []), ("cp2", 2, CP2)):
        log = ["--tensorboard-dir", str(tmp_path / name)]
        ranks.run(world_size, training_job.train, [*base, "--min-lr", "0", *flags, *log])
        found.append(scalars(tmp_path / name, "lm loss validation"))
    assert found[0] and found[1] == pytest.approx(found[0], rel=1e-5)


REFUSED = {
    "no_file": (["--data-path", "none.jsonl"], ["--data-path none.jsonl", "no such file"]),
    "bad_line": (["--data-path", "BAD"], ["bad.jsonl:2", "turn 1", "'robot'"]),
    "tokenizer": (["--tokenizer-type", "NullTokenizer"], ["--tokenizer-type NullTokenizer", "HuggingFaceTokenizer"]),
    "format": (["--sft-tokenizer-prompt-format", "default"], ["--sft-tokenizer-prompt-format default is not read"]),
    "no_template": (["--tokenizer-model", "BARE"], ["--sft: the tokenizer", "has no chat template"]),
    "mix": (["--length-mix", "0.5:64", "0.5:8"], ["--length-mix 0.5:64 0.5:8", "--sft"]),
    "no_sft": ([], ["chats.jsonl is JSONL", "add --sft"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_conversations_are_one_line_and_exit_code_2(case, ranks, folder, tmp_path):
    flags, parts = REFUSED[case]
    bad = tmp_path / "bad.jsonl"
    lines = [CHATS[0], [{"role": "robot", "content": "x"}]]
    bad.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    places = {"BAD": str(bad), "BARE": str(save_chat_tokenizer(tmp_path / "bare", None))}
    typed = arguments(folder, *[places.get(flag, flag) for flag in flags])
    if case == "no_sft":
        typed.remove("--sft")
    code, text = ranks.run(1, training_job.refused, typed)[0]
    assert code == 2 and len(text.splitlines()) == 1, text
    for part in parts:
        assert part in text
