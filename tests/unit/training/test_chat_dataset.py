"""Samples of conversations: shifted labels, masks, truncation, padding, and an order for every epoch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.utils import Split
from transformers import AutoTokenizer

from megatron_rpsd.data.chat import ConversationFile
from megatron_rpsd.training.chat_dataset import ConversationDataset
from tests.chat_tokenizer import PLAIN, assistant, save_chat_tokenizer, system, user, write_chats

L = 40
LINES = [
    [user("a"), assistant("bc")],  # <s>user\na<e>\n<s>assistant\nbc<e>\n: 9 + 11 + 4 tokens
    [user("a"), assistant("b" * 50)],  # cut in the answer
    [user("a" * 60), assistant("b")],  # cut before the answer
    [user("a"), assistant("b"), user("c"), assistant("d")],  # cut between the answers
    [user("a"), assistant("b" * 20)],  # 9 + 11 + 21 = L + 1 tokens, then a line's end
]


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(save_chat_tokenizer(tmp_path / "tokenizer", PLAIN))


@pytest.fixture
def build(tokenizer, tmp_path):
    config = SimpleNamespace(
        tokenizer=SimpleNamespace(_tokenizer=SimpleNamespace(tokenizer=tokenizer), unique_identifiers={}),
        sequence_length=L, random_seed=3, split="100,0,0", split_matrix=None, allow_ambiguous_pad_tokens=False,
        eod_mask_loss=False,
    )  # fmt: skip

    def of(lines=LINES, num_samples=12, indices=None, seed=3):
        path = write_chats(tmp_path / "chats.jsonl", lines)
        chosen = np.arange(len(lines)) if indices is None else np.array(indices, dtype=int)
        config.random_seed = seed
        return ConversationDataset(ConversationFile(path), str(path), chosen, num_samples, Split.train, config)

    return of


def by_line(dataset) -> dict[int, dict]:
    return {dataset._line(index): dataset[index] for index in range(5)}


def test_a_sample_is_a_line_with_its_next_tokens_and_a_mask_over_them(build, tokenizer):
    samples = by_line(build())
    assert set(samples) == set(range(5))
    for sample in samples.values():
        assert {name: (value.dtype, value.shape) for name, value in sample.items()} == {
            "tokens": (torch.int64, (L,)), "labels": (torch.int64, (L,)), "loss_mask": (torch.float32, (L,)),
            "document_ids": (torch.int64, (L,)),
        }  # fmt: skip
        assert sample["labels"].min() >= 0 and sample["labels"].max() < len(tokenizer)
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    kept = {line: sample["labels"][sample["loss_mask"] == 1] for line, sample in samples.items()}
    assert {line: tokenizer.decode(labels) for line, labels in kept.items()} == {
        0: "bc<e>", 1: "b" * 21, 2: "", 3: "b<e>", 4: "b" * 20 + "<e>",
    }  # fmt: skip
    assert tokenizer.decode(samples[0]["tokens"][:24]) == "<s>user\na<e>\n<s>assistant\nbc<e>\n"
    assert (samples[0]["tokens"][24:] == tokenizer.pad_token_id).all()
    assert tokenizer.decode(samples[1]["tokens"]) == "<s>user\na<e>\n<s>assistant\n" + "b" * 20  # the left is kept


TWO = [user("b"), system("x"), assistant("c")]  # <s>user\nb<e>\n, <s>system\nx<e>\n<s>assistant\nc<e>\n: 9, 11 + 14


def test_conversations_and_padding_are_documents(build, tokenizer):
    sample = build([TWO])[0]
    assert tokenizer.decode(sample["tokens"][9:]).startswith("<s>system")
    assert sample["document_ids"].tolist() == [0] * 9 + [1] * 25 + [-1] * (L - 34)


def test_a_conversations_last_token_does_not_learn_the_next_ones_first(build):
    dataset = build([TWO])
    encode = dataset.encoder.encode
    dataset.encoder.encode = lambda *given: (encode(*given)[0], [1] * len(encode(*given)[0]))  # a template's whim
    free = dataset[0]["loss_mask"].tolist()
    dataset.config.eod_mask_loss = True
    masked = dataset[0]["loss_mask"].tolist()
    assert free == [1] * 33 + [0] * (L - 33) and masked == [1] * 8 + [0] + [1] * 24 + [0] * (L - 33)


def test_a_line_that_teaches_nothing_is_reported_once(build, capsys):
    dataset = build()
    for index in range(10):
        dataset[index]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "chats.jsonl:3: all assistant tokens of its 82 lie beyond --seq-length 40" in said[0]


def test_reports_thin_out(build, capsys):
    dataset = build([[user("a" * 60), assistant("b")]] * 9, num_samples=18)
    for index in range(18):
        dataset[index]
    assert [line.split("(line ")[1].split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "4", "8"]


def test_epochs_have_orders_of_their_own_from_the_seed(build):
    lines = [[user("a"), assistant(letter)] for letter in "bcdefghijk"]
    dataset = build(lines, num_samples=30)
    epochs = [[dataset._line(index) for index in range(start, start + 10)] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = build(lines, num_samples=30)
    assert [again._line(index) for index in range(29, -1, -1)] == sum(epochs, [])[::-1]  # a resumed run starts anywhere
    assert [build(lines, seed=4)._line(index) for index in range(10)] != epochs[0]


def test_a_split_reads_its_own_lines(build):
    dataset = build(indices=[1, 4], num_samples=None)
    assert len(dataset) == 2 and {dataset._line(index) for index in range(2)} == {1, 4}
    with pytest.raises(ValueError, match="--split 100,0,0 of the 5 lines of .* leaves none for train"):
        build(indices=[], num_samples=3)
