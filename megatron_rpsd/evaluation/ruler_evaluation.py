"""What `tools/evaluate.py` runs: prompts, checks, cost, answers, scores."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_rpsd.evaluation.cost_table import check_limit, cost_table
from megatron_rpsd.evaluation.engines.base import Engine
from megatron_rpsd.evaluation.engines.choose import check_backend, make_engine
from megatron_rpsd.evaluation.engines.model_facts import ModelFacts, model_identity, read_model, yarn_factor
from megatron_rpsd.evaluation.engines.names import COMPUTING, LOCAL_MODEL
from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from megatron_rpsd.evaluation.prediction_files import count_lines
from megatron_rpsd.evaluation.preflight import (
    PROMPT_BYTES,
    Cell,
    bos_count,
    check_alike,
    check_disk,
    check_tokens,
    check_window,
    costs,
    measure,
    warm_up,
)
from megatron_rpsd.evaluation.ruler_run import ask, check_run, only_run, total_seconds, write_run
from megatron_rpsd.evaluation.samples import load_manifest, load_prepared
from megatron_rpsd.evaluation.scores import score_run
from megatron_rpsd.evaluation.scoring import read_predictions
from megatron_rpsd.ruler.command import DEPTHS, ProgressLine
from megatron_rpsd.ruler.prepare import prepare
from megatron_rpsd.ruler.tasks import EDITION, GRID, RULER_TASKS, Task, find_task

_LIBRARIES = ("megatron-rpsd", "torch", "transformers", "tokenizers", "vllm")


def wanted_tasks(names: Sequence[str], edition: str = EDITION) -> list[Task]:
    """Tasks by their names, `all` for RULER's 13; ValueError for a name that is none, or one that is there twice."""
    expanded = [task for name in names for task in (RULER_TASKS if name == "all" else [name])]
    twice = [name for name in expanded if expanded.count(name) > 1]
    if twice:
        raise ValueError(f"--tasks: {twice[0]} is there twice")
    return [find_task(name.removesuffix(GRID), edition, name.endswith(GRID)) for name in expanded]


def wanted_lengths(given: Sequence[str]) -> list[int]:
    """Lengths in ascending order; ValueError unless each is a whole number of at least 1."""
    for text in given:
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise ValueError(f"--lengths {text}: give whole numbers of tokens, such as 4096 131072")
    return sorted({int(text) for text in given})


def _check_options(args: argparse.Namespace) -> None:
    check_backend(args)
    if args.prepared and (args.tasks or args.lengths):
        raise ValueError("--prepared names the prompts; leave --tasks and --lengths out")
    if not args.prepared and not (args.tasks and args.lengths):
        raise ValueError("give --tasks and --lengths, or --prepared")
    if args.depths and not any(name.endswith(GRID) for name in args.tasks or ()):
        raise ValueError(f"--depths belongs to tasks whose name ends in {GRID}")
    for name in ("num_samples", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")


def make_prompts(args: argparse.Namespace, tasks: Sequence[Task], lengths: Sequence[int], folder: Path) -> list[Path]:
    """Paths of the prompts, length by length, each in the tasks' order; those that the cache lacks are made."""
    cache = args.cache or args.output / "prompts"
    depths = [depth / 100 for depth in args.depths or DEPTHS]
    grids = [task for task in tasks if task.name.endswith(GRID)]
    others = [task for task in tasks if task not in grids]
    prompts = args.num_samples * (len(others) + len(grids) * len(depths))
    check_disk(cache, prompts * sum(lengths) * PROMPT_BYTES)
    given = (args.num_samples, args.seed, folder, args.data_dir, cache)
    more = {"edition": args.edition, "template": args.model_template, "workers": args.workers}
    made = {}
    for some, at in ((others, []), (grids, depths)):
        if some:
            progress = ProgressLine()
            progress.expect(len(some) * len(lengths), args.num_samples * max(len(at), 1))
            made |= prepare(some, lengths, *given, progress, depths=at, **more)
            progress.close()
    return [made[task.name, length] for length in lengths for task in tasks]


def versions() -> dict[str, str]:
    """Of Python and of the installed libraries that prompts and answers depend on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def place(path: Path, output: Path) -> str:
    """A path as run.json keeps it: within OUTPUT relative to it, so that the folder can be moved."""
    path, output = path.absolute(), output.absolute()
    return str(path.relative_to(output) if path.is_relative_to(output) else path)


def _tokens(args: argparse.Namespace) -> PromptTokens | None:
    """The tokenizer that prompts are made and read with; None where nothing needs one."""
    folder = args.tokenizer or args.hf
    if folder is not None:
        return PromptTokens(folder, args.bos)
    if args.backend == "openai" or not args.prepared:
        raise ValueError("--tokenizer DIR (or --hf DIR) is needed: prompts are measured in the model's tokens")
    return None


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked as far as options alone allow."""

    args: argparse.Namespace
    tasks: list[Task]
    lengths: list[int]
    facts: ModelFacts | None
    """None where --hf names no model."""
    factor: float | None
    tokens: PromptTokens | None

    @property
    def computes(self) -> bool:
        """Whether a model reads the prompts, here or on a server."""
        return self.args.backend in COMPUTING

    @property
    def reader(self) -> tuple[PromptTokens | None, ModelFacts | None]:
        """What prompts are read with; two None where no model reads them."""
        return (self.tokens, self.facts) if self.computes else (None, None)

    def engine(self) -> Engine:
        """Not loaded yet; to be closed."""
        return make_engine(self.args, self.facts, self.tokens, self.factor, self.lengths[-1])

    def paths(self) -> list[Path]:
        """Of all prompts, length by length, each in the tasks' order; those that the cache lacks are made."""
        return self.args.prepared or make_prompts(self.args, self.tasks, self.lengths, self.tokens.folder)

    def model(self) -> dict:
        """What run.json says about the model, as it is now."""
        args, facts = self.args, self.facts
        kind = args.backend.partition(":")[0]
        if kind in LOCAL_MODEL:
            return model_identity(facts, self.factor)
        named = {"openai": args.model, "replay": str(args.predictions)}.get(kind, args.backend)
        window = facts.config.max_position_embeddings if facts else None
        return {"path": named, "max_position_embeddings": window, "rope": facts.rope if facts else None}

    def provenance(self, cells: Sequence[Cell], engine: Engine) -> dict:
        """run.json of a run over `cells`."""
        first, args = cells[0].manifest, self.args
        return {
            "schema": 1,
            **{key: first[key] for key in ("edition", "seed", "tokenizer_sha256")},
            "model": self.model(),
            "engine": engine.describe(),
            "yarn_factor": self.factor,
            "bos": bos_count(cells),
            "model_template": first.get("model_template", "base"),
            "teacher_forced": args.teacher_forced,
            "versions": versions(),
            "command": sys.argv,
            "prepared": {
                cell.name: {"path": place(cell.path, args.output), "sha256": cell.manifest["sha256"]} for cell in cells
            },
        }

    def measured(self, paths: Sequence[Path]) -> tuple[list[Cell], list[str]]:
        """The prepared files, read and checked, and what is to be said about them."""
        cells = [measure(path, *self.reader) for path in paths]
        check_alike(cells)
        checks = []
        if self.args.backend in LOCAL_MODEL:
            checks.append(check_window(self.facts, self.factor, self.lengths[-1]))
        if self.computes:
            checks += check_tokens(cells, *self.reader)
            if self.args.teacher_forced:
                for cell in cells:
                    self.tokens.answer_ids(cell.first)
        return cells, checks


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan of `tools/evaluate.py`'s options; ValueError where they do not go together."""
    _check_options(args)
    lengths, tasks = wanted_lengths(args.lengths or ()), wanted_tasks(args.tasks or (), args.edition)
    if args.prepared:
        lengths = sorted({load_manifest(path)["length"] for path in args.prepared})
    local = args.backend in LOCAL_MODEL
    facts = read_model(args.hf) if local or (args.hf and (args.hf / "config.json").is_file()) else None
    factor = yarn_factor(facts, args.yarn_factor or "", lengths[-1]) if local else None
    if local:
        check_window(facts, factor, lengths[-1])
    return Plan(args, tasks, lengths, facts, factor, _tokens(args))


def evaluate(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """scores.json and the rows of samples.jsonl; OUTPUT then holds run.json and predictions/.

    Raises:
        ValueError: everything that a user can set wrong, before anything is computed where that is possible.
    """
    plan = plan_of(args)
    engine = plan.engine()
    try:
        with only_run(args.output):
            return score_output(args.output, answer(plan, engine, plan.paths(), args.output))
    finally:
        engine.close()


def answer(plan: Plan, engine: Engine, paths: Sequence[Path], output: Path) -> dict:
    """Have every sample of `paths` answered that `output`/predictions lacks; returns what `output`/run.json holds.

    Args:
        output: --output, or the folder of a part of it.
    """
    args = plan.args
    cells, checks = plan.measured(paths)
    run = check_run(output, plan.provenance(cells, engine))
    if checks:
        print("\n".join(checks))
    done = [count_lines(output / "predictions", cell.name) for cell in cells]
    tokens, facts = plan.reader
    rate = None
    if sum(done) < sum(cell.samples for cell in cells):
        engine.load()
        if plan.computes:
            longest = max(cells, key=lambda cell: cell.length).first
            rate = warm_up(engine, tokens, longest, engine.warm_up_tokens)
    rows = costs(cells, done, rate, facts, engine.parallel)
    print(cost_table(rows), flush=True)
    check_limit(rows, args.limit_hours)
    write_run(output, run)
    ask(engine, [cell.path for cell in cells], sum(cell.samples for cell in cells), output, args.teacher_forced)
    return run


def score_output(output: Path, run: dict) -> tuple[dict, list[dict]]:
    """Scores of every task and length that the run has whole, those of earlier commands included."""
    folder, whole, predictions = output / "predictions", [], {}
    for name, entry in run["prepared"].items():
        path = output / entry["path"]
        if not path.is_file():
            raise ValueError(f"{output} has {name}, whose prompts {path} are gone: prepare them there again")
        if count_lines(folder, name) < load_manifest(path)["samples"]:
            print(f"{name} is not complete and left out; run its command again", file=sys.stderr)
            continue
        whole.append(path)
        predictions |= read_predictions(folder / f"{name}.jsonl")
    provenance = {key: value for key, value in run.items() if key not in ("schema", "prepared")}
    provenance["seconds"] = total_seconds(output)
    return score_run(map(load_prepared, whole), predictions, provenance)
