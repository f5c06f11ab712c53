#!/usr/bin/env python
"""Peak memory of the loss against the vocabulary and against tokens: fused, and Megatron's with a dense KL.

python tools/plot_loss_memory.py --output docs/loss_memory.json
"""

import argparse
import sys
from pathlib import Path

import matplotlib
from tqdm import tqdm

from megatron_rpsd.data.files import write_json
from megatron_rpsd.planning.loss_costs import LossSizes, measure_loss_costs
from megatron_rpsd.training.errors import one_line_errors, quiet_parser

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NAMES = {"fused": "fused, 64 MiB chunks", "megatron+dense-kl": "Megatron's cross-entropy, dense KL"}
COLOURS = ("#0072B2", "#D55E00")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[16384, 32768, 65536, 131072])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--output", required=True, help="JSON; the figure goes beside it as .png.")
    args = quiet_parser(parser).parse_args()
    sweeps = {
        "vocabulary": [(args.tokens[1], vocabulary) for vocabulary in args.vocabularies],
        "tokens": [(tokens, args.vocabularies[1]) for tokens in args.tokens],
    }
    rows = []
    with one_line_errors():
        points = [(name, *point) for name, sweep in sweeps.items() for point in sweep]
        for name, tokens, vocabulary in tqdm(points, desc="sizes", disable=not sys.stderr.isatty()):
            sizes = LossSizes(
                tokens, tokens // 2, args.hidden, vocabulary, repetitions=1,
                peers=("megatron+dense-kl",), bare_products=False,
            )  # fmt: skip
            measured = measure_loss_costs(sizes)["implementations"]
            peaks = {peer: row["peak_bytes"] for peer, row in measured.items()}
            rows.append({"sweep": name, "tokens": tokens, "vocabulary": vocabulary, "peak_bytes": peaks})
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), constrained_layout=True, sharey=True)
    for axis, (name, sweep) in zip(axes, sweeps.items(), strict=True):
        mine = [row for row in rows if row["sweep"] == name]
        for (peer, label), colour in zip(NAMES.items(), COLOURS, strict=True):
            peaks = [row["peak_bytes"][peer] / 2**20 for row in mine]
            axis.plot([row[name] for row in mine], peaks, marker="o", color=colour, label=label)
        fixed = f"{sweep[0][0]:,} tokens" if name == "vocabulary" else f"vocabulary {sweep[0][1]:,}"
        axis.set(xscale="log", yscale="log", xlabel=f"{name} ({fixed})")
        axis.set_xticks([row[name] for row in mine], [f"{row[name]:,}" for row in mine])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("MiB above inputs and gradients")
    axes[0].legend(frameon=False, fontsize=8)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output.with_suffix(".png"), dpi=130)
    write_json(output, rows)


if __name__ == "__main__":
    sys.exit(main())
