#!/usr/bin/env python
"""Speed of preparing data beside the tokenizer's own batch encoding, and memory at 1 and 8 times the input.

python tools/benchmark_data.py --tokenizer models/smollm2 --output runs/bench/data.json
"""

import argparse
import sys
from pathlib import Path

from megatron_rpsd.data.files import write_json
from megatron_rpsd.planning.data_costs import measure_preparation
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder.")
    parser.add_argument("--fetch-smollm2", action="store_true", help="Fetch SmolLM2-135M there where it is absent.")
    parser.add_argument("--megabytes", type=float, default=48, help="Of JSONL.")
    parser.add_argument("--workers", type=int, default=2, help="Processes of ours, threads of the peer.")
    parser.add_argument("--repetitions", type=int, default=3, help="Of both, in turn.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file.")
    args = quiet_parser(parser).parse_args()
    with one_line_errors():
        if args.fetch_smollm2:
            from megatron_rpsd.data.smollm2 import fetch

            fetch(args.tokenizer)
        result = measure_preparation(
            args.tokenizer, args.megabytes, args.workers, args.repetitions, lambda line: print(line, flush=True)
        )
    peaks = result["peak_bytes"]
    print(f"tokens a second over the tokenizer's own: {result['throughput_ratio']:.3f} by the clock, ", end="")
    print(f"{result['cpu_ratio']:.3f} by processor seconds")
    print(f"peak memory: {peaks['1x'] / 2**20:.0f} MiB, at 8 times the input {peaks['8x'] / 2**20:.0f} MiB")
    write_json(args.output, result)


if __name__ == "__main__":
    sys.exit(main())
