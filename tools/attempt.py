#!/usr/bin/env python
"""What slurm/train.sbatch does before and after the ranks: check, count attempts, decide whether to queue again.

python tools/attempt.py begin runs/a --nodes 2 --ranks-per-node 8 --files examples/arms/common.txt -- --train-iters 100
python tools/attempt.py end runs/a --code 1

begin writes the command (RUN/command: arguments, each ended by a zero byte) and exits with 2 where it cannot run.
end prints what follows and exits with 0 (finished), 10 (queue again) or 1 (stop).
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rpsd.runs.attempts import Verdict, begin, end, write_command
from megatron_rpsd.training.errors import fail, one_line_errors, quiet_parser

EXIT_CODES = {Verdict.FINISHED: 0, Verdict.REQUEUE: 10, Verdict.STOP: 1}


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("run", type=Path, metavar="RUN")
    most = "Attempts in a row without a new checkpoint, after which the run stops. Default: 3."
    shared.add_argument("--max-fruitless", type=int, default=os.environ.get("RPSD_MAX_FRUITLESS", "3"), help=most)
    begins = commands.add_parser("begin", parents=[shared], help="before the ranks start")
    begins.add_argument("--nodes", type=int, required=True)
    begins.add_argument("--ranks-per-node", type=int, required=True, help="GPUs of a node.")
    begins.add_argument("--script", type=Path, help="The batch script; RUN keeps a copy.")
    begins.add_argument("--files", type=Path, nargs="*", default=[], metavar="ARGS_FILE", help="Files of flags.")
    ends = commands.add_parser("end", parents=[shared], help="after they left")
    ends.add_argument("--code", type=int, required=True, help="Their exit code.")
    for command in (parser, begins, ends):
        quiet_parser(command)
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]


def check(arguments: list[str], nodes: int, ranks_per_node: int) -> None:
    """Parse the training's arguments as rank 0 of the job would, on this host's CPU."""
    if nodes < 1 or ranks_per_node < 1:
        raise ValueError(
            f"{nodes} nodes x {ranks_per_node} ranks a node: ask Slurm for GPUs (--gpus-per-node), or set "
            "RPSD_RANKS_PER_NODE for ranks on CPUs"
        )
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(nodes * ranks_per_node), CUDA_VISIBLE_DEVICES="")
    os.environ.pop("MASTER_ADDR", None)
    sys.argv = [sys.argv[0], *arguments, "--device", "cpu", "--force-cpu-runtime"]
    from megatron_rpsd.training.main import check_command_line

    check_command_line()


def main() -> None:
    args, typed = parse(sys.argv[1:])
    if args.max_fruitless < 1:
        fail(f"--max-fruitless {args.max_fruitless} must be at least 1")
    if args.command == "end":
        ending = end(args.run, args.code, args.max_fruitless)
        print(f"{ending.verdict.value}: {ending.reason}", flush=True)
        raise SystemExit(EXIT_CODES[ending.verdict])
    with one_line_errors():
        arguments = write_command(args.run, args.files, typed, args.script)
        check(arguments, args.nodes, args.ranks_per_node)
        print(f"attempt of {args.run} from iteration {begin(args.run, args.max_fruitless)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
