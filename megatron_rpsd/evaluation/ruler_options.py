"""The options of `tools/evaluate.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rpsd.evaluation.engines.names import BACKENDS, BOS_CHOICES, KEY_VARIABLE
from megatron_rpsd.ruler.tasks import EDITION, EDITIONS


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Which prompts."""
    group = parser.add_argument_group("prompts")
    names = "all (RULER's 13) and names, such as vt, qa_1@synthetic, qa_1@shuffle, niah_single_1@grid"
    group.add_argument("--tasks", nargs="+", metavar="NAME", help=names)
    group.add_argument("--lengths", nargs="+", metavar="TOKENS", help="prompt and answer; RULER's are 4096 ... 131072")
    group.add_argument(
        "--num-samples", type=int, default=500, metavar="N", help="of each cell; of @grid, items; default 500"
    )
    group.add_argument("--seed", type=int, default=42)
    group.add_argument("--edition", default=EDITION, help=f"of RULER: {' or '.join(EDITIONS)}; default {EDITION}")
    group.add_argument("--depths", type=float, nargs="+", metavar="P", help="of @grid, percent; default 0 10 ... 100")
    group.add_argument(
        "--model-template", default="base", metavar="NAME", help="base, the default, or chat: the tokenizer's"
    )
    group.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of tokenizer.json; default --hf")
    group.add_argument(
        "--data-dir", type=Path, metavar="D", help="made by make_ruler.py fetch-data, instead of installed texts"
    )
    group.add_argument("--cache", type=Path, metavar="DIR", help="where prompts are made; default OUTPUT/prompts")
    group.add_argument("--workers", type=int, default=1, metavar="N", help="processes that make prompts; default 1")
    given = "prepared TASK-LENGTH.jsonl files, instead of --tasks and --lengths"
    group.add_argument("--prepared", type=Path, nargs="+", metavar="FILE", help=given)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it is run. What an engine does not read has no default, so that it can be refused."""
    group = parser.add_argument_group("model")
    group.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face model folder")
    group.add_argument("--backend", default="transformers", metavar="NAME", help=", ".join(BACKENDS))
    group.add_argument("--yarn-factor", metavar="F", help="YaRN over the window; auto: the smallest that is enough")
    group.add_argument("--bos", choices=BOS_CHOICES, default="auto", help="auto: one, where the tokenizer adds one")
    group.add_argument("--teacher-forced", action="store_true", help="also score the gold answers, without generation")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="auto: float32 on CPUs")
    group.add_argument(
        "--device", metavar="NAME", help="transformers: cpu or cuda[:N]; default cuda where there is one"
    )
    group.add_argument("--attention", metavar="NAME", help="transformers' attn_implementation; default sdpa")
    group.add_argument("--prefill-chunk", type=int, metavar="TOKENS", help="of a prompt at a time; 0: whole")
    group.add_argument("--batch-size", type=int, metavar="N", help="prompts at once; default 1, vllm 64")
    group.add_argument("--vllm-options", metavar="JSON", help="more arguments of vllm.LLM")
    group.add_argument("--endpoint", metavar="URL", help=f"openai: as http://localhost:8000/v1; key in {KEY_VARIABLE}")
    group.add_argument("--model", metavar="NAME", help="openai: the server's name of the model")
    group.add_argument("--concurrency", type=int, metavar="N", help="openai: requests at once; default 4")
    group.add_argument("--timeout", type=float, metavar="S", help="openai: seconds of silence; default 600")
    group.add_argument(
        "--predictions", type=Path, metavar="PATH", help="replay: a file, or a folder of TASK-LENGTH.jsonl"
    )
    order = "replay: lines match samples by id (default), or by their order, as in RULER's own files"
    group.add_argument("--predictions-order", choices=("ids", "lines"), help=order)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Where results go, and what may be spent."""
    group = parser.add_argument_group("run")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="a killed run goes on from here")
    group.add_argument("--limit-hours", type=float, metavar="H", help="refuse a run that is estimated to take longer")
    parts = group.add_mutually_exclusive_group()
    part = "answer one task at one length, counted from 0, length by length, into DIR/parts"
    parts.add_argument("--part", type=int, metavar="K", help=part)
    parts.add_argument("--merge", action="store_true", help="put the parts together, without a model, and report")
    left = "check everything that needs no GPU, and print the parts that are not whole"
    parts.add_argument("--list-parts", action="store_true", help=left)


def evaluation_parser(description: str) -> argparse.ArgumentParser:
    """The parser of an evaluation."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_prompt_options(parser)
    add_model_options(parser)
    add_run_options(parser)
    return parser


def comparison_parser() -> argparse.ArgumentParser:
    """The parser of `compare`."""
    text = "What changed between two evaluations on the same prompts, with 95 % intervals. Exits 1 on a regression."
    parser = argparse.ArgumentParser(prog="evaluate.py compare", description=text)
    parser.add_argument("base", type=Path, metavar="BASE", help="--output of the first evaluation")
    parser.add_argument("new", type=Path, metavar="NEW", help="--output of the second")
    bound = "points that a score or mean may fall before it counts as a regression"
    parser.add_argument("--max-regression", type=float, metavar="P", help=bound)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="for compare.json and the report; default NEW/compare"
    )
    return parser


def export_parser() -> argparse.ArgumentParser:
    """The parser of `export-harness`."""
    text = "Prepared prompts as tasks of lm-evaluation-harness: lm_eval --include_path DIR --tasks prepared"
    parser = argparse.ArgumentParser(prog="evaluate.py export-harness", description=text)
    given = "TASK-LENGTH.jsonl files, as make_ruler.py writes them"
    parser.add_argument("--prepared", type=Path, nargs="+", required=True, metavar="FILE", help=given)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    return parser


def doctor_parser() -> argparse.ArgumentParser:
    """The parser of `doctor`."""
    text = "What an evaluation needs, what is here of it, and the command that brings the rest. Fetches nothing."
    parser = argparse.ArgumentParser(prog="evaluate.py doctor", description=text)
    parser.add_argument("--data-dir", type=Path, metavar="D", help="where make_ruler.py fetch-data put the texts")
    parser.add_argument("--hf", type=Path, metavar="DIR", help="also look at this model")
    return parser


def report_parser() -> argparse.ArgumentParser:
    """The parser of `report`."""
    parser = argparse.ArgumentParser(prog="evaluate.py report", description="Draw a report from scores.json alone.")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the --output of an evaluation")
    return parser
