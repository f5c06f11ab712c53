#!/usr/bin/env python
"""Cost of an RPSD step over a CLM step: a whole second view (full) and a shared prefix, beside the FLOP bound.

python tools/benchmark_views.py --seq-length 4096 --vocab-size 4096 --output runs/bench/views.json
"""

import argparse
import sys

from megatron_rpsd.data.files import write_json
from megatron_rpsd.planning import ModelShape
from megatron_rpsd.planning.view_costs import CostSettings, measure_view_costs
from megatron_rpsd.training.errors import one_line_errors, quiet_parser
from megatron_rpsd.training.main import choose_device


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=512, help="In heads of 64.")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--splits", type=int, default=8, help="Equal strata of the sequence, one split in each.")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", required=True)
    return quiet_parser(parser).parse_args()


def main() -> None:
    args = parse()
    with one_line_errors():
        if args.hidden_size < 64 or args.hidden_size % 64:
            raise ValueError(f"--hidden-size {args.hidden_size} must be a multiple of 64, the head dimension")
        if args.seq_length < 32 * args.splits or args.splits < 1 or args.repetitions < 1:
            raise ValueError(
                f"--seq-length {args.seq_length} must be at least 32 x --splits {args.splits}, both positive"
            )
        choose_device(["--device", args.device])
        heads = args.hidden_size // 64
        ffn = args.hidden_size * 8 // 3 // 128 * 128 or 128
        shape = ModelShape(args.num_layers, args.hidden_size, ffn, heads, heads, 64, args.vocab_size)
        settings = CostSettings(args.seq_length, shape, args.splits, args.repetitions, args.device)
        result = measure_view_costs(settings, lambda line: print(line, flush=True))
    print(f"{'':14s} {'step ratio':>11s} {'FLOP bound':>11s} {'activation MiB':>15s}")
    for way in ("clm", "full", "shared-prefix"):
        ratio, bound = result["step_ratio"].get(way, 1.0), result["flop_bound"].get(way, 1.0)
        print(f"{way:14s} {ratio:11.3f} {bound:11.3f} {result['activation_bytes'][way] / 2**20:15.0f}")
    write_json(args.output, result)


if __name__ == "__main__":
    sys.exit(main())
