"""The modes of tools/preprocess_data.py, each with its summary and the picture of its lengths."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rpsd.data.conversations import prepare_conversations
from megatron_rpsd.data.mixture import prepare_mixture
from megatron_rpsd.data.pictures import draw_lengths
from megatron_rpsd.data.preprocess import PreprocessConfig, describe, preprocess
from megatron_rpsd.data.shards import write_durably


def prepare(recipe: Path | None, histogram: bool, **settings) -> None:
    """Prepares data in one of the modes, and prints what was made.

    Args:
        recipe: of --mode mix.
        histogram: write P.lengths.png.
        settings: by the names of `PreprocessConfig`; mode may also be mix or sft.

    Raises:
        ValueError: what the settings or the inputs have wrong.
    """
    if (settings["mode"] == "mix") != (recipe is not None):
        raise ValueError("--mode mix and --recipe FILE go together")
    if settings["mode"] == "mix" and settings["inputs"]:
        raise ValueError("--input and --mode mix: the recipe names the inputs; leave --input out")
    if settings["mode"] == "sft":
        print(prepare_conversations(settings["inputs"], settings, _say))
        return
    if settings["mode"] == "mix":
        made = prepare_mixture(recipe, settings, _say)
    else:
        made = {settings["output_prefix"]: preprocess(PreprocessConfig(**settings), _say)}
    for prefix, manifest in made.items():
        print(describe(prefix, manifest))
        if histogram:
            write_durably(Path(f"{prefix}.lengths.png"), draw_lengths(manifest))


def _say(line: str) -> None:
    print(f"preprocess_data: {line}", file=sys.stderr, flush=True)
