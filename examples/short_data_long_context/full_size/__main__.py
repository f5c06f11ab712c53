"""Print the flags of a full-size run, for the training entry: those of the named files, later ones win.

torchrun --nproc-per-node 8 --nnodes 4 ... -m megatron_rpsd.training.main \\
    $(python -m examples.short_data_long_context.full_size common extension kd layout_128k) \\
    --pretrained-checkpoint runs/short --teacher-checkpoint checkpoints/teacher --data-path data/short --save runs/long
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from examples.arms.run import read_flags
from megatron_rpsd.training.errors import quiet_parser

FOLDER = Path(__file__).resolve().parent
FILES = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", choices=FILES, metavar="FILE", help=f"Of {', '.join(FILES)}.")
    names = quiet_parser(parser).parse_args().files
    print(shlex.join(flag for name in names for flag in read_flags(FOLDER / f"{name}.txt")))


if __name__ == "__main__":
    main()
