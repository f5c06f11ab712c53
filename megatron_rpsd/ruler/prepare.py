"""Many tasks and lengths at once, into a cache where a folder's name says what is in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from queue import Empty

from megatron_rpsd.data.staging import staging_folder
from megatron_rpsd.ruler.counting import TokenCounter
from megatron_rpsd.ruler.generate import Recipe, beside, write_prompts
from megatron_rpsd.ruler.prompts import ModelTemplate
from megatron_rpsd.ruler.sources import SHA256
from megatron_rpsd.ruler.synthetic import VERSION as SYNTHETIC_VERSION
from megatron_rpsd.ruler.tasks import EDITION, Task
from megatron_rpsd.ruler.templates import model_template
from megatron_rpsd.ruler.words import WORDS_SHA256

Progress = Callable[[str, int], None]
# Goes up with every change of what the companions of a JSONL hold.
FORMAT = 2
# Rough costs of a sample over NIAH's among needles, so that long tasks start first.
_COSTS = {"hotpotqa": 3.0, "squad": 2.0, "essay": 1.2, "": 1.5}


def cache_key(recipe: Recipe, tokenizer_sha256: str, template: ModelTemplate | None = None) -> str:
    """16 hexadecimal digits of everything that the files depend on."""
    template, task = template or ModelTemplate(), recipe.task
    wanted = [
        FORMAT, recipe.edition, task.name, recipe.length, recipe.samples, recipe.seed, list(recipe.depths),
        tokenizer_sha256, [template.name, template.head, template.tail], WORDS_SHA256,
        SYNTHETIC_VERSION if task.synthetic else sorted(SHA256.values()),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """A file that the cache lacks."""

    recipe: Recipe
    tokenizer: Path
    data_dir: Path | None
    path: Path

    @property
    def cost(self) -> float:
        samples = self.recipe.samples * max(len(self.recipe.depths), 1)
        return self.recipe.length * samples * _COSTS.get(self.recipe.task.source, 1.0)

    def run(self, progress: Progress) -> None:
        """Makes the file's folder, whole or not at all."""
        folder, label = self.path.parent, f"{self.recipe.task.name} {self.recipe.length}"
        with staging_folder(folder) as scratch:
            made = scratch / "made"
            write_prompts(
                self.recipe, self.tokenizer, self.data_dir, made / self.path.name, lambda done: progress(label, done)
            )
            folder.parent.mkdir(parents=True, exist_ok=True)
            made.rename(folder)


def prepare(
    tasks: Sequence[Task],
    lengths: Sequence[int],
    number: int,
    seed: int,
    tokenizer: Path,
    data_dir: Path | None,
    cache: Path,
    progress: Progress = lambda name, done: None,
    *,
    edition: str = EDITION,
    template: str = "base",
    depths: Sequence[float] = (),
    workers: int = 1,
) -> dict[tuple[str, int], Path]:
    """The JSONL of every task and length, made where `cache` lacks it: CACHE/KEY/TASK-LENGTH.jsonl and its companions.

    A folder of the cache appears whole or not at all; after an interruption, or a ValueError from one task, those made
    before are kept. `progress` is told "TASK LENGTH" and the samples done. With `workers` above 1 that many processes
    share the files; what is written does not depend on it.
    """
    tokenizer_sha256, wrapped = TokenCounter(tokenizer).sha256, model_template(template, tokenizer)
    paths, jobs = {}, []
    for length in sorted(set(lengths)):
        for task in tasks:
            recipe = Recipe(task, length, number, seed, edition, template, tuple(depths))
            path = cache / cache_key(recipe, tokenizer_sha256, wrapped) / f"{recipe.name}.jsonl"
            paths[task.name, length] = path
            if not path.is_file():
                jobs.append(Job(recipe, tokenizer, data_dir, path))
    if workers > 1 and len(jobs) > 1:
        _run_parallel(jobs, min(workers, len(jobs)), progress)
    else:
        for job in jobs:
            job.run(progress)
    return paths


def prepared_files(cache: Path) -> Iterator[tuple[Path, dict]]:
    """Every whole JSONL of a cache, by name, with its manifest."""
    for manifest in sorted(cache.glob("*/*.manifest.json"), key=lambda path: (path.name, path.parent.name)):
        path = manifest.with_name(manifest.name.removesuffix(".manifest.json") + ".jsonl")
        if path.is_file() and beside(path, ".evidence.jsonl").is_file():
            yield path, json.loads(manifest.read_text(encoding="utf-8"))


_reports = None


def _begin_worker(reports: object) -> None:
    global _reports
    _reports = reports
    # A worker is a core; the tokenizer must not start a thread for each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(job: Job) -> None:
    job.run(lambda label, done: _reports.put((label, done)))


def _run_parallel(jobs: Sequence[Job], workers: int, progress: Progress) -> None:
    """Longest first. After a failure or an interruption nothing new is begun, and what runs is finished."""
    context = get_context("spawn")
    reports = context.Queue()
    with ProcessPoolExecutor(workers, context, _begin_worker, (reports,)) as pool:
        waiting = {pool.submit(_work, job) for job in sorted(jobs, key=lambda job: -job.cost)}
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                _pass_on(reports, progress)
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise ValueError(
                f"--workers {workers}: a worker was killed, most likely for lack of memory; take fewer workers"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _pass_on(reports, progress)


def _pass_on(reports: object, progress: Progress) -> None:
    while True:
        try:
            progress(*reports.get_nowait())
        except Empty:
            return
