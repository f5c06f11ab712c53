"""What tools/make_ruler.py was asked for: its options checked and carried out, and its progress shown."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from megatron_rpsd.ruler.generate import Recipe, write_prompts
from megatron_rpsd.ruler.prepare import prepare
from megatron_rpsd.ruler.tasks import RULER_TASKS, Task, find_task

DEPTHS = tuple(range(0, 101, 10))


class ProgressLine:
    """One line on stderr, written anew on a terminal, and a line every few seconds elsewhere."""

    def __init__(self, every: float = 5.0) -> None:
        self.terminal, self.every = sys.stderr.isatty(), every
        self.started = self.shown = time.monotonic()
        self.done: dict[str, int] = {}
        self.files = self.wanted = 0

    def expect(self, files: int, samples: int) -> None:
        """How many files there will be at most, of `samples` samples each."""
        self.files, self.wanted = files, samples

    def __call__(self, label: str, done: int) -> None:
        self.done[label] = done
        now = time.monotonic()
        if now - self.shown >= (0.1 if self.terminal else self.every):
            self.shown = now
            self._show(now)

    def _show(self, now: float) -> None:
        whole = sum(done == self.wanted for done in self.done.values())
        text = f"{whole} of {self.files} tasks, {sum(self.done.values())} samples, {now - self.started:.0f} s"
        print(f"\r{text} " if self.terminal else text, end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The last state, where anything was shown."""
        if self.done and (self.terminal or self.shown > self.started):
            self._show(time.monotonic())
            if self.terminal:
                print(file=sys.stderr)


def _tasks(args: argparse.Namespace) -> list[Task]:
    names = args.task or RULER_TASKS
    if args.grid and args.all:
        names = [name for name, task in RULER_TASKS.items() if task.family in ("niah", "vt")]
    return [find_task(name, args.edition, args.grid) for name in names]


def _check_destination(args: argparse.Namespace) -> None:
    """One file, or a cache of many."""
    given = {name for name in ("length", "output", "lengths", "cache") if getattr(args, name) is not None}
    one, many = {"length", "output"}, {"lengths", "cache"}
    single = not args.all and len(args.task) == 1
    if given == many or (given == one and single):
        return
    typed = ", ".join(f"--{name}" for name in sorted(given)) or "neither"
    ways = "--cache and --lengths" + (", or with --length and --output" if single else "")
    raise ValueError(f"{'--all' if args.all else '--task'} goes with {ways}; given: {typed}")


def run_options(args: argparse.Namespace) -> list[str]:
    """Makes what was asked for; returns the lines to print."""
    _check_destination(args)
    if args.depths and not args.grid:
        raise ValueError("--depths belongs to --grid")
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers} must be at least 1")
    tasks, progress = _tasks(args), ProgressLine()
    depths = [depth / 100 for depth in args.depths or DEPTHS] if args.grid else []
    each = args.num_samples * max(len(depths), 1)
    progress.expect(len(tasks) * len(args.lengths or [0]), each)
    if args.cache is not None:
        common = (args.num_samples, args.seed, args.tokenizer, args.data_dir, args.cache, progress)
        extra = {"edition": args.edition, "template": args.model_template, "depths": depths, "workers": args.workers}
        made = prepare(tasks, args.lengths, *common, **extra)
        progress.close()
        return [str(path) for path in made.values()]
    return [_make_one(args, tasks[0], tuple(depths), progress)]


def _make_one(args: argparse.Namespace, task: Task, depths: tuple[float, ...], progress: ProgressLine) -> str:
    output: Path = args.output
    if output.suffix != ".jsonl":
        raise ValueError(f"--output {output} must end in .jsonl")
    recipe = Recipe(task, args.length, args.num_samples, args.seed, args.edition, args.model_template, depths)
    made = write_prompts(recipe, args.tokenizer, args.data_dir, output, lambda done: progress(task.name, done))
    progress.close()
    return f"{output}: {made['samples']} samples of {task.name}, edition {args.edition}, {args.length} tokens"


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
