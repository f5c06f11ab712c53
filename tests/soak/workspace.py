"""A folder with everything that a command line may name, small and whole; and what can befall its files."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np

from megatron_rpsd.checkpoint.convert import import_hf
from megatron_rpsd.runs.checkpoints import TRACKER, iteration_folder
from megatron_rpsd.runs.checksums import file_sums, write_checksums
from tests.distributed.corpus import write_corpus
from tests.distributed.models import LENGTH, VOCABULARY, tiny_model
from tests.distributed.pool import RankPool
from tests.soak.forked import command

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def write_tokenizer(folder: Path, words: int, end: bool = True) -> Path:
    """A Hugging Face tokenizer of the words t0, t1, ...; the last one ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(words)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"eos_token": f"t{words - 1}"} if end else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", **named).save_pretrained(folder)
    return folder


def _chats(path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "t1 t2"}, {"role": "assistant", "content": "t3 t4"}]}
    path.write_text((json.dumps(line) + "\n") * 8)


def write_run(folder: Path, finished: bool) -> Path:
    """A run's folder with two checkpoints that pass for whole ones."""
    for iteration in (1, 2):
        place = iteration_folder(folder / "checkpoints", iteration)
        place.mkdir(parents=True)
        for name in ("common.pt", ".metadata", "metadata.json", "__0_0.distcp"):
            (place / name).write_bytes(random.Random(f"{iteration}{name}").randbytes(200))
        write_checksums(place, file_sums(place, ["common.pt", ".metadata", "metadata.json", "__0_0.distcp"]))
    (folder / "checkpoints" / TRACKER).write_text("2")
    if finished:
        (folder / "finished.json").write_text('{"iteration": 2, "time": 0}\n')
    return folder


def build(root: Path) -> Path:
    """The folder. Its names: see below."""
    root.mkdir(parents=True)
    RankPool().run(1, import_hf, tiny_model(root / "hf", "llama"), root / "checkpoint")
    write_tokenizer(root / "tokenizer", VOCABULARY)
    write_tokenizer(root / "large_tokenizer", VOCABULARY + 23)
    write_tokenizer(root / "endless_tokenizer", VOCABULARY, end=False)
    (root / "empty").mkdir()
    (root / "file").write_text("a file\n")
    write_corpus(root / "data")
    write_corpus(root / "damaged")
    _chats(root / "chats.jsonl")
    write_run(root / "finished", finished=True)
    write_run(root / "run", finished=False)
    dice = random.Random(5)
    lines = (" ".join(f"t{dice.randrange(VOCABULARY - 1)}" for _ in range(40)) for _ in range(20))
    (root / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    np.save(root / "tokens.npy", np.arange(LENGTH + 1) % VOCABULARY)
    words = ["--input", "text.jsonl", "--tokenizer", "tokenizer", "--output-prefix", "book"]
    words = [word if word.startswith("--") else str(root / word) for word in words]
    made = command("preprocess_data", [*words, "--seq-length", "16", "--no-histogram"], root)
    assert made.code == 0, made.errors
    return root


def listing(root: Path) -> dict[str, str]:
    """Every file below a folder, and every folder; with what the files hold. Two are left out: a run's folder keeps
    the command of every attempt, and in error.txt why another one would end alike.
    """
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(root.rglob("*"))
        if path.name not in ("command", "error.txt")
    }


def overwrite(path: Path, dice: random.Random) -> None:
    """Other bytes, as many."""
    path.write_bytes(dice.randbytes(path.stat().st_size))
