#!/usr/bin/env python
"""Text to Megatron's P.bin and P.idx; P.json beside them says what they were made from, P.sources where each token is.

Input: text, .jsonl, either under .gz or .zst, .parquet, repositories (folders, --mode repo). An interrupted run goes on
where it was when the same command is given again. --mode mix reads a recipe, --mode sft conversations.

Examples:
    python tools/preprocess_data.py --input books/*.txt more.jsonl.gz --tokenizer models/smollm2 \\
        --output-prefix data/books --seq-length 8192 --workers 8
    python tools/preprocess_data.py --mode mix --recipe mix.toml --tokenizer models/smollm2 \\
        --output-prefix data/mix --seq-length 65536 --workers 8
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rpsd.data.preprocess import MODES, SHARD_TOKENS
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when the files are written; 2 with one line on stderr when they cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    inputs = {"dest": "inputs", "type": Path, "nargs": "+", "default": [], "metavar": "FILE"}
    add("--input", **inputs, help="files, or folders with --mode repo")
    add("--tokenizer", required=True, help="Hugging Face folder, .model, .tiktoken, or tiktoken:NAME")
    add("--tiktoken-pattern", metavar="REGEX", help="how a .tiktoken file's tokenizer splits text (its pat_str)")
    add("--output-prefix", type=Path, required=True, metavar="P", help="writes P.bin, P.idx, P.json, ...")
    add("--seq-length", type=int, required=True, metavar="L", help="tokens of a training sample")
    add("--mode", choices=(*MODES, "mix", "sft"), default="concatenate", help="default: documents as they are")
    add("--recipe", type=Path, metavar="FILE", help="sources and their shares, TOML or JSON, for --mode mix")
    eod = "end documents with the tokenizer's end-of-sequence token"
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True, help=eod)
    add("--json-key", default="text", metavar="KEY", help="text in a .jsonl line, column of a .parquet (text)")
    add("--min-tokens", type=int, default=0, metavar="N", help="leave shorter documents out, and count them")
    add("--max-tokens", type=int, metavar="N", help="leave longer documents out, and count them")
    add("--on-error", choices=("stop", "skip"), default="stop", help="at a document that cannot be read")
    add("--seed", type=int, default=0, help="order of the files within a repository (default: 0)")
    add("--workers", type=int, default=1, metavar="N", help="processes that tokenize (default: 1)")
    add("--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="a run can go on from every N tokens")
    add("--histogram", action=argparse.BooleanOptionalAction, default=True, help="write P.lengths.png")
    args = vars(quiet_parser(parser).parse_args(argv))
    from megatron_rpsd.data.modes import prepare  # not at the top: workers read this file, too

    with one_line_errors():
        prepare(**args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
