"""Many tasks and lengths at once, into a cache where a folder's name says what is in it."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rpsd.data.staging import staging_folder
from megatron_rpsd.ruler.counting import TokenCounter
from megatron_rpsd.ruler.generate import write_task
from megatron_rpsd.ruler.sources import SHA256
from megatron_rpsd.ruler.synthetic import VERSION as SYNTHETIC_VERSION
from megatron_rpsd.ruler.tasks import EDITION, RULER_TASKS, Task, find_task
from megatron_rpsd.ruler.words import WORDS_SHA256


def cache_key(task: Task, length: int, number: int, seed: int, tokenizer_sha256: str) -> str:
    """16 hexadecimal digits of everything that the prompts depend on."""
    texts = SYNTHETIC_VERSION if task.synthetic else sorted(SHA256.values())
    wanted = [EDITION, task.name, length, number, seed, tokenizer_sha256, WORDS_SHA256, texts]
    return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]


def prepare(
    tasks: Sequence[Task],
    lengths: Sequence[int],
    number: int,
    seed: int,
    tokenizer: Path,
    data_dir: Path | None,
    cache: Path,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> dict[tuple[str, int], Path]:
    """The JSONL of every task and length, made where `cache` lacks it: CACHE/KEY/TASK-LENGTH.jsonl and its companions.

    A folder of the cache appears whole or not at all; after an interruption, or a ValueError from one task, those made
    before are kept. `progress` is told "TASK LENGTH" and the samples done.
    """
    tokenizer_sha256 = TokenCounter(tokenizer).sha256
    paths = {}
    for length in sorted(set(lengths)):
        for task in tasks:
            folder = cache / cache_key(task, length, number, seed, tokenizer_sha256)
            name = f"{task.name}-{length}.jsonl"
            paths[task.name, length] = folder / name
            if (folder / name).is_file():
                continue
            label = f"{task.name} {length}"
            with staging_folder(folder) as scratch:
                made = scratch / "made"
                write_task(
                    task, length, number, seed, tokenizer, data_dir, made / name, lambda n, at=label: progress(at, n)
                )
                cache.mkdir(parents=True, exist_ok=True)
                made.rename(folder)
    return paths


def run_options(args: argparse.Namespace, progress: Callable[[str, int], None]) -> list[str]:
    """What tools/make_ruler.py was asked for, one task or all; returns the lines to print."""
    if args.edition != EDITION:
        raise ValueError(f"--edition {args.edition}: only {EDITION} is written; other editions give other prompts")
    wanted = {"lengths", "cache"} if args.all else {"length", "output"}
    given = {name for name in ("length", "output", "lengths", "cache") if getattr(args, name) is not None}
    if given != wanted:
        typed, missing = (
            ", ".join(f"--{name}" for name in sorted(given)),
            " and ".join(f"--{n}" for n in sorted(wanted)),
        )
        raise ValueError(f"{'--all' if args.all else '--task'} goes with {missing}; given: {typed or 'neither'}")
    common = (args.num_samples, args.seed, args.tokenizer, args.data_dir)
    if args.all:
        made = prepare(list(RULER_TASKS.values()), args.lengths, *common, args.cache, progress)
        return [str(path) for path in made.values()]
    if args.output.suffix != ".jsonl":
        raise ValueError(f"--output {args.output} must end in .jsonl")
    task = find_task(args.task)
    write_task(task, args.length, *common, args.output, lambda done: progress(task.name, done))
    return [f"{args.output}: {args.num_samples} samples of {task.name}, edition {EDITION}, {args.length} tokens"]
