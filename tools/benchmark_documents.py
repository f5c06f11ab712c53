#!/usr/bin/env python
"""Cost of attention cut at document borders over attention on the whole window, beside the share of its work, and how
unevenly documents load context-parallel ranks.

python tools/benchmark_documents.py --seq-length 4096 --document-lengths 64 256 1024 4096 --output runs/documents.json
"""

import argparse
import sys

from megatron_rpsd.data.files import write_json
from megatron_rpsd.planning.document_costs import measure_packs, rank_imbalance
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, required=True, help="L of what is measured.")
    parser.add_argument("--document-lengths", type=int, nargs="+", required=True, help="Tokens; the last is cut at L.")
    parser.add_argument("--heads", type=int, default=8, help="Of 64 dimensions.")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--balance-length", type=int, default=65536, help="L over which ranks are compared; computed.")
    parser.add_argument("--context-parallel-size", type=int, default=8, help="Ranks that are compared.")
    parser.add_argument("--output", required=True)
    return quiet_parser(parser).parse_args()


def main() -> None:
    args = parse()
    length, cp = args.balance_length, args.context_parallel_size
    with one_line_errors():
        if args.seq_length < 2 or min(*args.document_lengths, args.repetitions, args.heads, cp, length) < 1:
            raise ValueError("--seq-length must be at least 2, all other numbers at least 1")
        if length % (2 * cp):
            raise ValueError(f"--balance-length {length} does not divide by 2 x --context-parallel-size = {2 * cp}")
        result = measure_packs(args.seq_length, args.document_lengths, args.heads, args.repetitions)
    print(f"whole window of {args.seq_length}: {result['whole_seconds']:.3f} CPU s")
    print(f"{'documents of':>14s} {'CPU s':>9s} {'ratio':>7s} {'work':>7s}")
    for row in result["packs"]:
        print(f"{row['document_length']:14d} {row['seconds']:9.3f} {row['ratio']:7.3f} {row['work']:7.3f}")
    print(f"busiest over mean rank at CP {cp}, {length} tokens:")
    result["imbalance"] = {}
    for mean in (length // 64, length // 8, length // 2):
        result["imbalance"][str(mean)] = rank_imbalance(length, cp, max(1, mean))
        print(f"{mean:14d} {result['imbalance'][str(mean)]:9.2f}")
    write_json(args.output, {**vars(args), **result})


if __name__ == "__main__":
    sys.exit(main())
