"""Short data, long context: a student learns long retrieval from a teacher's logits on packed short samples.

python -m examples.short_data_long_context.run --output runs/short_long

The experiment of arXiv 2604.06070 on a two-layer model and a synthetic retrieval language: pre-training at 64 tokens, a
teacher extended to 512 tokens on long documents, students extended on windows of 512 packed with samples of 32 to 64
tokens, by cross-entropy or by the teacher's logits, under three RoPE schedules. Every run is Megatron's training loop
through megatron_rpsd.training.main. Writes OUTPUT/report.html, OUTPUT/results.json and PNGs. Run it again after an
interruption, or with more arms, seeds or lengths: it goes on with what is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.lab.run import add_exams, check_output, names_among, parse_exams, run_and_report
from examples.lab.settings import Paths
from examples.quickstart.console import only_run
from examples.short_data_long_context.arms import QUICK_STUDENTS, STUDENTS
from examples.short_data_long_context.settings import LENGTHS, SEEDS, Settings


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/short_long"), help="Folder for everything.")
    parser.add_argument("--quick", action="store_true", help=f"One seed and the students {', '.join(QUICK_STUDENTS)}.")
    parser.add_argument(
        "--arms",
        type=names_among(STUDENTS),
        default=None,
        metavar="A,B",
        help=f"Students, of {', '.join(STUDENTS)}. Default: all.",
    )
    add_exams(parser, SEEDS, LENGTHS, "The settings were chosen on 3.")
    args = parse_exams(parser, SEEDS, argv)
    args.arms = args.arms or (QUICK_STUDENTS if args.quick else STUDENTS)
    return args


def run_short_long(
    output: Path, settings: Settings, seeds: Sequence[int], students: Sequence[str], lengths: Sequence[int]
) -> dict:
    """Run what is missing and write the report; the results.

    Raises:
        ValueError: the folder is something else's, or in use.
        StageFailed: a run ended badly.
    """
    from examples.short_data_long_context.experiment import Experiment
    from examples.short_data_long_context.results import write_results

    check_output(output)
    with only_run(output):
        records = Experiment(Paths(output), settings, seeds, students, lengths).run()
        return write_results(output, settings, records, lengths)


def main() -> None:
    args = parse_arguments()
    run_and_report(
        lambda: run_short_long(args.output, Settings(), args.seeds, args.arms, args.lengths),
        args.output,
        full=len(args.seeds) >= len(SEEDS) and set(args.arms) == set(STUDENTS),
    )


if __name__ == "__main__":
    main()
