"""The views of RPSD (arXiv 2604.14339): one token sequence read at two sets of RoPE positions.

A view changes nothing but the position that RoPE gives to each token. Tokens, their order and the causal mask stay.
Both perturbations of the paper are one operation here, "split and shift": tokens from ``split`` on move by ``shift``.

Twelve tokens (L = 12), i = 0..11:

    view                         positions
    standard      r_i            0  1  2  3  4  5  6  7  8  9 10 11
    skip          s=5, y=4       0  1  2  3  4  9 10 11 12 13 14 15
    as a View     split=5 shift=4
                                 0  1  2  3  4  9 10 11 12 13 14 15
    cyclic        u=3            3  4  5  6  7  8  9 10 11  0  1  2
    as a View     split=9 shift=-12
                                 0  1  2  3  4  5  6  7  8 -3 -2 -1

The two cyclic rows differ by the constant u = 3. RoPE turns queries and keys by angles proportional to position, so a
score depends on the difference of two positions only, and both rows are the same view to the model. The second row
says more: before the split a cyclic view is the standard view. Hence for every view hidden states, keys and values of
the prefix i < split equal those of the standard view, and the KL term of RPSD is 0 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class View:
    """Positions i for i < split and i + shift for i >= split; ``shift == 0`` is the standard view.

    Raises:
        ValueError: split is negative.
    """

    split: int
    """First token that moves (the paper's s), in tokens from the start of the sequence."""
    shift: int
    """How far tokens from the split on move, in positions; > 0 for skip, -L for cyclic."""

    def __post_init__(self) -> None:
        if self.split < 0:
            raise ValueError(f"split={self.split} is negative: choose 0 <= split < length")

    @classmethod
    def identity(cls) -> View:
        """The standard view."""
        return cls(split=0, shift=0)

    @property
    def is_identity(self) -> bool:
        """Whether every token stays at its own index."""
        return self.shift == 0

    def position_ids(self, length: int) -> torch.Tensor:
        """Positions of all tokens of one sequence, int64 [length], on the CPU; may be negative.

        Raises:
            ValueError: split does not lie in the sequence (0 <= split < length).
        """
        _check_split(self.split, length)
        position_ids = torch.arange(length, dtype=torch.int64, device="cpu")
        position_ids[self.split :] += self.shift
        return position_ids


def skip_view(split: int, shift: int, length: int) -> View:
    """The skip perturbation: r_i = i for i < s, i + y for i >= s, with s = ``split`` and y = ``shift``.

    Raises:
        ValueError: split outside 0..length-1, or shift below 0 (0 is the standard view).
    """
    _check_split(split, length)
    if shift < 0:
        raise ValueError(f"shift={shift} is negative: a skip moves tokens to later positions, choose shift >= 1")
    return View(split, shift)


def cyclic_view(rotation: int, length: int) -> View:
    """The cyclic perturbation r_i = (i + u) mod L, u = ``rotation``, seen relative to the prefix (r_i - u).

    (i + u) mod L - u is i for i < L - u and i - L from there on: split L - u, shift -L. u = 0 is the standard view.

    Raises:
        ValueError: rotation outside 0..length-1.
    """
    _check_rotation(rotation, length)
    return View(split=length - rotation, shift=-length) if rotation else View.identity()


def cyclic_definition(rotation: int, length: int) -> torch.Tensor:
    """The cyclic perturbation as the paper writes it, r_i = (i + u) mod L: int64 [length], for tests and figures.

    Raises:
        ValueError: rotation outside 0..length-1.
    """
    _check_rotation(rotation, length)
    return (torch.arange(length, dtype=torch.int64, device="cpu") + rotation) % length


def batch_position_ids(views: Sequence[View], length: int) -> torch.Tensor:
    """Positions of a micro batch, one view a row: int64 [b, length], on the CPU.

    Raises:
        ValueError: a view's split does not lie in the sequence.
    """
    assert views, "a micro batch holds at least one view"
    return torch.stack([view.position_ids(length) for view in views])


def _check_split(split: int, length: int) -> None:
    if not 0 <= split < length:
        raise ValueError(f"split={split} lies outside the sequence: choose 0 <= split < length={length}")


def _check_rotation(rotation: int, length: int) -> None:
    if not 0 <= rotation < length:
        raise ValueError(f"rotation={rotation} lies outside the sequence: choose 0 <= rotation < length={length}")
