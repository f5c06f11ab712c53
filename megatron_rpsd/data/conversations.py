"""Conversations prepared for `--sft`: every line checked with the tokenizer's chat template, counted, and packed.

Training reads conversations as text (`training.chat_dataset`), so that the template can change without preparing them
again; what is prepared is JSONL, too. A sample is a line, padded to L tokens; short conversations therefore waste most
of a long window. Packed, a line holds several conversations, best-fit into L + 1 tokens. A line's conversations are
told apart by their system messages (Megatron's convention), so one without a system message has a line of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_rpsd.data.arrangement import best_fit
from megatron_rpsd.data.chat import ChatEncoder, ConversationFile, split_conversations
from megatron_rpsd.data.shards import file_sha256
from megatron_rpsd.data.staging import staging_folder

# Conversations that are packed together: as many lengths are in memory.
_TOGETHER = 1 << 14


class _Totals:
    """Counts over all files."""

    def __init__(self) -> None:
        self.conversations = self.tokens = self.assistant_tokens = self.longer = self.lost = 0
        self.windows = self.alone = 0
        self.skipped: list[str] = []

    def add(self, mask: Sequence[int], window: int) -> None:
        self.conversations += 1
        self.tokens += len(mask)
        self.assistant_tokens += sum(mask)
        self.longer += len(mask) > window
        self.lost += not any(mask[1:window])


def prepare_conversations(inputs: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """Checks, counts and packs JSONL conversations into P.jsonl, with P.json beside it.

    Args:
        settings: tokenizer, output_prefix, seq_length, on_error, as in `PreprocessConfig`.

    Returns:
        lines on what was found.

    Raises:
        ValueError: the first line that is no conversation, or that the template refuses (with on_error stop).
    """
    from transformers import AutoTokenizer

    if not inputs:
        raise ValueError("--input names no file: --mode sft reads JSONL files of conversations")
    if not (Path(settings["tokenizer"]) / "tokenizer.json").is_file():
        raise ValueError(
            f"--tokenizer {settings['tokenizer']} holds no tokenizer.json: --mode sft needs a chat template"
        )
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(str(settings["tokenizer"]), local_files_only=True))
    window, totals, target = settings["seq_length"] + 1, _Totals(), Path(settings["output_prefix"])
    with staging_folder(target) as folder:
        with (folder / "data.jsonl").open("w") as output:
            for path in inputs:
                _pack_file(path, encoder, window, totals, output, settings["on_error"] == "skip")
        if not totals.conversations:
            raise ValueError(f"--input {inputs[0]}: no conversation is left of {len(totals.skipped)} lines")
        about = {
            "format": "conversations",
            "seq_length": settings["seq_length"],
            **{name: value for name, value in vars(totals).items() if name != "skipped"},
            "inputs": [{"path": str(path), "sha256": file_sha256(path)} for path in inputs],
            "sha256": file_sha256(folder / "data.jsonl"),
            "skipped": totals.skipped,
        }
        (folder / "data.json").write_text(json.dumps(about, indent=2) + "\n")
        target.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".jsonl", ".json"):
            (folder / f"data{suffix}").replace(f"{target}{suffix}")
    return _describe(target, totals, window)


def _pack_file(path: Path, encoder: ChatEncoder, window: int, totals: _Totals, output, skip: bool) -> None:
    """One file, _TOGETHER conversations at a time."""
    file = ConversationFile(path)
    lengths: list[int] = []
    places: list[tuple[int, int]] = []  # (line, conversation in the line)
    for line in tqdm(range(len(file)), desc=path.name, unit="line", disable=None):
        try:
            parts = split_conversations(file[line])
            encoded = [encoder.encode(part, file.label(line)) for part in parts]
        except ValueError as error:
            if not skip:
                raise
            totals.skipped.append(str(error))
            continue
        for number, (ids, mask) in enumerate(encoded):
            totals.add(mask, window)
            places.append((line, number))
            lengths.append(min(len(ids), window))
        if len(places) >= _TOGETHER:
            _write(file, places, lengths, window, totals, output)
            places, lengths = [], []
    _write(file, places, lengths, window, totals, output)


def _write(file: ConversationFile, places: list, lengths: list, window: int, totals: _Totals, output) -> None:
    """Pack conversations into lines; those without a system message fill a line's beginning, one a line."""
    read = [split_conversations(file[line])[number] for line, number in places]
    marked = np.array([messages[0]["role"] == "system" for messages in read], dtype=bool)
    sizes = np.array(lengths, dtype=np.int64)
    for chosen in best_fit(sizes[marked], window):
        numbers = np.flatnonzero(marked)[chosen]
        output.write(json.dumps({"messages": [m for n in numbers for m in read[n]]}, ensure_ascii=False) + "\n")
        totals.windows += 1
    for number in np.flatnonzero(~marked):
        output.write(json.dumps({"messages": read[number]}, ensure_ascii=False) + "\n")
        totals.windows += 1
        totals.alone += 1


def _describe(target: Path, totals: _Totals, window: int) -> str:
    filled = totals.tokens / (totals.windows * window)
    return "\n".join(
        [
            f"{target}.jsonl: {totals.conversations} conversations in {totals.windows} lines, {totals.tokens} tokens, "
            f"{totals.assistant_tokens / totals.tokens:.1%} of them the assistant's; lines are {filled:.1%} full",
            f"{totals.longer} conversations are longer than --seq-length {window - 1} and lose their end in training, "
            f"{totals.lost} of them every assistant token; {totals.alone} have no system message and a line alone; "
            f"{len(totals.skipped)} lines were skipped",
            f"train on it with --sft --data-path {target}.jsonl",
        ]
    )
