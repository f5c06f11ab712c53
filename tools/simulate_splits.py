#!/usr/bin/env python
"""Expected step time against data-parallel size, for splits drawn independently and stratified.

python tools/simulate_splits.py --micro-steps 4 --output docs/split_sampling.json
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import matplotlib
from tqdm import tqdm

from megatron_rpsd.data.files import write_json
from megatron_rpsd.planning.split_waiting import expected_step_time
from megatron_rpsd.training.errors import one_line_errors, quiet_parser

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-steps", type=int, nargs="+", default=[1, 4], help="Micro-batches of a rank in a step.")
    parser.add_argument("--attention-share", type=float, default=0.5, help="Of one view's time.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", required=True, help="JSON; the figure goes beside it as .png.")
    args = quiet_parser(parser).parse_args()
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    rows = []
    with one_line_errors():
        for micro_steps in args.micro_steps:
            for size in tqdm(sizes, desc=f"{micro_steps} micro-steps", disable=not sys.stderr.isatty()):
                cost = expected_step_time(size, micro_steps, args.attention_share, steps=args.steps)
                rows.append({"micro_steps": micro_steps, **dataclasses.asdict(cost)})
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(6.4, 3.8), constrained_layout=True)
    for micro_steps, colour in zip(args.micro_steps, ("#0072B2", "#D55E00", "#009E73"), strict=False):
        mine = [row for row in rows if row["micro_steps"] == micro_steps]
        for way, style in (("independent", "-"), ("stratified", "--")):
            label = f"{way}, {micro_steps} micro-batches a rank"
            axis.plot(sizes, [row[way] for row in mine], style, color=colour, marker="o", markersize=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set(xlabel="data-parallel size (ranks)", ylabel="expected step time (one view = 1)", ylim=(1.4, 2.05))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="center right")
    figure.savefig(output.with_suffix(".png"), dpi=130)
    write_json(output, rows)
    for row in rows:
        print(f"M {row['micro_steps']}  DP {row['data_parallel_size']:4d}  "
              f"independent {row['independent']:.3f}  stratified {row['stratified']:.3f}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
