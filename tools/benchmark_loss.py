#!/usr/bin/env python
"""Time and peak memory of the fused loss beside Megatron's and others', forward and backward, in one run.

python tools/benchmark_loss.py --tokens 2048 --hidden 1024 --vocab 128256 --tensor-model-parallel-size 2 \\
    --output runs/bench/loss.json
"""

import argparse
import sys

from megatron_rpsd.data.files import write_json
from megatron_rpsd.loss import DEFAULT_CHUNK_BYTES
from megatron_rpsd.planning.loss_costs import LossSizes, measure_loss_costs
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, required=True, help="Of the standard view.")
    parser.add_argument("--suffix-tokens", type=int, default=None, help="Read twice. Default: half of --tokens.")
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="Default: by device.")
    parser.add_argument("--loss-chunk-bytes", type=int, default=None, help="Default: as in training, by device.")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", required=True)
    return quiet_parser(parser).parse_args()


def main() -> None:
    args = parse()
    with one_line_errors():
        suffix = args.tokens // 2 if args.suffix_tokens is None else args.suffix_tokens
        for name in ("tokens", "hidden", "vocab", "tensor_model_parallel_size", "repetitions"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
        if not 1 <= suffix <= args.tokens:
            raise ValueError(f"--suffix-tokens {suffix} must be between 1 and --tokens {args.tokens}")
        if args.loss_chunk_bytes is not None and args.loss_chunk_bytes < 1:
            raise ValueError(f"--loss-chunk-bytes {args.loss_chunk_bytes} must be at least 1")
        cpu = args.device == "cpu"
        sizes = LossSizes(
            args.tokens, suffix, args.hidden, args.vocab, args.tensor_model_parallel_size, args.repetitions,
            args.loss_chunk_bytes or DEFAULT_CHUNK_BYTES[args.device],
            args.dtype or ("float32" if cpu else "bfloat16"), args.device,
        )  # fmt: skip
        result = measure_loss_costs(sizes, lambda line: print(line, flush=True))
    print(f"{'':24s} {'seconds':>8s} {'peak MiB':>9s} {'gradients differ by':>20s}")
    for name, row in result["implementations"].items():
        difference = f"{row['gradient_difference']:20.1e}" if "gradient_difference" in row else ""
        print(f"{name:24s} {row['seconds']:8.3f} {row['peak_bytes'] / 2**20:9.1f} {difference}")
    for name, reason in result["missing"].items():
        print(f"{name}: left out, {reason}")
    if args.vocab % args.tensor_model_parallel_size:
        print("--vocab does not divide by the ranks: peers give the padded columns probability, so gradients differ")
    for key in ("ratio_seconds", "ratio_peak_bytes", "ratio_seconds_bare"):
        if key in result:
            print(f"{key}: {result[key]:.3f}")
    write_json(args.output, result)


if __name__ == "__main__":
    sys.exit(main())
