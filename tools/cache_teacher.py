#!/usr/bin/env python
"""Keep a teacher's likeliest tokens of a run's training data, for --teacher-cache (the only teacher under a pipeline).

torchrun --nproc-per-node 2 tools/cache_teacher.py --output caches/teacher --device cpu \\
    --use-checkpoint-args --pretrained-checkpoint checkpoints/student --objective distill \\
    --teacher-checkpoint checkpoints/teacher --distill-top-k 64 \\
    --data-path data/docs --seq-length 512 --micro-batch-size 1 --global-batch-size 2 --train-iters 20 --lr 2e-5

Everything behind --output and --iterations-per-file is the run's own command line, with --teacher-checkpoint and
--distill-top-k in place of --teacher-cache, and without pipeline parallelism.
"""

import argparse
import os
from pathlib import Path

from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", required=True, type=Path, help="New folder of the cache.")
    parser.add_argument(
        "--iterations-per-file", type=int, default=16, help="Steps in a file, and in a rank's memory. Default: 16."
    )
    return quiet_parser(parser).parse_known_args()


def main() -> None:
    args, arguments = parse()
    with one_line_errors():
        from megatron_rpsd.training.main import choose_device

        choose_device(arguments)
        from megatron_rpsd.training.cache_writing import cache_teacher, report

        iterations = cache_teacher(args.output, arguments, args.iterations_per_file)
        if os.environ.get("RANK", "0") == "0":
            report(args.output, iterations)


if __name__ == "__main__":
    main()
