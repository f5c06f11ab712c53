#!/usr/bin/env python
"""Tokenizes text into Megatron's P.bin and P.idx, with P.json beside them: what they were made from.

A .jsonl file holds one document a line, any other file is one document.

Example:
    python tools/preprocess_data.py --input books/*.txt more.jsonl --tokenizer models/smollm2 \\
        --output-prefix data/books --seq-length 8192 --workers 8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rpsd.data.preprocess import PreprocessConfig, preprocess
from megatron_rpsd.training.errors import quiet_parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when the files are written, 2 with one line on stderr when they cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="text or .jsonl files")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="P", help="writes P.bin, P.idx, P.json")
    parser.add_argument("--seq-length", type=int, required=True, metavar="L", help="tokens of a training sample")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end documents with the tokenizer's end-of-sequence token",
    )
    parser.add_argument("--json-key", default="text", metavar="KEY", help="text in a .jsonl line (default: text)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize (default: 1)")
    args = quiet_parser(parser).parse_args(argv)
    try:
        manifest = preprocess(
            PreprocessConfig(
                inputs=args.input,
                tokenizer=args.tokenizer,
                output_prefix=args.output_prefix,
                seq_length=args.seq_length,
                append_eod=args.append_eod,
                json_key=args.json_key,
                workers=args.workers,
            )
        )
    except (ValueError, OSError) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.output_prefix}: {manifest.documents} documents ({manifest.empty_documents} empty ones left out), "
        f"{manifest.tokens} tokens, {manifest.windows} samples of {manifest.seq_length} tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
