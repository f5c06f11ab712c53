#!/usr/bin/env python
"""What training reads of P.bin: samples decoded, their documents and losses, and the positions of both views.

Writes a page with pictures, or traces a token to its file. Samples are consecutive windows of the .bin; with
--train-samples N those of a run of N samples for its --seed and --split. A file for --data-args-path is --data, too.

Example (--trace 3 1000 in place of --output prints where token 1000 of sample 3 came from):
    python tools/inspect_data.py --data data/books --tokenizer models/smollm2 --seq-length 8192 --output runs/books
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_rpsd.data.audit import Reading, audit
from megatron_rpsd.data.files import replace_file
from megatron_rpsd.data.manifest import check_files
from megatron_rpsd.data.samples import Order, data_prefixes, read_samples
from megatron_rpsd.positions import PERTURBATIONS, StepShape, ViewSampler
from megatron_rpsd.report import html
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for flag in ("--data", "--tokenizer", "--seq-length"):
        add(flag, required=True, type=int if flag == "--seq-length" else str, help="as for preprocess_data.py")
    add("--tiktoken-pattern", metavar="REGEX")
    add("--samples", type=int, default=4, metavar="N", help="the first N samples (default: 4)")
    add("--trace", type=int, nargs=2, metavar=("SAMPLE", "TOKEN"), help="print where a token came from")
    add("--verify", action="store_true", help="compare the files with the manifest's checksums first")
    add("--output", type=Path, metavar="DIR", help="for index.html and the pictures")
    add("--train-samples", type=int, metavar="N", help="of the run whose order is shown")
    add("--seed", type=int, default=1234, help="--seed of the run (Megatron's default: 1234)")
    add("--split", default="969, 30, 1", help="--split of the run (Megatron's default: 969, 30, 1)")
    add("--rpsd-seed", type=int, help="default: --seed")
    add("--rpsd-perturbation", choices=PERTURBATIONS, default="skip")
    add("--rpsd-max-shift", type=int, metavar="Y")
    add("--rpsd-split-granule", type=int, default=1)
    add("--step", type=int, nargs=3, metavar="N", help="global and micro batch, data-parallel size: stratified splits")
    for flag in ("--reset-position-ids", "--eod-mask-loss", "--perturb-documents"):
        add(flag, action="store_true", help="as in training")
    with one_line_errors():
        run(quiet_parser(parser).parse_args(argv))
    return 0


def run(args: argparse.Namespace) -> None:
    if not (args.trace or args.output or args.verify):
        raise ValueError("nothing to do: give --output DIR for the page, --trace SAMPLE TOKEN, or --verify")
    for prefix in data_prefixes(args.data) if args.verify else ():
        check_files(prefix)
    order = None if args.train_samples is None else Order(args.seed, args.split, args.train_samples)
    samples = read_samples(args.data, args.seq_length, order)
    encoder = samples.encoder(args.tokenizer, args.tiktoken_pattern)
    if args.trace is not None:
        for name, value in vars(samples.trace(*args.trace, encoder)).items():
            print(f"{name}: {value!r}")
    view = [args.seed if args.rpsd_seed is None else args.rpsd_seed, args.rpsd_perturbation, args.seq_length]
    view += [args.rpsd_max_shift, args.rpsd_split_granule]
    sampler = ViewSampler(*view, "stratified", StepShape(*args.step)) if args.step else ViewSampler(*view)
    reading = Reading(sampler, args.reset_position_ids, args.eod_mask_loss, args.perturb_documents)
    blocks = []
    for sample in range(min(args.samples, len(samples))) if args.output else ():
        shown = audit(samples, sample, encoder, reading)
        replace_file(args.output / f"sample{sample}.png", shown.png)
        blocks.append(html.section(
            f"Sample {sample}", html.figure(shown.png, "Positions of both views; below, where losses are.", "Lines"),
            html.table(["what", "value"], list(shown.facts.items())),
            html.table(["first token", "tokens", "text"], [(a, n, html.code_block(t)) for a, n, t in shown.documents]),
        ))  # fmt: skip
    if args.output:
        replace_file(args.output / "index.html", html.page(f"Data audit: {args.data}", *blocks).encode())
        print(f"{args.output / 'index.html'}: {len(blocks)} of {len(samples)} samples")


if __name__ == "__main__":
    sys.exit(main())
