#!/usr/bin/env python
"""Time and peak memory of import and export beside a copy of the same tensors, in one process.

python tools/benchmark_conversion.py --hf models/smollm2 --output runs/bench/conversion.json
"""

import argparse
import sys
from pathlib import Path

from megatron_rpsd.data.files import write_json
from megatron_rpsd.training.errors import one_line_errors, quiet_parser
from megatron_rpsd.training.main import choose_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder.")
    parser.add_argument("--fetch-smollm2", action="store_true", help="Fetch SmolLM2-135M into --hf where it is absent.")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--force-cpu-runtime", action="store_true", help="Run beside a GPU, too.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; scratch files are written beside it.")
    args = quiet_parser(parser).parse_args()
    with one_line_errors():
        if args.repetitions < 1:
            raise ValueError(f"--repetitions {args.repetitions} must be at least 1")
        if args.fetch_smollm2:
            from megatron_rpsd.data.smollm2 import fetch

            fetch(args.hf)
        choose_device(["--device", "cpu"] + ["--force-cpu-runtime"] * args.force_cpu_runtime)
        from megatron_rpsd.planning.conversion_costs import WAYS, measure_conversion

        result = measure_conversion(args.hf, args.output.parent, args.repetitions, lambda line: print(line, flush=True))
    print(f"{'':8s} {'seconds':>8s} {'of copy':>8s} {'peak MiB':>9s}")
    for way in WAYS:
        ratio = f"{result['ratio'].get(way, 1):8.2f}"
        print(f"{way:8s} {result['seconds'][way]:8.2f} {ratio} {result['peak_bytes'][way] / 2**20:9.0f}")
    print(f"largest tensor {result['largest_tensor_bytes'] / 2**20:.0f} MiB of {result['model_bytes'] / 2**20:.0f} MiB")
    write_json(args.output, result)


if __name__ == "__main__":
    sys.exit(main())
