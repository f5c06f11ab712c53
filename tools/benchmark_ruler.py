#!/usr/bin/env python
"""Time of making RULER's niah_multikey_2 beside RULER's plain procedure, in one process; both give the same bytes.

python tools/benchmark_ruler.py --tokenizer models/smollm2 --output runs/bench/ruler.json
"""

import argparse
import sys
from pathlib import Path

from megatron_rpsd.data.files import write_json
from megatron_rpsd.planning.ruler_costs import measure_prompts
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder.")
    parser.add_argument("--fetch-smollm2", action="store_true", help="Fetch SmolLM2-135M there where it is absent.")
    parser.add_argument("--length", type=int, default=65536, help="Tokens, those of the answer included.")
    parser.add_argument("--samples", type=int, default=100, help="Of both; fewer weigh the word pairs' list more.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file.")
    args = quiet_parser(parser).parse_args()
    with one_line_errors():
        if args.fetch_smollm2:
            from megatron_rpsd.data.smollm2 import fetch

            fetch(args.tokenizer)
        result = measure_prompts(args.tokenizer, args.length, args.samples, lambda line: print(line, flush=True))
    print(f"ours over plain: {result['ratio']:.3f} by the clock, {result['cpu_ratio']:.3f} of the processor")
    write_json(args.output, result)


if __name__ == "__main__":
    sys.exit(main())
