"""The views of RPSD (arXiv 2604.14339): one token sequence read at two sets of RoPE positions.

A view changes nothing but the position that RoPE gives to each token. Tokens, their order and the causal mask stay.
Both perturbations of the paper are one operation here, "split and shift": tokens from ``split`` on move by ``shift``.
Its two ablations, and PoSE's many chunks (arXiv 2309.10400), move several stretches of tokens, each by a shift of its
own, or give every token the same position.

Twelve tokens (L = 12), i = 0..11:

    view                         positions
    standard      r_i            0  1  2  3  4  5  6  7  8  9 10 11
    skip          s=5, y=4       0  1  2  3  4  9 10 11 12 13 14 15
    as a View     split=5 shift=4
                                 0  1  2  3  4  9 10 11 12 13 14 15
    cyclic        u=3            3  4  5  6  7  8  9 10 11  0  1  2
    as a View     split=9 shift=-12
                                 0  1  2  3  4  5  6  7  8 -3 -2 -1
    NoPE          no rotation    0  0  0  0  0  0  0  0  0  0  0  0
    permuted      C=3, 2 0 1     8  9 10 11  0  1  2  3  4  5  6  7
    PoSE          5+4+3, u=0 2 7
                                 0  1  2  3  4  7  8  9 10 16 17 18

The two cyclic rows differ by the constant u = 3. RoPE turns queries and keys by angles proportional to position, so a
score depends on the difference of two positions only, and both rows are the same view to the model. The second row
says more: before the split a cyclic view is the standard view. Hence for every view hidden states, keys and values of
the prefix i < split equal those of the standard view, and the KL term of RPSD is 0 there. The ablations have split 0:
their whole second view is run, and their KL is a mean over the whole sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class View:
    """Positions i for i < split, and stride * i + shift from there on, the shift changing at every jump.

    ``View(split, shift)`` is the paper's split and shift; ``shift == 0`` is the standard view.

    Raises:
        ValueError: split is negative, jumps do not ascend from the split, or stride is neither 0 nor 1.
    """

    split: int
    """First token that moves (the paper's s), in tokens from the start of the sequence. The KL is a mean from it on."""
    shift: int
    """How far tokens from the split on move, in positions; > 0 for skip, -L for cyclic."""
    jumps: tuple[tuple[int, int], ...] = ()
    """(token, shift) pairs in ascending order of tokens: from each token on its shift replaces the one before."""
    stride: int = 1
    """Positions from one token to the next, from the split on; 0 puts all of them at one position (NoPE)."""

    def __post_init__(self) -> None:
        if self.split < 0:
            raise ValueError(f"split={self.split} is negative: choose 0 <= split < length")
        starts = [self.split, *(token for token, _ in self.jumps)]
        if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
            raise ValueError(f"jumps at tokens {starts[1:]} must ascend and stand behind split={self.split}")
        if self.stride not in (0, 1):
            raise ValueError(f"stride={self.stride}: choose 1, or 0 for one position for all tokens")

    @classmethod
    def identity(cls) -> View:
        """The standard view."""
        return cls(split=0, shift=0)

    @property
    def is_identity(self) -> bool:
        """Whether every token stays at its own index."""
        return self.stride == 1 and not any(shift for _, shift in self._pieces())

    def position_ids(self, length: int) -> torch.Tensor:
        """Positions of all tokens of one sequence, int64 [length], on the CPU; may be negative.

        Raises:
            ValueError: the split or a jump does not lie in the sequence (0 <= split < length).
        """
        _check_split(self.split, length)
        if self.jumps and self.jumps[-1][0] >= length:
            raise ValueError(f"a jump at token {self.jumps[-1][0]} lies outside the sequence of length={length}")
        position_ids = torch.arange(length, dtype=torch.int64, device="cpu")
        pieces = self._pieces()
        stops = [start for start, _ in pieces[1:]] + [length]
        for (start, shift), stop in zip(pieces, stops, strict=True):
            position_ids[start:stop] *= self.stride
            position_ids[start:stop] += shift
        return position_ids

    def suffix(self, length: int) -> torch.Tensor:
        """Tokens at or after the split, which the KL is a mean over: bool [length]."""
        return torch.arange(length) >= self.split

    def mean_shift(self, length: int) -> float:
        """How far tokens from the split on stand from their own index, on average: |shift| without jumps."""
        if not self.jumps and self.stride == 1:
            return float(abs(self.shift))
        moved = self.position_ids(length) - torch.arange(length, dtype=torch.int64, device="cpu")
        return moved[self.split :].abs().sum().item() / (length - self.split)

    def _pieces(self) -> tuple[tuple[int, int], ...]:
        return ((self.split, self.shift), *self.jumps)


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


def nope_view() -> View:
    """The NoPE ablation (arXiv 2604.14339): r_i = 0, a position whose rotation is the identity, for every token."""
    return View(split=0, shift=0, stride=0)


def chunk_permutation_view(order: Sequence[int], length: int) -> View:
    """The chunk ablation (arXiv 2604.14339): the indices 0..L-1, cut into C chunks that are put into another order.

    With L = q C + m the first m chunks hold q + 1 indices, the others q. r is the concatenation of chunk order[0],
    chunk order[1], ...: indices stay consecutive within a chunk, and every index occurs once.

    Args:
        order: a permutation of 0..C-1; the identity gives the standard view.

    Raises:
        ValueError: more chunks than tokens.
    """
    chunks = len(order)
    assert sorted(order) == list(range(chunks)), f"order {order} is no permutation of 0..{chunks - 1}"
    if not 1 <= chunks <= length:
        raise ValueError(f"{chunks} chunks do not fit into length={length}: every chunk needs a token")
    size, larger = divmod(length, chunks)
    place, pieces = 0, []
    for chunk in order:
        pieces.append((place, chunk * size + min(chunk, larger) - place))
        place += size + (chunk < larger)
    return View(split=0, shift=pieces[0][1], jumps=tuple(pieces[1:]))


def pose_view(lengths: Sequence[int], skips: Sequence[int]) -> View:
    """PoSE's positions (arXiv 2309.10400): chunk k, tokens st_k..st_k + l_k - 1, stands u_k positions later.

    Positional skips only: the original also skips content between chunks of a longer document. Samples here are
    windows of a fixed length, so their content stays contiguous.

    Args:
        lengths: l_0..l_{N-1} in tokens, each at least 1; N >= 2.
        skips: u_0 = 0 and nondecreasing, in positions.
    """
    assert len(lengths) == len(skips) >= 2 and min(lengths) >= 1
    assert skips[0] == 0 and list(skips) == sorted(skips), f"skips {skips} must start at 0 and never fall"
    starts = itertools.accumulate(lengths[:-1])
    (split, shift), *jumps = zip(starts, skips[1:], strict=True)
    return View(split, shift, tuple(jumps))


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
