"""The position lab: RPSD beside plain training and its controls, small enough for two CPU cores.

python -m examples.lab.run --output runs/lab

A two-layer model learns a synthetic retrieval language at 64 tokens, and is adapted to 512 on data whose evidence is
always near. How well it then finds evidence that stands far away is what the arms differ in. Every run is Megatron's
training loop through megatron_rpsd.training.main. Writes OUTPUT/report.html, OUTPUT/results.json and PNGs. Run it again
after an interruption, or with more arms, seeds or lengths: it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from examples.lab.arms import ARMS, MAIN_ARMS, needed_arms
from examples.lab.lab import Lab
from examples.lab.settings import LENGTHS, SEEDS, Paths, Settings
from examples.quickstart.console import StageFailed, only_run, terminate_as_interrupt
from megatron_rpsd.training.errors import fail, one_line_errors, quiet_parser


def _numbers(flag: str, least: int) -> Callable[[str], tuple[int, ...]]:
    def parse(typed: str) -> tuple[int, ...]:
        words = typed.replace(",", " ").split()
        if not words or not all(word.isdigit() and int(word) >= least for word in words):
            raise argparse.ArgumentTypeError(f"{typed!r}: give whole numbers of at least {least}, such as {flag}")
        return tuple(sorted({int(word) for word in words}))

    return parse


def _arm_names(typed: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(typed.replace(",", " ").split()))
    unknown = [name for name in names if name not in ARMS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{typed!r} names no arm: choose from {', '.join(ARMS)}")
    return names


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/lab"), help="Folder for everything.")
    parser.add_argument("--quick", action="store_true", help="One seed.")
    parser.add_argument(
        "--arms",
        type=_arm_names,
        default=MAIN_ARMS,
        metavar="A,B",
        help=f"Of {', '.join(ARMS)}. Default: the main arms.",
    )
    seeds = ",".join(str(seed) for seed in SEEDS)
    parser.add_argument(
        "--seeds", type=_numbers(seeds, 0), default=None, metavar=seeds,
        help=f"Default: {seeds}. The lab's settings were chosen on 0, 1 and 2.",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=_numbers("512,1024", 256), default=LENGTHS, metavar="512,1024",
        help="Of the exams, in tokens. Default: 512,1024,2048.",
    )  # fmt: skip
    args = quiet_parser(parser).parse_args(argv)
    if args.quick and args.seeds and len(args.seeds) > 1:
        fail(f"--quick runs one seed, --seeds names {len(args.seeds)}: leave one of the two out")
    args.seeds = args.seeds or (SEEDS[:1] if args.quick else SEEDS)
    return args


def run_lab(output: Path, settings: Settings, seeds: Sequence[int], arms: Sequence[str], lengths: Sequence[int]):
    """Run what is missing and write the report; the results.

    Raises:
        ValueError: the folder is something else's, or in use.
        StageFailed: a run ended badly.
    """
    from examples.lab.results import write_results

    paths = Paths(output)
    check_output(output)
    with only_run(output):
        records = Lab(paths, settings, seeds, needed_arms(tuple(arms)), lengths).run()
        return write_results(output, settings, records, lengths)


def check_output(output: Path) -> None:
    """Refuse a folder that holds anything but the lab's own files.

    Raises:
        ValueError: naming what it holds.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is not a folder")
    own = ("seed", "results.json", "report.html", ".lock", ".results.json", ".report.html")
    for entry in sorted(output.iterdir()) if output.exists() else ():
        if not entry.name.startswith(own) and entry.suffix != ".png":
            raise ValueError(f"--output {output} holds other things ({entry.name}); name a new or an empty folder")


def main() -> None:
    args = parse_arguments()
    terminate_as_interrupt()
    from examples.lab.results import failed_expectations, summary_lines

    try:
        with one_line_errors():
            results = run_lab(args.output, Settings(), args.seeds, args.arms, args.lengths)
    except StageFailed as failed:
        fail(str(failed))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print("\n" + "\n".join(summary_lines(results)))
    print(f"\nReport: {args.output / 'report.html'}   figures: {args.output / 'results.json'}")
    failed = failed_expectations(results)
    if failed and len(args.seeds) >= len(SEEDS):
        print("error: " + "; ".join(failed), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
