#!/usr/bin/env python
"""How a run is doing: progress, rate, estimated end, checkpoints, restarts and why, warnings, newest losses.

python tools/status.py runs/llama-64k
python tools/status.py runs/llama-64k --json

Reads the files of the run folder alone, on any host that sees them. Exits with 0 whatever the state is, and with 2
where the folder is no run.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rpsd.runs.status import read_status
from megatron_rpsd.runs.status_page import status_lines
from megatron_rpsd.training.errors import fail, one_line_errors, quiet_parser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="What was given as --run-dir.")
    parser.add_argument("--json", action="store_true", help="One JSON object in place of lines.")
    stale = "A run is silent when nothing was logged for K times the time of a step. Default: 10."
    parser.add_argument("--stale-after", type=float, default=10.0, metavar="K", help=stale)
    args = quiet_parser(parser).parse_args()
    if args.stale_after <= 0:
        fail(f"--stale-after {args.stale_after:g} must be a positive number")
    with one_line_errors():
        status = read_status(args.run, args.stale_after)
    print(json.dumps(status.as_json(), indent=2) if args.json else "\n".join(status_lines(status)))


if __name__ == "__main__":
    sys.exit(main())
