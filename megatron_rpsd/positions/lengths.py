"""Which length the sequences of a micro-step have: a pure function of the seed and the sample's index.

The paper compares windows of one length with ProLong-style mixed lengths (arXiv 2604.14339, 2410.02660). Here a
micro-step of length l reads each window of L tokens as L / l sequences of l tokens: rows of the batch, each with its
own positions from 0 and its own view. So every micro-step carries as many tokens, and no attention crosses rows.

    L = 8, l = 4:    window  a b c d e f g h   ->   row 0  a b c d
                                                    row 1  e f g h

Under `stratified` sampling all data-parallel ranks of a micro-step have one length and so one cost, and the M
micro-steps of a global step draw from M equal strata: shares that are multiples of 1 / M are met in every step. Under
`independent` sampling every micro-batch draws its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

from megatron_rpsd.positions.sampler import StepShape, ViewSampler, keyed_generator

# Second half of Philox's key, beside the sampler's: lengths and their order share no stream with splits.
_LENGTH, _LENGTH_ORDER = 0x5250534B, 0x5250534C


def parse_share(text: str) -> tuple[Fraction, int]:
    """(share, length) of SHARE:LENGTH; the share is read as the decimal or fraction that was typed.

    Raises:
        ValueError: `text` is not of that form.
    """
    share, colon, length = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return Fraction(share), int(length)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--length-mix {text}: write SHARE:LENGTH, for example 0.5:8192") from None


@dataclass(frozen=True)
class LengthSchedule:
    """Draws the length of each micro-step's sequences.

    Raises:
        ValueError: shares or lengths that do not fit, naming --length-mix.
    """

    seed: int
    """--rpsd-seed, 0 <= seed < 2**64."""
    length: int
    """--seq-length, L in tokens: the window that a sample fills."""
    shares: tuple[tuple[Fraction, int], ...]
    """--length-mix: (share of the micro-steps, length of their sequences in tokens)."""
    unit: int = 1
    """Tokens by which a sequence must divide: 2 x CP (x TP under sequence parallelism)."""
    sampling: str = "stratified"
    """--rpsd-split-sampling: stratified or independent."""
    step: StepShape = field(default_factory=StepShape)
    """The run's batch sizes and data-parallel size."""

    def __post_init__(self) -> None:
        typed = "--length-mix " + " ".join(f"{_decimal(share)}:{length}" for share, length in self.shares)
        for share, length in self.shares:
            if share <= 0:
                raise ValueError(f"{typed}: the share {_decimal(share)} of length {length} must be positive")
            if length > self.length:
                raise ValueError(f"{typed}: {length} is longer than --seq-length {self.length}")
            if length < 2 or self.length % length:
                raise ValueError(
                    f"{typed}: {length} must be at least 2 and divide --seq-length {self.length}, so that a window "
                    "holds whole sequences"
                )
            if length % self.unit:
                raise ValueError(
                    f"{typed}: {length} must divide by 2 x CP (x TP under sequence parallelism) = {self.unit}"
                )
        if len({length for _, length in self.shares}) < len(self.shares):
            raise ValueError(f"{typed}: a length is named twice; add its shares up")
        total = sum(share for share, _ in self.shares)
        if total != 1:
            raise ValueError(f"{typed}: the shares sum to {_decimal(total)}, not 1")

    @property
    def lengths(self) -> tuple[int, ...]:
        """All lengths, as listed."""
        return tuple(length for _, length in self.shares)

    @property
    def mean_length(self) -> float:
        """Expected length over micro-steps, in tokens."""
        return float(sum(share * length for share, length in self.shares))

    def at(self, sample_index: int) -> int:
        """Length of the sequences that the sample with this global index is read as."""
        group, stratum, strata = self.step.place(sample_index, self.sampling, self.seed, _LENGTH_ORDER)
        # Exact, so that a stratum's upper end cannot round into the next share.
        place = (stratum + Fraction(keyed_generator(self.seed, _LENGTH, group).random())) / strata
        reached = accumulate(share for share, _ in self.shares)
        return next(length for bound, length in zip(reached, self.lengths, strict=True) if place < bound)


@dataclass(frozen=True)
class MixedLengths:
    """The schedule, and for each of its lengths the sampler of the views of sequences of that length."""

    schedule: LengthSchedule
    samplers: Mapping[int, ViewSampler]

    def read(self, sample: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ViewSampler]:
        """A micro-batch of windows as this micro-step reads it, and the sampler of its views; see `cut_rows`."""
        (length,) = {self.schedule.at(int(index)) for index in sample["sample_index"]}
        return cut_rows(sample, length), self.samplers[length]


def cut_rows(sample: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Windows [b, L] of a sample as sequences [b x L / length, length], and sample indices of their own.

    Args:
        sample: tensors [b, L], among them tokens, and sample_index [b].

    The window with index i becomes indices i L / length to (i + 1) L / length - 1: distinct, and with micro-batches
    that many times as large they fall into the micro-steps that the windows fell into.
    """
    window = sample["tokens"].shape[1]
    assert window % length == 0
    count = window // length
    rows = {name: value.reshape(-1, length) for name, value in sample.items() if value.shape[1:] == (window,)}
    rows["sample_index"] = (sample["sample_index"][:, None] * count + torch.arange(count)).flatten()
    return rows


def scaled_step(step: StepShape, count: int) -> StepShape:
    """Batch sizes in sequences, where every window is `count` of them."""
    return StepShape(step.global_batch_size * count, step.micro_batch_size * count, step.data_parallel_size)


def _decimal(value: Fraction) -> str:
    """As typed, up to trailing zeros: 1/2 is 0.5; what no short decimal equals stays a fraction."""
    return f"{float(value):g}" if Fraction(f"{float(value):g}") == value else str(value)
