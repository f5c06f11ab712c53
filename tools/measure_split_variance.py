#!/usr/bin/env python
"""Variance of the KL's gradient under --rpsd-apply-probability and --rpsd-split-density, on a real model.

python tools/measure_split_variance.py --hf models/smollm2 --windows held_out.npy --output docs/split_variance.json
"""

import argparse
import sys

import numpy as np

from megatron_rpsd.data.files import write_json
from megatron_rpsd.planning.split_variance import kl_gradient_norms, variance_ratio
from megatron_rpsd.positions import ViewSampler
from megatron_rpsd.training.errors import one_line_errors, quiet_parser
from megatron_rpsd.training.main import choose_device

SETTINGS = [(1.0, 0.0), (0.75, 0.0), (0.5, 0.0), (0.25, 0.0), (1.0, 0.3), (1.0, 0.6), (1.0, 0.9)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True)
    parser.add_argument("--windows", required=True, help=".npy int64 [N, L + 1].")
    parser.add_argument("--count", type=int, default=2, help="Windows to use.")
    parser.add_argument("--strata", type=int, default=8, help="Splits at the middles of so many equal strata.")
    parser.add_argument("--output", required=True)
    args = quiet_parser(parser).parse_args()
    with one_line_errors():
        choose_device(["--device", "cpu"])
        windows = np.load(args.windows, allow_pickle=False)[: args.count]
        length = windows.shape[1] - 1
        splits = [int((k + 0.5) / args.strata * length) for k in range(args.strata)]
        squares, mean = kl_gradient_norms(args.hf, windows, splits, lambda line: print(line, flush=True))
    rows = []
    for probability, density in SETTINGS:
        sampler = ViewSampler(0, "skip", length, apply_probability=probability, split_density=density)
        linear, attention = sampler.expected_suffix()
        row = {"apply_probability": probability, "split_density": density}
        row |= {"linear": 1 + linear, "attention": 1 + attention}
        row["variance_ratio"] = variance_ratio(squares, mean, probability, density)
        rows.append(row)
        print("  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    write_json(args.output, {"splits": splits, "squares": squares, "mean_square": mean, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
