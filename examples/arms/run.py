#!/usr/bin/env python
"""Train one arm of the comparison: the flags of common.txt and ARM/args.txt, then yours, which win.

python examples/arms/run.py rpsd-skip --processes 2 --device cpu --pretrained-checkpoint checkpoints/smollm2 \\
    --data-path data/docs --seq-length 512 --micro-batch-size 1 --global-batch-size 2 --train-iters 20 --save runs/skip

On GPUs leave --device cpu out and add --bf16. On several nodes, let --print give the flags and start torchrun on each.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_rpsd.training.errors import quiet_parser

FOLDER = Path(__file__).resolve().parent
ARMS = tuple(sorted(path.parent.name for path in FOLDER.glob("*/args.txt")))


def read_flags(path: Path) -> list[str]:
    """The words of a file of flags; `#` starts a comment."""
    return shlex.split(path.read_text(), comments=True)


def arm_flags(arm: str) -> list[str]:
    """What makes the arm, behind what all arms share."""
    return [*read_flags(FOLDER / "common.txt"), *read_flags(FOLDER / arm / "args.txt")]


def main() -> int:
    """Exit code of the training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--processes", type=int, default=1, help="Processes on this machine, one a GPU. Default: 1.")
    parser.add_argument("--print", action="store_true", help="Print the training entry's flags and leave.")
    args, typed = quiet_parser(parser).parse_known_args()
    flags = [*arm_flags(args.arm), *typed]
    if args.print:
        print(shlex.join(flags))
        return 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    return subprocess.call([*torchrun, "-m", "megatron_rpsd.training.main", *flags])


if __name__ == "__main__":
    sys.exit(main())
