#!/usr/bin/env python
"""Convert between Hugging Face folders and Megatron torch_dist checkpoints; torchrun shares the work among ranks.

python tools/convert_checkpoint.py import --hf models/smollm2 --output checkpoints/smollm2
torchrun --nproc-per-node 6 tools/convert_checkpoint.py import --hf models/smollm2 --output checkpoints/smollm2 \\
    --tensor-model-parallel-size 3 --pipeline-model-parallel-size 2
python tools/convert_checkpoint.py export --checkpoint runs/adapted --hf-reference models/smollm2 --output adapted
python tools/convert_checkpoint.py verify --hf models/smollm2 --checkpoint checkpoints/smollm2 --prompt "Once upon"
"""

import argparse
import os
import sys
import time

from megatron_rpsd.training.errors import one_line_errors, quiet_parser
from megatron_rpsd.training.main import choose_device


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Tensors stay on the CPU either way.")
    shared.add_argument("--force-cpu-runtime", action="store_true", help="Allow --device cpu beside a GPU.")
    shared.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=None, help="Default: as stored.")
    imports = commands.add_parser("import", parents=[shared], help="Hugging Face folder -> torch_dist checkpoint")
    imports.add_argument("--hf", required=True)
    imports.add_argument("--output", required=True)
    imports.add_argument("--tensor-model-parallel-size", type=int, default=1)
    imports.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    imports.add_argument("--decoder-first-pipeline-num-layers", type=int, default=None)
    imports.add_argument("--decoder-last-pipeline-num-layers", type=int, default=None)
    exports = commands.add_parser("export", parents=[shared], help="checkpoint of a run -> Hugging Face folder")
    exports.add_argument("--checkpoint", required=True)
    exports.add_argument("--iteration", type=int, default=None, help="Default: the newest.")
    exports.add_argument("--hf-reference", required=True, help="The folder that the model was imported from.")
    exports.add_argument("--output", required=True)
    exports.add_argument("--max-shard-gigabytes", type=float, default=5.0)
    exports.add_argument("--yarn-factor", type=float, default=None, help="Declare F times the window, by YaRN.")
    verifies = commands.add_parser("verify", parents=[shared], help="compare every tensor, and the next tokens")
    verifies.add_argument("--hf", required=True)
    other = verifies.add_mutually_exclusive_group(required=True)
    other.add_argument("--checkpoint")
    other.add_argument("--hf-exported", help="Another Hugging Face folder, in place of a checkpoint.")
    verifies.add_argument("--iteration", type=int, default=None, help="Default: the newest.")
    verifies.add_argument("--prompt", default=None, help="Compare the logits on this text too; a few hundred tokens.")
    for command in (parser, imports, exports, verifies):
        quiet_parser(command)
    return parser.parse_args()


def main() -> int:
    args = parse()
    started = time.perf_counter()
    with one_line_errors():
        choose_device(["--device", args.device] + ["--force-cpu-runtime"] * args.force_cpu_runtime)
        from megatron_rpsd.evaluation import conversion

        done = {"import": conversion.run_import, "export": conversion.run_export, "verify": conversion.run_verify}
        text, code = done[args.command](args)
    if os.environ.get("RANK", "0") == "0":
        print(f"{text} in {time.perf_counter() - started:.1f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
