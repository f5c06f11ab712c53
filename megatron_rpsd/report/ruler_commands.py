"""The commands of `tools/evaluate.py`, from parsed options to files, text and exit code."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_rpsd.data.files import replace_file, write_json


def run_evaluation(args: argparse.Namespace) -> int:
    """Evaluate; OUTPUT then also holds samples.jsonl, scores.json and the report. A part alone has no scores."""
    from megatron_rpsd.evaluation.ruler_evaluation import evaluate
    from megatron_rpsd.evaluation.ruler_parts import evaluate_part, merge_parts, parts_left
    from megatron_rpsd.evaluation.scores import samples_file

    try:
        if args.list_parts:
            print("".join(f"{number} {name}\n" for number, name in parts_left(args)), end="")
            return 0
        if args.part is not None:
            evaluate_part(args)
            return 0
        scores, rows = merge_parts(args) if args.merge else evaluate(args)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, no permission, a model without weights
        raise ValueError(str(error)) from error
    replace_file(args.output / "samples.jsonl", samples_file(rows))
    write_json(args.output / "scores.json", scores)
    return run_report(args)


def _scores(output: Path) -> dict:
    path = output / "scores.json"
    if not path.is_file():
        raise ValueError(f"{output} holds no scores.json; it is written at the end of an evaluation")
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is no JSON: repeat the evaluation's command, its predictions are kept") from None


def run_report(args: argparse.Namespace) -> int:
    """Draw OUTPUT's report from its scores.json alone, and print the table."""
    scores = _scores(args.output)
    from megatron_rpsd.report.ruler_report import write_report
    from megatron_rpsd.report.ruler_table import terminal_table

    print(f"{terminal_table(scores)}\n{write_report(scores, args.output)[0]}")
    return 0


def run_comparison(args: argparse.Namespace) -> int:
    """compare.json and its page; 1 where there are regressions."""
    from megatron_rpsd.evaluation.compare import compare
    from megatron_rpsd.report.ruler_report import write_comparison

    found, output = compare(args.base, args.new, args.max_regression), args.output or args.new / "compare"
    write_json(output / "compare.json", found)
    print(write_comparison(found, _scores(args.base), _scores(args.new), output)[0])
    for row in found["regressions"]:
        print(f"regression: {row['task']} at {row['length']}: {row['difference']:+.2f} points")
    return int(bool(found["regressions"]))


def run_doctor(args: argparse.Namespace) -> int:
    """Print what is here and what is missing; 1 where an essential is."""
    from megatron_rpsd.evaluation.doctor import findings, report

    text, code = report(findings(args.data_dir, args.hf))
    print(text)
    return code


def run_export(args: argparse.Namespace) -> int:
    """Write the folder for lm-evaluation-harness; its tasks' names go to stdout."""
    from megatron_rpsd.evaluation.harness import export_harness

    print("\n".join(export_harness(args.prepared, args.output)))
    return 0
