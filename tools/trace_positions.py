#!/usr/bin/env python
"""How a shift of positions travels through a model, from queries and keys to the logits, on repeated random chunks.

Reads the same tokens under standard positions and with the positions from one repeat on shifted, and writes a folder
with trace.json, shift-N.png (layer by repeat, a panel for every quantity) and divergence.png.

python tools/trace_positions.py --hf models/smollm2 --chunk 64 --repeats 8 --shift-repeat 5 --shifts 1 8 64 256 \\
    --output runs/trace
python tools/trace_positions.py --checkpoint runs/first --hf-reference models/smollm2 --output runs/trace
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_rpsd.analysis.trace import SCOPES, Trace, TraceSettings, load_traced_model, trace_positions, trace_record
from megatron_rpsd.analysis.trace import model_folder as traced_folder
from megatron_rpsd.checkpoint.partial_folder import partial_folder, refuse_existing
from megatron_rpsd.data.files import replace_file, write_json
from megatron_rpsd.report.instruments import divergence_curves, trace_heat_maps
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--hf", help="Hugging Face folder.")
    model.add_argument("--checkpoint", help="Megatron checkpoint folder; needs --hf-reference.")
    parser.add_argument("--hf-reference", default=None, help="The folder that --checkpoint was imported from.")
    parser.add_argument("--chunk", type=int, default=64, help="Tokens of a repeat. Default: 64.")
    parser.add_argument("--repeats", type=int, default=8, help="Default: 8.")
    parser.add_argument("--shift-repeat", type=int, default=5, help="First shifted repeat, from 0. Default: 5.")
    parser.add_argument("--shifts", type=int, nargs="+", default=[1, 8, 64, 256], help="Positions; one reading each.")
    parser.add_argument(
        "--scope", choices=SCOPES, default="onward", help="Shift all repeats from that one on (default), or it alone."
    )
    parser.add_argument("--sequences", type=int, default=4, help="Random chunks to average over. Default: 4.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda.")
    parser.add_argument("--output", required=True, help="Folder to make.")
    return quiet_parser(parser).parse_args()


def write(folder, trace: Trace, record: dict, name: str) -> None:
    write_json(folder / "trace.json", record)
    for shift, changes in trace.changes.items():
        maps = {quantity: trace.per_repeat(values) for quantity, values in changes.items()}
        title = f"{Path(name).name}: positions shifted by {shift} ({trace.settings.scope})"
        replace_file(folder / f"shift-{shift}.png", trace_heat_maps(maps, trace.settings.shift_repeat, title))
    repeats = {f"shift {shift}": trace.per_repeat(kl) for shift, kl in trace.kl.items()}
    distances = {f"shift {shift}": trace.by_distance(kl) for shift, kl in trace.kl.items()}
    replace_file(folder / "divergence.png", divergence_curves(repeats, distances, trace.settings.distances))


def main() -> None:
    args = parse()
    with one_line_errors():
        settings = TraceSettings(
            args.chunk, args.repeats, args.shift_repeat, tuple(args.shifts), args.scope, args.sequences, args.seed
        )
        refuse_existing(Path(args.output))
        with traced_folder(args.hf, args.checkpoint, args.hf_reference) as (hf, name):
            model = load_traced_model(hf, args.device)
        readings = settings.sequences * (1 + len(settings.shifts))
        with tqdm(total=readings, desc="readings", disable=not sys.stderr.isatty(), leave=False) as bar:
            trace = trace_positions(model, settings, bar.update)
        record = {"model": name, **trace_record(trace)}
        with partial_folder(args.output) as folder:
            write(folder, trace, record, name)
    for shift, kl in trace.kl.items():
        print(f"shift {shift:6d}: KL by repeat {' '.join(f'{value:.4f}' for value in trace.per_repeat(kl))}")
    print(f"largest change before the shift: {trace.largest_before_border():g} -> {args.output}")


if __name__ == "__main__":
    sys.exit(main())
