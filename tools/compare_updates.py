#!/usr/bin/env python
"""What training changed in W_q and W_k by RoPE frequency, layer and head; W_v beside them as a control.

Reads Hugging Face folders and Megatron checkpoints (with --hf-reference), one layer at a time, and writes a folder with
updates.json, layers.png (layer by frequency) and curve.png (mean, wavelengths, window).

python tools/compare_updates.py --before models/smollm2 --after models/adapted --output runs/updates
python tools/compare_updates.py --before models/smollm2 --after runs/first --hf-reference models/smollm2 \\
    --output runs/updates --window 131072
"""

import argparse
import sys

from tqdm import tqdm

from megatron_rpsd.analysis.updates import (
    PROJECTIONS,
    Updates,
    compare_updates,
    most_changed,
    open_weights,
    update_record,
)
from megatron_rpsd.checkpoint.partial_folder import partial_folder
from megatron_rpsd.data.files import replace_file, write_json
from megatron_rpsd.report.instruments import update_curves, update_heat_maps
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="Hugging Face folder or Megatron checkpoint folder.")
    parser.add_argument("--after", required=True, help="The same model after training.")
    parser.add_argument("--hf-reference", default=None, help="For Megatron checkpoints: what was imported.")
    parser.add_argument("--window", type=int, default=None, help="Tokens to mark. Default: the model's after training.")
    parser.add_argument("--output", required=True, help="Folder to make.")
    return quiet_parser(parser).parse_args()


def show(updates: Updates) -> None:
    """The table, and a line where the two models rotate differently."""
    if updates.base_before != updates.base_after:
        print(f"RoPE base {updates.base_before:g} before, {updates.base_after:g} after; wavelengths are those after")
    print("the frequencies whose W_q changed most, mean over layers and heads:")
    print(f"{'index':>5s} {'wavelength':>12s} " + " ".join(f"{name:>10s}" for name in PROJECTIONS))
    for row in most_changed(updates):
        numbers = " ".join(f"{row[name]:10.3e}" for name in PROJECTIONS)
        print(f"{row['index']:5d} {row['wavelength']:12.1f} {numbers}")


def main() -> None:
    args = parse()
    with one_line_errors():
        if args.window is not None and args.window < 1:
            raise ValueError(f"--window {args.window} must be at least 1 token")
        before, after = (open_weights(path, args.hf_reference) for path in (args.before, args.after))
        with tqdm(total=after.dims.num_layers, desc="layers", disable=not sys.stderr.isatty(), leave=False) as bar:
            updates = compare_updates(before, after, bar.update)
        window = args.window or updates.window
        with partial_folder(args.output) as folder:
            write_json(folder / "updates.json", update_record(updates, window))
            maps = update_heat_maps({name: updates.by_layer(name) for name in PROJECTIONS}, control="W_v")
            replace_file(folder / "layers.png", maps)
            curves = {name: updates.curve(name) for name in PROJECTIONS}
            replace_file(folder / "curve.png", update_curves(curves, updates.wavelengths, window))
    show(updates)
    print(f"-> {args.output}: updates.json, layers.png, curve.png")


if __name__ == "__main__":
    sys.exit(main())
