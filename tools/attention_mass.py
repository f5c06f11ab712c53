#!/usr/bin/env python
"""How much attention a prompt's last queries pay to the evidence, the first tokens, the last tokens, and the rest.

Reads one prepared file of tools/make_ruler.py (niah and vt know where their evidence stands) and writes FILE.json and
FILE.png: a map of layers and heads for each share, and the share on the evidence by the evidence's depth.

Example:
    python tools/attention_mass.py --hf models/smollm2 --compare-with models/adapted --num-samples 40 \\
        --prepared runs/ruler/niah_single_1-1024.jsonl --output runs/attention/smollm2.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, metavar="DIR", help="a Hugging Face model folder")
    parser.add_argument("--compare-with", metavar="DIR", help="a second model of the same shape and tokenizer")
    parser.add_argument("--prepared", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--num-samples", type=int, metavar="K", help="the first K prompts; default: all")
    parser.add_argument("--sink-tokens", type=int, default=4, help="first tokens that count as sink; default 4")
    parser.add_argument("--local-window", type=int, default=128, help="last tokens that count as local; default 128")
    parser.add_argument("--query-rows", type=int, default=1, help="last queries that are averaged; default 1")
    parser.add_argument("--chunk-tokens", type=int, default=2048, help="tokens through the model at once; default 2048")
    parser.add_argument("--bos", choices=("auto", "add", "none"), default="auto", help="auto: as the tokenizer does")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    return quiet_parser(parser).parse_args()


def _show(model: str, done: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{model}: {done} prompts ", end="", file=sys.stderr, flush=True)


def main() -> None:
    args = _arguments()
    with one_line_errors():
        if args.output.suffix != ".json":
            raise ValueError(f"--output {args.output} must end in .json")
        from megatron_rpsd.analysis.attention_mass import MassSettings
        from megatron_rpsd.analysis.attention_study import run_study
        from megatron_rpsd.data.files import replace_file, write_json
        from megatron_rpsd.report.attention_mass import attention_figure

        models = [args.hf, *([args.compare_with] if args.compare_with else [])]
        settings = MassSettings(args.sink_tokens, args.local_window, args.query_rows, args.chunk_tokens)
        asked = (args.num_samples, args.dtype, args.device, args.bos)
        study = run_study(models, args.prepared, settings, *asked, _show)
    write_json(args.output, study)
    replace_file(args.output.with_suffix(".png"), attention_figure(study))
    print(f"{args.output} and {args.output.with_suffix('.png').name}: {len(study['models'][0]['prompts'])} prompts")


if __name__ == "__main__":
    main()
