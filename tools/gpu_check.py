#!/usr/bin/env python
"""What has to be right and fast on a GPU, on one GPU and without a network: a table, results.json and results.md.

python tools/gpu_check.py --output runs/gpu_check
python tools/gpu_check.py --only attention,loss,training --time-limit-minutes 9 --output runs/gpu_check

Every check runs in a process of its own; rows are written as they come, and what checks print goes to log.txt. A figure
that could not be found is a row with the reason. Exit code: 0, 1 where a row is bad, 2 without a GPU.
"""

import argparse
import sys
from pathlib import Path

import torch

from megatron_rpsd.planning.gpu_checks import CHECKS, Results, run_checks
from megatron_rpsd.planning.gpu_rows import machine_facts
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), help="NAME,...; default: all of them.")
    parser.add_argument("--time-limit-minutes", type=float, default=25.0, help="For all checks. Default: 25.")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), help="Folder. Default: runs/gpu_check.")
    return quiet_parser(parser).parse_args()


def main() -> int:
    args = parse()
    names = args.only or list(CHECKS)
    with one_line_errors():
        for name in names:
            if name not in CHECKS:
                raise ValueError(f"--only {name}: the checks are {', '.join(CHECKS)}")
        if args.time_limit_minutes <= 0:
            raise ValueError(f"--time-limit-minutes {args.time_limit_minutes:g} must be above 0")
        if not torch.cuda.is_available():
            raise ValueError("no GPU is visible to torch (torch.cuda.is_available() is False): nothing was checked")
    machine = machine_facts("cuda")
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "log.txt").unlink(missing_ok=True)
    results = Results(args.output, machine, lambda line: print(line, flush=True))
    run_checks(names, results, minutes=args.time_limit_minutes)
    counts = {verdict: sum(row.verdict == verdict for row in results.rows)
              for verdict in ("good", "bad", "measured", "not run")}  # fmt: skip
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), f"-> {args.output}/results.json")
    return int(counts["bad"] > 0)


if __name__ == "__main__":
    sys.exit(main())
