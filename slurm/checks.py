"""The checks of a pipeline on the submit host, without a GPU and without a step's output, and its jobs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pipeline import STEPS, output_of

from megatron_rpsd.checkpoint.convert import (
    ImportLayout,
    hf_session_arguments,
    model_dtype,
    refuse_existing,
    rope_of_run,
)
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.hf_writer import exported_config, with_yarn
from megatron_rpsd.evaluation.ruler_evaluation import plan_of
from megatron_rpsd.evaluation.ruler_options import evaluation_parser
from megatron_rpsd.evaluation.ruler_parts import part_names, parts_left
from megatron_rpsd.runs.attempts import command_words, refuse_hopeless
from megatron_rpsd.training.errors import quiet_parser
from megatron_rpsd.training.saved_checkpoint import checkpoint_folder, saved_arguments

TOOLS = Path(__file__).resolve().parents[1] / "tools"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_COMMON = {"nodes": int, "gpus_per_node": int, "ranks_per_node": int, "sbatch": str, "arguments": str}
_KEYS = {
    "import": _COMMON,
    "train": _COMMON | {"files": list},
    "export": _COMMON,
    "evaluate": {"gpus_per_node": int, "sbatch": str, "arguments": str, "concurrent": int},
    "report": {"sbatch": str},
}


def _tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    specification = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Step:
    """A table of the settings."""

    name: str
    values: dict

    def words(self, key: str) -> list[str]:
        try:
            return shlex.split(self.values.get(key, ""))
        except ValueError as error:
            raise ValueError(f"[{self.name}] {key} cannot be split into words: {error}") from error

    @property
    def nodes(self) -> int:
        return self.values.get("nodes", 1)

    @property
    def ranks_per_node(self) -> int:
        return self.values.get("ranks_per_node", self.values.get("gpus_per_node", 1))

    def resources(self) -> list[str]:
        """Options of sbatch."""
        gpus = self.values.get("gpus_per_node", 0)
        ranks = ["--export", f"ALL,RPSD_RANKS_PER_NODE={self.ranks_per_node}"]
        return ["--nodes", str(self.nodes), *["--gpus-per-node", str(gpus)] * bool(gpus), *ranks, *self.words("sbatch")]


def read_settings(path: Path) -> tuple[Path, dict[str, Step]]:
    """The model's folder and every step's table; ValueError for what is no setting."""
    if not path.is_file():
        raise ValueError(f"SETTINGS {path} is no file")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    hf = settings.pop("hf", None)
    if not isinstance(hf, str):
        raise ValueError(f'{path}: give the model, hf = "FOLDER"')
    for name, table in settings.items():
        if name not in _KEYS or not isinstance(table, dict):
            raise ValueError(f"{path}: {name} is no setting; there are hf and the tables {', '.join(_KEYS)}")
        for key, value in table.items():
            if key not in _KEYS[name]:
                raise ValueError(f"{path}: [{name}] has no {key}; there are {', '.join(_KEYS[name])}")
            wanted = _KEYS[name][key]
            if type(value) is not wanted or (wanted is int and value < (key != "gpus_per_node")):
                kind = {int: "a whole number of at least 1", str: "a text of words", list: "a list of files"}[wanted]
                raise ValueError(f"{path}: [{name}] {key} = {json.dumps(value)} must be {kind}")
    return Path(hf), {name: Step(name, settings.get(name, {})) for name in _KEYS}


def _parsed_conversion(words: list[str]) -> argparse.Namespace:
    sys.argv = ["convert_checkpoint.py", *words]
    return _tool("convert_checkpoint").parse()


def check_conversion(words: list[str], ranks: int, later: bool = False) -> argparse.Namespace:
    """Refuse a conversion that cannot run on so many ranks.

    Args:
        later: its input is not there yet.
    """
    args = _parsed_conversion(words)
    if args.command != "verify":
        refuse_existing(Path(args.output))
    folder = HFFolder(args.hf_reference if args.command == "export" else args.hf)
    folder.check_tokenizer()
    if args.command == "export":
        if not later:
            saved_arguments(checkpoint_folder(args.checkpoint, args.iteration))
        return args
    folder.check()
    if args.command == "import":
        os.environ["WORLD_SIZE"] = str(ranks)
        ImportLayout(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.decoder_first_pipeline_num_layers,
            args.decoder_last_pipeline_num_layers,
        ).arguments()
    elif ranks > 1:
        raise ValueError(f"verify runs on one rank, {ranks} were asked for: leave --nodes and RPSD_RANKS_PER_NODE out")
    return args


def _refuse_flags(step: Step, words: list[str], *flags: str) -> None:
    typed = {word.split("=")[0] for word in words}
    for flag in flags:
        if flag in typed:
            raise ValueError(f"[{step.name}] arguments: the pipeline gives {flag} itself; leave it out")


def _check_training(run: Path, hf: Path, step: Step) -> argparse.Namespace:
    """Parse the training's arguments; where the import is to come, with the model's own in place of a checkpoint's."""
    from megatron.training import get_args

    attempt, imported = _tool("attempt"), output_of(run, "import")
    sizes = ["--nodes", str(step.nodes), "--ranks-per-node", str(step.ranks_per_node)]
    args, typed = attempt.parse(
        ["begin", str(run), *sizes, "--files", *step.values.get("files", []), "--", *step.words("arguments")]
    )
    words = command_words(run, args.files, typed)
    _refuse_flags(step, words[2:], "--run-dir", "--pretrained-checkpoint", "--load", "--save")
    if imported.exists():
        words += ["--use-checkpoint-args", "--pretrained-checkpoint", str(imported)]
    else:
        import torch

        described = hf_session_arguments(HFFolder(hf), torch.float32)
        words = [*described, *(word for word in words if word != "--use-checkpoint-args")]
    refuse_hopeless(run, args.max_fruitless)
    attempt.check(words, step.nodes, step.ranks_per_node)
    return get_args()


def _expected_export(trained: argparse.Namespace, hf: Path, export: argparse.Namespace, scratch: Path) -> Path:
    """A folder as the export will be, without weights."""
    reference = HFFolder(hf)
    base, scaling, length = rope_of_run(trained, reference)
    if export.yarn_factor is not None:
        scaling, length = with_yarn(scaling, length, export.yarn_factor)
    for path in hf.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(_WEIGHTS):
            (scratch / path.name).symlink_to(path.resolve())
    config = exported_config(reference.config, base, scaling, length, model_dtype(reference))
    (scratch / "config.json").write_text(json.dumps(config))
    return scratch


def _check_evaluation(run: Path, step: Step, hf: Path) -> int:
    """The number of its parts."""
    words = step.words("arguments")
    _refuse_flags(step, words, "--hf", "--output", "--part", "--merge", "--list-parts")
    parser = quiet_parser(evaluation_parser(""))
    args = parser.parse_args([*words, "--hf", str(hf), "--output", str(output_of(run, "evaluate").parent)])
    parts_left(args)
    return len(part_names(plan_of(args)))


def plan_of_jobs(run: Path, settings: Path) -> list[list[str]]:
    """Check every step; for each job its name, its dependency (`-`: none) and sbatch's words.

    Raises:
        ValueError: a step that cannot run, in one line.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"RUN {run} is a file; name a folder")
    hf, steps = read_settings(settings)
    done = [place for place, name in enumerate(STEPS[:-1]) if output_of(run, name).exists()]
    left = STEPS[max(done, default=-1) + 1 :]
    imports = ["import", "--hf", str(hf), "--output", str(output_of(run, "import"))]
    imports += steps["import"].words("arguments")
    exports = ["export", "--checkpoint", str(run / "checkpoints"), "--hf-reference", str(hf)]
    exports += ["--output", str(output_of(run, "export")), *steps["export"].words("arguments")]
    if "import" in left:
        check_conversion(imports, steps["import"].nodes * steps["import"].ranks_per_node)
    evaluated = output_of(run, "export")
    with tempfile.TemporaryDirectory() as scratch:
        if "export" in left:
            if "train" in left:
                export = check_conversion(exports, 1, later=True)
                evaluated = _expected_export(_check_training(run, hf, steps["train"]), hf, export, Path(scratch))
            else:
                export = check_conversion(exports, 1)
                saved = saved_arguments(checkpoint_folder(export.checkpoint, export.iteration))
                evaluated = _expected_export(saved, hf, export, Path(scratch))
        parts = _check_evaluation(run, steps["evaluate"], evaluated)
    jobs = _jobs(run, steps, imports, exports, parts)
    names, lines = [], []
    for name in [*left, "report"]:
        needs = f"afterany:{':'.join(names)}" if name == "report" else f"afterok:{names[-1]}" if names else "-"
        lines.append([name, needs, *jobs[name]])
        names.append(name)
    return lines


def _jobs(
    run: Path, steps: dict[str, Step], imports: list[str], exports: list[str], parts: int
) -> dict[str, list[str]]:
    """Words of sbatch for every job."""
    train, evaluation = steps["train"], steps["evaluate"]
    pretrained = ["--use-checkpoint-args", "--pretrained-checkpoint", str(output_of(run, "import"))]
    evaluates = ["--hf", str(output_of(run, "export")), "--output", str(output_of(run, "evaluate").parent)]
    evaluates += evaluation.words("arguments")
    most = f"%{evaluation.values['concurrent']}" if "concurrent" in evaluation.values else ""
    scripts = {
        "import": ["slurm/convert.sbatch", *imports],
        "train": ["slurm/train.sbatch", str(run), *train.values.get("files", []), "--"],
        "export": ["slurm/convert.sbatch", *exports],
        "evaluate": ["slurm/evaluate.sbatch", *evaluates],
        "report": ["slurm/pipeline.sbatch", str(run), *evaluates],
    }
    scripts["train"] += [*train.words("arguments"), *pretrained]
    jobs = {}
    for name, script in scripts.items():
        words = ["--job-name", f"{run.name}-{name}", "--output", str(run / "logs" / f"{name}-%j.log")]
        if name == "evaluate":
            logs = output_of(run, "evaluate").parent / "parts" / "%a.log"
            words += ["--output", str(logs), "--array", f"0-{parts - 1}{most}"]
        jobs[name] = [*words, *steps[name].resources(), *script]
    return jobs
