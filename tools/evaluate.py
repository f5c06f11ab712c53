#!/usr/bin/env python
"""Evaluate a model on RULER and draw its report: scores by task and length, and where in the prompt they are lost.

OUTPUT holds run.json (what was run), predictions/, scores.json, samples.jsonl, report.html and figures/. A killed run
goes on when its command is repeated. Further commands: `evaluate.py compare BASE NEW` (two outputs on the same
prompts), `report OUTPUT` (drawn again from scores.json), `export-harness` (prompts for lm-evaluation-harness) and
`doctor` (what is installed, what is missing).

Example:
    python tools/evaluate.py --hf models/smollm2 --tasks all --lengths 4096 8192 --data-dir data/ruler \\
        --output runs/ruler/smollm2
    python tools/evaluate.py --hf models/smollm2 --tasks niah_single_1 --lengths 32768 --yarn-factor auto \\
        --num-samples 50 --output runs/ruler/smollm2-yarn
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rpsd.evaluation import ruler_options as options
from megatron_rpsd.report import ruler_commands as commands
from megatron_rpsd.training.errors import one_line_errors, quiet_parser

COMMANDS = {
    "compare": (options.comparison_parser, commands.run_comparison),
    "report": (options.report_parser, commands.run_report),
    "export-harness": (options.export_parser, commands.run_export),
    "doctor": (options.doctor_parser, commands.run_doctor),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        make_parser, run = COMMANDS[argv.pop(0)]
        parser = make_parser()
    else:
        parser, run = options.evaluation_parser(__doc__), commands.run_evaluation
    with one_line_errors():
        return run(quiet_parser(parser).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
