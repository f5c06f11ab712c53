#!/usr/bin/env python
"""Predicted step time, memory and MFU for 8 to 1,024 GPUs and 64K to 1M tokens, RPSD against CLM.

python tools/plan_scaling.py --model llama3-8b --gpu h100-80gb --output docs/plan_llama3_8b.md

Markdown, and a figure beside it as .png. Predictions, not measurements. Needs no GPU.
"""

import argparse
import sys
from pathlib import Path

from megatron_rpsd.data.files import replace_file
from megatron_rpsd.planning.known_models import planned_model
from megatron_rpsd.planning.plan_options import add_plan_options, machine_from, workload_from
from megatron_rpsd.planning.scaling import GPU_COUNTS, LENGTHS, scaling_markdown, scaling_rows, scaling_series
from megatron_rpsd.report.plan_figures import scaling_curves
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_plan_options(parser)
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=LENGTHS, help="Default: 64K to 1M.")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPU_COUNTS, help="Default: 8 to 1,024.")
    parser.add_argument("--output", type=Path, required=True, help="Markdown; the figure goes beside it.")
    args = quiet_parser(parser).parse_args()
    with one_line_errors():
        model = planned_model(args.model)
        gpu, assumptions = machine_from(args)
        rows = scaling_rows(
            model, lambda length: workload_from(args, length), gpu, assumptions, args.seq_lengths, args.gpus
        )
    text = scaling_markdown(rows, model, gpu, assumptions)
    title = f"{model.name} on {gpu.name}, predicted"
    figure = scaling_curves(scaling_series(rows), "GPUs", title, logarithmic=("RPSD step time, s",))
    replace_file(args.output.with_suffix(".png"), figure)
    replace_file(args.output, text.encode())
    print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
