"""What each split of the data holds and what a run asks of it, looked at before Megatron builds its datasets.

--split gives every split a share of a prefix's documents, rounded to whole ones. Megatron then repeats them until
n samples have their n x L + 1 tokens (`GPTDataset._get_num_epochs`). Documents without a token are repeated for ever,
and no documents, too, even where 0 samples are asked for: on 352 documents `--split 969,30,1` leaves the test split
none, and the run never starts. A share of 0 makes no dataset.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.training.utils.common_utils import get_blend_and_blend_per_split

from megatron_rpsd.data.chat import ConversationFile
from megatron_rpsd.data.indexed import sequence_lengths
from megatron_rpsd.positions import parse_phases

NAMES = ("train", "validation", "test")
_BLOCK = 1 << 16


@dataclass(frozen=True)
class _Reading:
    """A prefix as one of Megatron's datasets reads it."""

    prefix: str
    bounds: tuple[tuple[float, float] | None, ...]
    """of each split, in shares of the documents"""
    asked: tuple[int | None, ...]
    """samples of each split; None is one epoch"""
    flag: str
    """what places the bounds, as typed"""
    by_length: bool = False
    """a blend without weights, mixed by the lengths of its datasets: none of them may be empty"""


def data_blends(args: argparse.Namespace) -> tuple:
    """Megatron's blend, and blend of each split, of the data arguments.

    Raises:
        ValueError: a file that names the data cannot be read.
    """
    for name in ("data_args_path", "per_split_data_args_path"):
        path = getattr(args, name)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"--{name.replace('_', '-')} {path}: no such file")
    return get_blend_and_blend_per_split(args)


def asked_samples(args: argparse.Namespace) -> tuple[int, int | None, int]:
    """Training, validation and test samples that Megatron's loop asks for; None: all there are."""
    steps = args.train_iters or (args.train_samples or 0) // args.global_batch_size
    train = args.train_samples or steps * args.global_batch_size
    once = args.eval_iters * args.eval_global_batch_size
    interval = args.eval_interval or 1
    times = steps // interval + 1
    if args.start_eval_at_iter is not None:
        times = max(0, times - args.start_eval_at_iter // interval)
    return train, None if args.full_validation else (1 if args.skip_train else times) * once, once


def check_splits(args: argparse.Namespace) -> None:
    """Refuse data of which a split cannot give what the run asks of it.

    Args:
        args: validated by Megatron.

    Raises:
        ValueError: --split is missing or no three shares; a split with a share and no token; one that is read and holds
            less than a sample; validation without data.
    """
    if args.train_iters is None and args.train_samples is None:
        return
    asked = asked_samples(args)
    for reading in _readings(args, asked):
        _check(reading, args)


def _readings(args: argparse.Namespace, asked: tuple[int | None, ...]) -> Iterator[_Reading]:
    blend, per_split = data_blends(args)
    streams = parse_phases(args.rope_phases).streams(asked[0]) if args.rope_phases is not None else {}
    for data, count in streams.items():
        if data is not None:
            yield _Reading(data, _bounds(args), (count, *asked[1:]), f"--split {args.split}")
    if blend:
        bounds, prefixes = _bounds(args), blend[0]
        _check_present([pair is not None for pair in bounds], f"--split {args.split}", asked, args)
        wanted = (streams.get(None, 1), *asked[1:]) if streams else asked
        for prefix in prefixes:
            by_length = len(prefixes) > 1 and blend[1] is None
            yield _Reading(prefix, bounds, wanted, f"--split {args.split}", by_length)
    elif per_split and any(per_split):
        _check_present([part is not None for part in per_split], "--*-data-path", asked, args)
        for split, part in enumerate(per_split):
            bounds = tuple((0.0, 1.0) if place == split else None for place in range(3))
            for prefix in part[0] if part else ():
                by_length = len(part[0]) > 1 and part[1] is None
                yield _Reading(prefix, bounds, asked, f"--{('train', 'valid', 'test')[split]}-data-path", by_length)


def _bounds(args: argparse.Namespace) -> tuple[tuple[float, float] | None, ...]:
    if args.split is None:
        raise ValueError(
            "--split is not set, and Megatron has a default for --data-path alone: add --split 100,0,0 (with "
            "--eval-iters 0), or one with a share for validation, such as --split 99,1,0"
        )
    try:
        shares = [float(share) for share in _shares(args)]
    except ValueError:
        shares = []
    other = re.sub(r"[.0-9, ]+", "", args.split)  # Megatron would read 5,-1 as 5,1
    if other or not 1 <= len(shares) <= len(NAMES) or not sum(shares) > 0:
        raise ValueError(f"--split {args.split}: up to three shares, of {', '.join(NAMES)}, such as --split 99,1,0")
    return tuple(convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split)))


def _shares(args: argparse.Namespace) -> list[str]:
    """The shares of --split as typed, by Megatron's reading of it."""
    return re.findall(r"[.0-9]+", args.split)


def _check_present(present: Sequence[bool], typed: str, asked: Sequence[int | None], args: argparse.Namespace) -> None:
    """Refuse a run that reads training or validation samples of which there are no data at all. (Megatron's own loop
    leaves out training and test without data, and breaks off in a validation without.)"""
    if not present[0] and asked[0] and not args.skip_train and args.rope_phases is None:
        raise ValueError(
            f"{typed} leaves no data for the {asked[0]} training samples of --train-iters x --global-batch-size (or "
            "--train-samples): give training a share (--split 99,1,0) or a --train-data-path"
        )
    if not present[1] and asked[1] != 0:
        count = "all" if asked[1] is None else asked[1]
        wanted = "--full-validation" if args.full_validation else f"--eval-iters {args.eval_iters}"
        raise ValueError(
            f"{wanted} evaluates on {count} validation samples, and {typed} leaves no data for it: add --eval-iters 0, "
            "or give validation a share (--split 99,1,0) or a --valid-data-path"
        )


@dataclass(frozen=True)
class _Part:
    """A split of a prefix."""

    name: str
    sizes: np.ndarray
    """tokens of its documents, or ones for lines of conversations"""
    asked: int | None
    needed: int
    """the least that `sizes` must hold together"""

    def holds_enough(self) -> bool:
        """Reads no more of the index than it takes to know."""
        held, start = 0, 0
        while held < self.needed and start < len(self.sizes):
            held += int(self.sizes[start : start + _BLOCK].sum(dtype=np.int64))
            start += _BLOCK
        return held >= self.needed

    def __str__(self) -> str:
        tokens = "" if self.sizes.strides == (0,) else f" ({self.sizes.sum(dtype=np.int64)} tokens)"
        return f"{self.name} {len(self.sizes)}{tokens} for {'all' if self.asked is None else self.asked} samples"


def _check(reading: _Reading, args: argparse.Namespace) -> None:
    if args.conversations:  # a line is a sample, and none are never repeated
        sizes = np.broadcast_to(np.int32(1), len(ConversationFile(reading.prefix)))
        least, sample, unit = 0, 1, "lines"
    else:
        sizes, unit = sequence_lengths(reading.prefix), "documents"
        least, sample = 1, args.seq_length + 1
    parts = []
    for name, bounds, asked in zip(NAMES, reading.bounds, reading.asked, strict=True):
        if bounds is not None:
            begin, end = (round(edge * len(sizes)) for edge in bounds)
            needed = least if asked == 0 and not reading.by_length else sample
            parts.append(_Part(name, sizes[begin:end], asked, needed))
    if not (short := [part for part in parts if not part.holds_enough()]):
        return
    first = short[0]
    if first.needed == sample and not args.conversations:
        wants = f"{first.name} needs --seq-length {args.seq_length} + 1 = {sample} tokens for a sample"
    else:
        wants = f"{first.name} has none" + ("" if args.conversations else ", and Megatron would build it for ever")
    raise ValueError(
        f"{reading.flag}: the {len(sizes)} {unit} of --data-path {reading.prefix} give {', '.join(map(str, parts))}; "
        f"{wants}: {_way_out(reading, short, args)}"
    )


def _way_out(reading: _Reading, short: list[_Part], args: argparse.Namespace) -> str:
    names = [part.name for part in short]
    more = "give more data" + ("" if args.conversations else " or a shorter --seq-length")
    if "train" in names or not reading.flag.startswith("--split"):
        return more
    shares = ["0" if name in names else share for name, share in zip(NAMES, _shares(args), strict=False)]
    unread = " --eval-iters 0" if "validation" in names and reading.asked[1] != 0 else ""
    return f"use --split {','.join(shares)}{unread}, give it a larger share, or {more}"
