"""Conversations prepared for --sft: counted, packed with their borders, the same bytes however often killed."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import megatron_rpsd.data.conversations as conversations
import megatron_rpsd.data.tokenization as tokenization
from megatron_rpsd.data.chat import ChatEncoder, ConversationFile
from megatron_rpsd.data.conversations import prepare_conversations
from tests.chat_tokenizer import assistant, save_chat_tokenizer, system, user, write_chats
from tests.unit.data.hard_death import contents, die_at

L = 140
CHATS = (
    [[system("s"), user("a" * n), assistant("b")] for n in (5, 60, 7, 9)]
    + [[user("q" * n), assistant("r")] for n in (1, 2)]
    + [[user("what is <e>?"), assistant("<e> ends")]]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    save_chat_tokenizer(folder / "tokenizer")
    write_chats(folder / "in.jsonl", CHATS[:5])
    with (folder / "in.jsonl").open("a") as file:
        file.write('\n{"messages": []}\n')
    packed = {"messages": CHATS[5] + CHATS[6], "starts": [0, 2]}
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(json.dumps(packed).encode(), mtime=0))
    return folder


def prepare(folder: Path, prefix: Path, **changed) -> str:
    given = {"tokenizer": folder / "tokenizer", "output_prefix": prefix, "seq_length": L, "on_error": "skip"}
    return prepare_conversations([folder / "in.jsonl", folder / "more.jsonl.gz"], {**given, **changed})


def test_conversations_are_checked_counted_and_packed(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"in\.jsonl:7 has no"):
        prepare(folder, tmp_path / "out", on_error="stop")
    assert not list(tmp_path.iterdir())
    said = prepare(folder, tmp_path / "out")
    about = json.loads((tmp_path / "out.json").read_text())
    packed = ConversationFile(tmp_path / "out.jsonl")
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    read = [part for line in range(len(packed)) for part in packed[line]]
    assert sorted(map(json.dumps, read)) == sorted(map(json.dumps, CHATS))  # whole, each by itself, none twice
    encoded = [encoder.encode(chat, "") for chat in CHATS]
    lengths = [len(encoder.encode_line(packed[line], "")[0]) for line in range(len(packed))]
    assert max(lengths) <= L + 1 and sum(lengths) == about["tokens"] == sum(len(ids) for ids, _ in encoded)
    assert about["assistant_tokens"] == sum(sum(mask) for _, mask in encoded)
    assert about["conversations"] == 7 and about["windows"] == len(packed) == 3
    assert (
        about["blank_lines"] == 1
        and about["special_tokens"] == 2
        and len(about["skipped"]) == 1
        and "1 lines were skipped" in said
    )
    assert len(about["inputs"]) == 2 and {path.name for path in tmp_path.iterdir()} == {"out.json", "out.jsonl"}


def test_a_short_window_loses_ends_and_counts_them(folder, tmp_path) -> None:
    prepare(folder, tmp_path / "out", seq_length=30)
    about = json.loads((tmp_path / "out.json").read_text())
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    masks = [encoder.encode(chat, "")[1] for chat in CHATS]
    assert about["longer"] == sum(len(mask) > 31 for mask in masks) and about["windows"] == 7
    assert about["lost"] == sum(not any(mask[1:31]) for mask in masks) and 0 < about["lost"] < 7


def test_few_conversations_in_memory_change_no_conversation(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(conversations, "_TOGETHER", 2)
    prepare(folder, tmp_path / "out")
    packed = ConversationFile(tmp_path / "out.jsonl")
    read = [part for line in range(len(packed)) for part in packed[line]]
    assert sorted(map(json.dumps, read)) == sorted(map(json.dumps, CHATS))


def test_killed_at_many_writes_and_run_again_the_bytes_are_the_same(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tokenization, "BATCH_BYTES", 150)  # several shards
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a killed process does not take the disk with it
    spec = conversations.chat_spec(folder / "tokenizer")
    monkeypatch.setattr(conversations, "chat_spec", lambda path: spec)

    def run() -> None:
        prepare(folder, tmp_path / "out", shard_tokens=1)

    run()
    untouched = contents(tmp_path / "out")
    killed = 0
    while die_at(5 * killed, run):
        killed += 1
        run()
        assert contents(tmp_path / "out") == untouched, f"killed at write {killed}"
        assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out.jsonl"}
    assert killed > 6


def test_what_is_no_conversation_file_is_refused(folder, tmp_path) -> None:
    given = {"tokenizer": folder / "tokenizer", "output_prefix": tmp_path / "out", "seq_length": L}
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for inputs, changed, words in (
        ([], {}, "names no file"),
        ([tmp_path / "a.json"], {}, r"a\.json: --mode sft reads \.jsonl"),
        ([tmp_path / "none.jsonl"], {}, r"none\.jsonl does not exist"),
        ([tmp_path / "blank.jsonl"], {}, "no conversation is left; 0 lines were skipped"),
        ([folder / "in.jsonl"], {"tokenizer": tmp_path}, "holds no tokenizer.json"),
        ([folder / "in.jsonl"], {"seq_length": 0}, "--seq-length 0"),
    ):
        with pytest.raises(ValueError, match=words):
            prepare_conversations(inputs, {**given, **changed})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "blank.jsonl"}
