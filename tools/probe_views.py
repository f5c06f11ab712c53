#!/usr/bin/env python
"""CLM loss and view KL of one token sequence under one perturbed view, at any parallel layout, on local CPU ranks.

python tools/probe_views.py --hf models/smollm2 --tokens window.npy --kind skip --split 256 --shift 64 \\
    --tensor-model-parallel-size 3 --context-parallel-size 2 --output probe.json
"""

import argparse
import sys

import numpy as np

from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.data.files import write_json
from megatron_rpsd.evaluation.launch import run_on_local_ranks
from megatron_rpsd.evaluation.probe import ParallelLayout, check_layout, probe_on_this_rank
from megatron_rpsd.evaluation.requests import check_heads, read_tokens, view_of
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, help="Hugging Face folder.")
    parser.add_argument("--tokens", required=True, help=".npy of L + 1 token ids; labels are the last L.")
    parser.add_argument("--kind", required=True, choices=("skip", "cyclic"))
    parser.add_argument("--split", type=int, required=True, help="First token with a perturbed position.")
    parser.add_argument(
        "--shift", type=int, default=None, help="Shift of the skip view (cyclic: always -L, leave out)."
    )
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--execution", choices=("full", "shared-prefix"), default="full")
    parser.add_argument("--output", required=True, help="JSON with clm_loss, kl_loss, split, length.")
    return quiet_parser(parser).parse_args()


def main() -> None:
    args = parse()
    with one_line_errors():
        folder = HFFolder(args.hf)
        tokens = read_tokens(args.tokens, folder.dimensions().vocab_size)
        length = len(tokens) - 1
        view = view_of(args.kind, args.split, args.shift, length)
        layout = ParallelLayout(
            args.tensor_model_parallel_size, args.context_parallel_size, args.pipeline_model_parallel_size,
            args.sequence_parallel,
        )  # fmt: skip
        check_heads(folder.dimensions(), layout)
        check_layout(length, view.split, layout, args.execution)
    windows = np.asarray(tokens)[None]
    result = run_on_local_ranks(probe_on_this_rank, layout.world_size, args.hf, windows, [view], layout, args.execution)
    write_json(args.output, vars(result[0][0]))
    print(f"clm_loss {result[0][0].clm_loss:.6f}  kl_loss {result[0][0].kl_loss:.6f}  -> {args.output}")


if __name__ == "__main__":
    sys.exit(main())
