"""Conversations prepared for `--sft`: every line checked with the tokenizer's chat template, counted, and packed.

Training reads conversations as text (`training.chat_dataset`), so that the template can change without preparing them
again; what is prepared is JSONL, too. A sample is a line, padded to L tokens; short conversations therefore waste most
of a long window. Packed, a line holds several conversations, best-fit into L + 1 tokens, and says where each begins
("starts", see `data.chat`): they are the sample's documents, with the borders that documents have.

Lengths take nearly all of the time. They go into the shards of `data.tokenization`, three numbers a conversation, from
which an interrupted run goes on; packing depends on them and the input alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rpsd.data.arrangement import best_fit
from megatron_rpsd.data.chat import ChatEncoder, parse_conversations
from megatron_rpsd.data.encoders import TokenizerSpec
from megatron_rpsd.data.encoding import CHAT, LONGEST
from megatron_rpsd.data.preprocess import PreprocessConfig, work_folder
from megatron_rpsd.data.readers import content_suffix, iter_documents
from megatron_rpsd.data.shards import file_sha256, write_durably
from megatron_rpsd.data.tokenization import Source, Tokenized, tokenize

# Conversations that are packed together: as many texts are in memory.
_TOGETHER = 1 << 14
# A shard's numbers are three a conversation; conversations have some hundred tokens.
_TOKENS_A_NUMBER = 256


@dataclass
class Totals:
    """Counts over all conversations."""

    conversations: int = 0
    tokens: int = 0
    assistant_tokens: int = 0
    longer: int = 0
    """than L + 1 tokens: they lose their end in training"""
    lost: int = 0
    """of these, every assistant token"""
    windows: int = 0
    """lines of the output"""

    def add(self, numbers: np.ndarray, window: int) -> None:
        """Counts conversations: tokens, the assistant's, first of these, [n, 3]."""
        self.conversations += len(numbers)
        self.tokens += int(numbers[:, 0].sum())
        self.assistant_tokens += int(numbers[:, 1].sum())
        self.longer += int((numbers[:, 0] > window).sum())
        self.lost += int((numbers[:, 2] >= window).sum())


def chat_spec(folder: Path) -> TokenizerSpec:
    """A tokenizer folder as `tokenize` takes it for conversations.

    Raises:
        ValueError: no tokenizer.json, or no chat template.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"--tokenizer {folder} holds no tokenizer.json: --mode sft needs a chat template")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    template = ChatEncoder(tokenizer).tokenizer.get_chat_template()
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes() + template.encode())
    size = len(tokenizer)
    # Numbers are stored in place of ids, so the largest is that of numbers.
    return TokenizerSpec(CHAT, str(folder), None, size, LONGEST, None, None, digest.hexdigest())


def prepare_conversations(
    inputs: Sequence[Path], settings: Mapping[str, Any], report: Callable[[str], None] = lambda line: None
) -> str:
    """Checks, counts and packs JSONL conversations into P.jsonl, with P.json beside it.

    Args:
        inputs: .jsonl, also under .gz and .zst.
        settings: by the names of `PreprocessConfig`.
        report: called with lines on how the run goes.

    Returns:
        lines on what was found.

    Raises:
        ValueError: the first line that is no conversation, or that the template refuses (with on_error stop).
    """
    if not inputs:
        raise ValueError("--input names no file: --mode sft reads JSONL files of conversations")
    config = PreprocessConfig(**{**settings, "inputs": inputs, "mode": "concatenate"})
    if other := [path for path in inputs if content_suffix(path) != ".jsonl"]:
        raise ValueError(f"--input {other[0]}: --mode sft reads .jsonl, .jsonl.gz and .jsonl.zst")
    spec, target, window = chat_spec(Path(config.tokenizer)), config.output_prefix, config.seq_length + 1
    source = Source(tuple(inputs), "messages", on_error=config.on_error)
    with work_folder(target) as folder:
        numbers = max(1, config.shard_tokens // _TOKENS_A_NUMBER)
        tokenized = tokenize(source, spec, folder / "tokens", config.workers, numbers, report)
        if not sum(shard.documents for shard in tokenized.store.shards):
            shutil.rmtree(folder)
            raise ValueError(
                f"--input {inputs[0]}: no conversation is left; {len(tokenized.faults)} lines were skipped"
            )
        totals = _write(folder / "data.jsonl", _conversations(tokenized, inputs), window)
        about = {
            "format": "conversations",
            "seq_length": config.seq_length,
            **asdict(totals),
            "blank_lines": len(tokenized.empty),
            "special_tokens": sum(shard.special_tokens for shard in tokenized.store.shards),
            "inputs": [asdict(record) for record in tokenized.inputs],
            "sha256": file_sha256(folder / "data.jsonl"),
            "skipped": list(tokenized.faults),
        }
        write_durably(folder / "data.json", (json.dumps(about, indent=2) + "\n").encode())
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{target}.json").unlink(missing_ok=True)
        for suffix in (".jsonl", ".json"):
            (folder / f"data{suffix}").replace(f"{target}{suffix}")
    return _describe(target, totals, about, window)


def _conversations(tokenized: Tokenized, inputs: Sequence[Path]) -> Iterator[tuple[list[dict], np.ndarray]]:
    """Every stored conversation's messages and three numbers, in order; the inputs are read once more."""
    reader, start, current, documents = tokenized.store.reader(), 0, -1, iter(())
    for table in tokenized.store.documents():
        for file, line, _, count in table.tolist():
            if file != current:
                current, documents = file, iter_documents(inputs[file], hashlib.sha256())
            document = next((found for found in documents if found.line == line), None)
            raw = b"".join(reader.read(start, count))
            start += count
            rows = np.frombuffer(raw, "<i4").reshape(-1, 3)
            conversations = [] if document is None else parse_conversations(document.raw, document.label)
            if len(conversations) != len(rows):
                raise ValueError(f"{inputs[file]} changed while it was read: run again")
            yield from zip(conversations, rows, strict=True)
    reader.close()


def _write(path: Path, conversations: Iterator[tuple[list[dict], np.ndarray]], window: int) -> Totals:
    """Packs conversations into lines, _TOGETHER at a time."""
    totals = Totals()
    with path.open("w", encoding="utf-8") as output:
        while group := list(islice(conversations, _TOGETHER)):
            numbers = np.stack([row for _, row in group]).astype(np.int64)
            totals.add(numbers, window)
            for chosen in best_fit(np.minimum(numbers[:, 0], window), window):
                parts = [group[place][0] for place in chosen]
                line: dict[str, list] = {"messages": [message for part in parts for message in part]}
                if len(parts) > 1:
                    line["starts"] = [0, *accumulate(len(part) for part in parts[:-1])]
                output.write(json.dumps(line, ensure_ascii=False) + "\n")
                totals.windows += 1
    return totals


def _describe(target: Path, totals: Totals, about: Mapping[str, Any], window: int) -> str:
    filled = totals.tokens / (totals.windows * window)
    return "\n".join(
        [
            f"{target}.jsonl: {totals.conversations} conversations in {totals.windows} lines, {totals.tokens} tokens, "
            f"{totals.assistant_tokens / totals.tokens:.1%} of them the assistant's; lines are {filled:.1%} full",
            f"{totals.longer} conversations are longer than --seq-length {window - 1} and lose their end in training, "
            f"{totals.lost} of them every assistant token; {len(about['skipped'])} lines were skipped; messages "
            f"spell {about['special_tokens']} special tokens, which the template's text does not tell from its own",
            f"train on it with --sft --data-path {target}.jsonl",
        ]
    )
