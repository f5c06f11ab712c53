"""An evaluation in parts, one a task and length, by processes that know nothing of each other; then put together.

A part is an evaluation's output of its own, OUTPUT/parts/TASK-LENGTH, with the plan of the whole: `--yarn-factor auto`
and the checks see all lengths. The parts put together leave what one process leaves.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from megatron_rpsd.data.files import replace_file, write_json
from megatron_rpsd.evaluation.prediction_files import PredictionFile, count_lines
from megatron_rpsd.evaluation.ruler_evaluation import Plan, answer, make_prompts, place, plan_of, score_output
from megatron_rpsd.evaluation.ruler_run import check_run, fields_of, join_runs, only_run, write_run
from megatron_rpsd.evaluation.samples import load_manifest, load_prepared
from megatron_rpsd.runs.attempts import last_words

PARTS = "parts"


def part_names(plan: Plan) -> list[str]:
    """TASK-LENGTH of every part, in the order in which one process answers them."""
    if plan.args.prepared:
        manifests = [load_manifest(path) for path in plan.args.prepared]
        return [f"{manifest['task']}-{manifest['length']}" for manifest in manifests]
    return [f"{task.name}-{length}" for length in plan.lengths for task in plan.tasks]


def _prompts(plan: Plan, number: int) -> Path:
    """The prepared file of a part; it is made where the cache lacks it."""
    if plan.args.prepared:
        return plan.args.prepared[number]
    length, task = divmod(number, len(plan.tasks))
    return make_prompts(plan.args, [plan.tasks[task]], [plan.lengths[length]], plan.tokens.folder)[0]


def evaluate_part(args: argparse.Namespace) -> str:
    """Answer the samples of part `args.part` that are not answered yet; returns its TASK-LENGTH.

    Raises:
        ValueError: no such part, and what `evaluate` refuses.
    """
    plan = plan_of(args)
    names = part_names(plan)
    if not 0 <= args.part < len(names):
        raise ValueError(f"--part {args.part}: this evaluation has {len(names)} parts, 0 to {len(names) - 1}")
    name = names[args.part]
    output, engine = args.output / PARTS / name, plan.engine()
    try:
        with only_run(output):
            print(f"part {args.part}, {name}", flush=True)
            answer(plan, engine, [_prompts(plan, args.part)], output)
    finally:
        engine.close()
    return name


def _run_of(output: Path, name: str) -> dict | None:
    """run.json of a part whose samples are all answered, else None."""
    path = output / PARTS / name / "run.json"
    if not path.is_file():
        return None
    run = json.loads(path.read_bytes())
    prompts = output / run["prepared"][name]["path"]
    if not prompts.is_file() or _answered(output, name) < load_manifest(prompts)["samples"]:
        return None
    return run


def _answered(output: Path, name: str) -> int:
    return count_lines(output / PARTS / name / "predictions", name)


def parts_left(args: argparse.Namespace) -> list[tuple[int, str]]:
    """Number and TASK-LENGTH of every part that is not whole, after every check that needs neither GPU nor answers.

    The prompts of every part are made once with one sample, and thrown away: texts that are missing, lengths that are
    too short and a tokenizer that is not the model's show before anything is queued.

    Raises:
        ValueError: what `evaluate` refuses.
    """
    plan = plan_of(args)
    names = part_names(plan)
    if args.backend != "vllm":  # this host may lack it, and a GPU
        replace(plan, args=argparse.Namespace(**{**vars(args), "device": None})).engine().close()
    with tempfile.TemporaryDirectory() as scratch:
        trial = replace(plan, args=argparse.Namespace(**{**vars(args), "num_samples": 1, "cache": Path(scratch)}))
        trial.measured(trial.paths())
    return [(number, name) for number, name in enumerate(names) if _run_of(args.output, name) is None]


def merge_parts(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Put the parts together, without a model; OUTPUT then holds what `evaluate` leaves there.

    Returns:
        scores.json and the rows of samples.jsonl: those of one process, but for the provenance's seconds and command.

    Raises:
        ValueError: parts that are not whole, each named with the reason in its log, or parts of another run.
    """
    plan = plan_of(args)
    output, names = args.output, part_names(plan)
    with only_run(output):
        runs = {name: _run_of(output, name) for name in names}
        lacking = [_lacking(output, number, name) for number, name in enumerate(names) if runs[name] is None]
        if lacking:
            raise ValueError(
                f"--output {output}: {len(lacking)} of {len(names)} parts are not whole: {'; '.join(lacking)}; queue "
                "them again, answers so far are kept"
            )
        run = None
        for number, name in enumerate(names):
            prompts = _prompts(plan, number)
            entry = {"path": place(prompts, output), "sha256": load_manifest(prompts)["sha256"]}
            now = runs[name] | {"model": plan.model(), "prepared": {name: entry}}
            part = join_runs(output / PARTS / name, runs[name], now)
            run = part if run is None else join_runs(output / PARTS / name, run, part)
        run = check_run(output, run) | {"command": sys.argv}
        write_run(output, run)
        _gather(output, names, run, args.teacher_forced)
        return score_output(output, run)


def _lacking(output: Path, number: int, name: str) -> str:
    """What a part has, and why it has no more."""
    reason = last_words(output / PARTS / f"{number}.log")
    return f"part {number}, {name} ({_answered(output, name)} samples answered: {reason})"


def _gather(output: Path, names: list[str], run: dict, forced: bool) -> None:
    """Copy the parts' predictions, in the samples' order, and add up their seconds."""
    timing, predictions = _timing(output), output / "predictions"
    for name in names:
        folder = output / PARTS / name
        replace_file(predictions / f"{name}.jsonl", (folder / "predictions" / f"{name}.jsonl").read_bytes())
        prepared = load_prepared(output / run["prepared"][name]["path"])
        file = PredictionFile(predictions, prepared, fields_of(forced))
        if file.missing():
            raise ValueError(f"{folder} counts as whole and lacks {file.missing()[0].id}: delete it, queue it again")
        file.finish()
        timing |= _timing(folder)
    write_json(output / "timing.json", timing)


def _timing(output: Path) -> dict:
    """Seconds by TASK-LENGTH; those of a killed process are not known."""
    path = output / "timing.json"
    return json.loads(path.read_bytes()) if path.is_file() else {}
