#!/usr/bin/env python
"""Convert between Hugging Face folders and Megatron torch_dist checkpoints.

python tools/convert_checkpoint.py import --hf models/smollm2 --output checkpoints/smollm2
python tools/convert_checkpoint.py export --checkpoint runs/adapted --hf-reference models/smollm2 --output adapted
python tools/convert_checkpoint.py verify --hf models/smollm2 --checkpoint checkpoints/smollm2
"""

import argparse
import sys
import time

from megatron_rpsd.training.errors import fail, one_line_errors, quiet_parser
from megatron_rpsd.training.main import choose_device


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Where the model is held meanwhile.")
    shared.add_argument("--force-cpu-runtime", action="store_true", help="Allow --device cpu beside a GPU.")
    imports = commands.add_parser("import", parents=[shared], help="Hugging Face folder -> torch_dist checkpoint")
    imports.add_argument("--hf", required=True)
    imports.add_argument("--output", required=True)
    exports = commands.add_parser("export", parents=[shared], help="newest checkpoint of a run -> Hugging Face folder")
    exports.add_argument("--checkpoint", required=True)
    exports.add_argument("--hf-reference", required=True, help="The folder that the model was imported from.")
    exports.add_argument("--output", required=True)
    exports.add_argument("--max-shard-gigabytes", type=float, default=5.0)
    verifies = commands.add_parser("verify", parents=[shared], help="compare every tensor, and the next tokens")
    verifies.add_argument("--hf", required=True)
    verifies.add_argument("--checkpoint", required=True)
    for command in (parser, imports, exports, verifies):
        quiet_parser(command)
    return parser.parse_args()


def main() -> None:
    args = parse()
    started = time.perf_counter()
    with one_line_errors():
        choose_device(["--device", args.device] + ["--force-cpu-runtime"] * args.force_cpu_runtime)
        from megatron_rpsd.checkpoint import convert

        if args.command == "import":
            parameters = convert.import_hf(args.hf, args.output, args.device)
            print(f"imported {parameters:,} parameters to {args.output} in {time.perf_counter() - started:.1f} s")
        elif args.command == "export":
            shard = args.max_shard_gigabytes * 1e9
            convert.export_hf(args.checkpoint, args.hf_reference, args.output, args.device, shard)
            print(f"exported {args.checkpoint} to {args.output} in {time.perf_counter() - started:.1f} s")
        else:
            compared, different = convert.different_tensors(args.hf, args.checkpoint, args.device)
            print(f"{compared} tensors compared, {compared - len(different)} bitwise equal")
            if different:
                fail(
                    f"--checkpoint {args.checkpoint}: {len(different)} tensors differ from {args.hf}, "
                    f"first {different[0]}"
                )


if __name__ == "__main__":
    sys.exit(main())
