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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from examples.lab.arms import ARMS, MAIN_ARMS, needed_arms
from examples.lab.lab import Lab
from examples.lab.settings import LENGTHS, SEEDS, Paths, Settings
from examples.quickstart.console import StageFailed, only_run, terminate_as_interrupt
from megatron_rpsd.training.errors import fail, one_line_errors, quiet_parser


def numbers(example: str, least: int) -> Callable[[str], tuple[int, ...]]:
    """A parser of whole numbers from `least` on, such as the example, for argparse."""

    def parse(typed: str) -> tuple[int, ...]:
        words = typed.replace(",", " ").split()
        if not words or not all(word.isdigit() and int(word) >= least for word in words):
            raise argparse.ArgumentTypeError(f"{typed!r}: give whole numbers of at least {least}, such as {example}")
        return tuple(sorted({int(word) for word in words}))

    return parse


def names_among(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of names of arms, for argparse."""

    def parse(typed: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(typed.replace(",", " ").split()))
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{typed!r} names no arm: choose from {', '.join(known)}")
        return names

    return parse


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/lab"), help="Folder for everything.")
    parser.add_argument("--quick", action="store_true", help="One seed.")
    parser.add_argument(
        "--arms",
        type=names_among(tuple(ARMS)),
        default=MAIN_ARMS,
        metavar="A,B",
        help=f"Of {', '.join(ARMS)}. Default: the main arms.",
    )
    add_exams(parser, SEEDS, LENGTHS, "The lab's settings were chosen on 0, 1 and 2.")
    return parse_exams(parser, SEEDS, argv)


def add_exams(parser: argparse.ArgumentParser, seeds: Sequence[int], lengths: Sequence[int], about_seeds: str) -> None:
    """--seeds and --lengths."""
    shown = ",".join(map(str, seeds))
    parser.add_argument(
        "--seeds", type=numbers(shown, 0), default=None, metavar=shown, help=f"Default: {shown}. {about_seeds}"
    )
    parser.add_argument(
        "--lengths", type=numbers("512,1024", 256), default=lengths, metavar="512,1024",
        help=f"Of the exams, in tokens. Default: {','.join(map(str, lengths))}.",
    )  # fmt: skip


def parse_exams(
    parser: argparse.ArgumentParser, seeds: Sequence[int], argv: Sequence[str] | None
) -> argparse.Namespace:
    """The command line; --quick runs the first of `seeds` unless another one is named."""
    args = quiet_parser(parser).parse_args(argv)
    if args.quick and args.seeds and len(args.seeds) > 1:
        fail(f"--quick runs one seed, --seeds names {len(args.seeds)}: leave one of the two out")
    args.seeds = args.seeds or tuple(seeds[:1] if args.quick else seeds)
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


def run_and_report(run: Callable[[], Mapping], output: Path, full: bool) -> None:
    """Run, print the summary, and leave with code 1 if this is a full run and something did not hold."""
    terminate_as_interrupt()
    from examples.lab.results import failed_expectations, summary_lines

    try:
        with one_line_errors():
            results = run()
    except StageFailed as failed:
        fail(str(failed))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print("\n" + "\n".join(summary_lines(results)))
    print(f"\nReport: {output / 'report.html'}   figures: {output / 'results.json'}")
    failed = failed_expectations(results)
    if failed and full:
        print("error: " + "; ".join(failed), file=sys.stderr)
        raise SystemExit(1)


def main() -> None:
    args = parse_arguments()
    run_and_report(
        lambda: run_lab(args.output, Settings(), args.seeds, args.arms, args.lengths),
        args.output,
        full=len(args.seeds) >= len(SEEDS),
    )


if __name__ == "__main__":
    main()
