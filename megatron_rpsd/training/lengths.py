"""`--length-mix`: windows of --seq-length read as shorter sequences on a share of the micro-steps."""

from __future__ import annotations

import argparse

from megatron_rpsd.positions import LengthSchedule, MixedLengths, StepShape, parse_share, scaled_step
from megatron_rpsd.training.arms import sampler_from_args, suffix_unit


def add_length_arguments(group) -> None:
    """Add the flag to the parser's group."""
    group.add_argument(
        "--length-mix", nargs="+", metavar="SHARE:LENGTH", default=None,
        help="Read the windows of a share of the micro-steps as sequences of LENGTH tokens, each with its own view, "
        "e.g. 0.5:65536 0.5:8192 with --seq-length 65536. Shares sum to 1. Default: whole windows.",
    )  # fmt: skip


def mixed_lengths_from_args(args: argparse.Namespace, step: StepShape) -> MixedLengths | None:
    """What `--length-mix` describes; None without it.

    Raises:
        ValueError: as `LengthSchedule`, or as the sampler of one of the lengths.
    """
    if args.length_mix is None:
        return None
    schedule = LengthSchedule(
        seed=args.rpsd_seed,
        length=args.seq_length,
        shares=tuple(parse_share(text) for text in args.length_mix),
        unit=suffix_unit(args),
        sampling=args.rpsd_split_sampling,
        step=step,
    )
    samplers = {}
    for length in schedule.lengths:
        try:
            samplers[length] = sampler_from_args(args, scaled_step(step, args.seq_length // length), length)
        except ValueError as refused:
            raise ValueError(f"--length-mix {' '.join(args.length_mix)}: at length {length}, {refused}") from refused
    return MixedLengths(schedule, samplers)


def check_length_mix(args: argparse.Namespace) -> None:
    """Refuse what cannot run.

    Raises:
        ValueError: one line with the flag, the value and the arithmetic.
    """
    if args.length_mix is None:
        return
    if args.conversations:
        raise ValueError(
            f"--length-mix {' '.join(args.length_mix)} cuts windows of documents; under --sft a sample is a "
            "conversation, which a cut would leave without its beginning: leave one of the two out"
        )
    mixed_lengths_from_args(args, StepShape())


def describe_lengths(schedule: LengthSchedule) -> str:
    """One line for the log."""
    parts = [
        f"{float(share):.4g} of the micro-steps read a window as {schedule.length // length} x {length} tokens"
        for share, length in schedule.shares
    ]
    return f"length mix: {', '.join(parts)}; mean length {schedule.mean_length:.1f}"
