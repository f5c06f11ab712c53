"""Which view a training sample gets: a pure function of the seed and the sample's index in the stream.

Nothing is carried from one draw to the next and no rank enters a key. So every tensor, context, pipeline and data
parallel rank and every resumed run finds the same view for the same sample, without communication and in any order.

The split is drawn for a *micro-step* (what all data-parallel ranks run at once) or for a micro-batch, the shift for a
sample. `stratified` splits are the same on all data-parallel ranks of a micro-step, so that no rank waits for another's
longer suffix, and the M micro-steps of a global step draw from M equal strata of [0, 1) in random order; `independent`
splits are drawn by every micro-batch on its own. Either way a split's marginal is uniform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from megatron_rpsd.positions.perturbations import (
    View,
    chunk_permutation_view,
    cyclic_view,
    nope_view,
    pose_view,
    skip_view,
)

SPLIT_VIEWS = ("skip", "cyclic")
"""Perturbations whose split is drawn; the others perturb the whole sequence."""
PERTURBATIONS = (*SPLIT_VIEWS, "nope", "chunk-permutation")
POSE_CHUNKS = "pose-chunks"
"""What the sampler calls `--pose-sampling chunks`, which is no perturbation of RPSD's."""
SPLIT_SAMPLINGS = ("stratified", "independent")

_WORD = 2**64
# Second half of Philox's key: one number per random quantity, so that quantities never share a stream.
_SHIFT, _SPLIT, _ORDER, _APPLY = 0x52505344, 0x52505345, 0x52505346, 0x52505347
_PERMUTATION, _LENGTHS, _SKIPS = 0x52505348, 0x52505349, 0x5250534A


def split_density_at(place, a: float):
    """Density 1 - a + 2 a x of a split at x = s / L, `place`; a float or an array."""
    return 1 - a + 2 * a * place


@dataclass(frozen=True)
class StepShape:
    """How the stream of samples falls into global steps, micro-steps and micro-batches (Megatron's sampler's order)."""

    global_batch_size: int = 1
    micro_batch_size: int = 1
    data_parallel_size: int = 1

    @property
    def micro_steps(self) -> int:
        """M, micro-steps of a global step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def place(self, sample_index: int, sampling: str, seed: int, stream: int) -> tuple[int, int, int]:
        """(key of a draw, its stratum, number of strata) of what a sample's micro-batch draws under `sampling`.

        stratified: the key is the micro-step, and the strata of a global step come in random order, of the stream's
        own. independent: the key is the micro-batch, in one stratum.
        """
        assert 0 <= sample_index < _WORD, f"sample index {sample_index} does not fit in 64 bits"
        micro_batch = sample_index // self.micro_batch_size
        if sampling == "independent":
            return micro_batch, 0, 1
        micro_step = micro_batch // self.data_parallel_size
        strata = self.micro_steps
        order = keyed_generator(seed, stream, micro_step // strata).permutation(strata)
        return micro_step, int(order[micro_step % strata]), strata


def keyed_generator(seed: int, stream: int, index: int, part: int = 0) -> np.random.Generator:
    """Philox is a function of (key, counter): the key is (seed, stream), the index the counter's highest word, the part
    of an index (a document of a sample) the next one.

    A draw advances the counter's lowest word, so two parts would meet only after 2**128 blocks.
    """
    bits = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array([0, 0, part, index], dtype=np.uint64)
    )
    return np.random.Generator(bits)


@dataclass(frozen=True)
class Draw:
    """The perturbed view of a sample, and the factor that keeps the objective unbiased where it is drawn unevenly.

    kl_weight 0 means that this micro-step takes no second view (`--rpsd-apply-probability`).
    """

    view: View
    kl_weight: float = 1.0


@dataclass(frozen=True)
class ViewSampler:
    """Draws the perturbed view of each sample as the RPSD paper does (arXiv 2604.14339).

    skip: s ~ U{0..L-1} and y ~ U{1..Y}. cyclic: s = L - u with u ~ U{1..L-1}, y = -L. Then s is rounded down to a
    granule. nope: always the same view. chunk-permutation: every order of the chunks but the identity is as likely.

    pose-chunks: PoSE with N chunks (arXiv 2309.10400). u_0 = 0, u_k ~ U{u_{k-1}..L_t - L}. With N = 2 the first chunk
    has U{1..(L+1)//2} tokens, as in its code; with N > 2 every way to cut L tokens into N chunks is as likely.

    Raises:
        ValueError: an argument out of range, naming the flag.
    """

    seed: int
    """--rpsd-seed, 0 <= seed < 2**64."""
    perturbation: str
    """--rpsd-perturbation, one of PERTURBATIONS; or POSE_CHUNKS (--pose-sampling chunks)."""
    length: int
    """--seq-length, L in tokens."""
    max_shift: int | None = None
    """--rpsd-max-shift, Y in positions; None becomes L, the paper's choice. A cyclic view always shifts by L."""
    granule: int = 1
    """--rpsd-split-granule in tokens: splits are multiples of it. Rounding down shifts their mean by (granule-1)/2."""
    split_sampling: str = "independent"
    """--rpsd-split-sampling: stratified or independent."""
    step: StepShape = field(default_factory=StepShape)
    """The run's batch sizes and data-parallel size."""
    apply_probability: float = 1.0
    """--rpsd-apply-probability p: the share of micro-steps with a second view; their KL weighs 1 / p."""
    split_density: float = 0.0
    """--rpsd-split-density a: splits have density 1 - a + 2 a x at place x in [0, 1) of their range (s/L by default),
    and the KL weighs its inverse. 0 is uniform."""
    split_range: tuple[float, float] = (0.0, 1.0)
    """--rpsd-split-range: skip's splits are drawn with low <= s/L < high. Fractions of L, read as decimals."""
    permutation_chunks: int = 8
    """--rpsd-permutation-chunks, C of chunk-permutation."""
    pose_chunks: int = 2
    """--pose-chunks, N of pose-chunks."""
    target_length: int | None = None
    """--pose-target-length, L_t in positions: all stay below it. None becomes 2 L, which skip views stay below too."""

    def __post_init__(self) -> None:
        if self.perturbation not in (*PERTURBATIONS, POSE_CHUNKS):
            raise ValueError(f"--rpsd-perturbation {self.perturbation} is unknown: choose {', '.join(PERTURBATIONS)}")
        if self.split_sampling not in SPLIT_SAMPLINGS:
            known = " or ".join(SPLIT_SAMPLINGS)
            raise ValueError(f"--rpsd-split-sampling {self.split_sampling} is unknown: choose {known}")
        if not 0 <= self.seed < _WORD:
            raise ValueError(f"--rpsd-seed {self.seed} is out of range: choose 0 <= seed < 2**64")
        if self.length < 2:
            raise ValueError(f"--seq-length {self.length} is too short to perturb: it needs at least 2 tokens")
        if self.max_shift is None:
            object.__setattr__(self, "max_shift", self.length)
        if self.target_length is None:
            object.__setattr__(self, "target_length", 2 * self.length)
        if self.max_shift < 1:
            raise ValueError(f"--rpsd-max-shift {self.max_shift} leaves no shift to draw: choose at least 1")
        if self.perturbation != "skip" and self.max_shift != self.length:
            raise ValueError(
                f"--rpsd-max-shift {self.max_shift} is the largest shift of a skip view and does not apply to "
                f"{self.perturbation} views (it may only equal --seq-length {self.length}): leave it out"
            )
        if not 1 <= self.granule <= self.length:
            raise ValueError(f"--rpsd-split-granule {self.granule} must lie in 1..--seq-length {self.length}")
        if not 0 < self.apply_probability <= 1:
            raise ValueError(f"--rpsd-apply-probability {self.apply_probability} must lie in (0, 1]")
        if not 0 <= self.split_density < 1:
            raise ValueError(f"--rpsd-split-density {self.split_density} must lie in [0, 1)")
        self._check_range()
        self._check_chunks()

    def _check_range(self) -> None:
        low, high = self.split_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"--rpsd-split-range {low:g} {high:g}: fractions of L, choose 0 <= LOW < HIGH <= 1")
        if self.perturbation != "skip" and (low, high) != (0, 1):
            raise ValueError(
                f"--rpsd-split-range {low:g} {high:g}: {self.perturbation} views have no split to place; use skip"
            )
        first, stop = self._splits()
        if first >= stop:
            raise ValueError(
                f"--rpsd-split-range {low:g} {high:g} of --seq-length {self.length} is {low * self.length:g} <= s < "
                f"{high * self.length:g}, which holds no multiple of --rpsd-split-granule {self.granule} (the first "
                f"one from LOW on is {first}): widen the range or lower the granule"
            )

    def _check_chunks(self) -> None:
        kinds = {"chunk-permutation": ("--rpsd-permutation-chunks", self.permutation_chunks)}
        kinds[POSE_CHUNKS] = ("--pose-chunks", self.pose_chunks)
        flag, chunks = kinds.get(self.perturbation, (None, 2))
        if not 2 <= chunks <= self.length:
            raise ValueError(f"{flag} {chunks} must lie in 2..--seq-length {self.length}: every chunk needs a token")
        if self.perturbation == POSE_CHUNKS and self.target_length <= self.length:
            raise ValueError(
                f"--pose-target-length {self.target_length} must be greater than --seq-length {self.length}: skips are "
                f"drawn from 0..{self.target_length} - {self.length} = {self.target_length - self.length}"
            )

    def draw(self, sample_index: int) -> Draw:
        """View and KL weight of the sample with this global index (its place in the run's order of samples)."""
        group, stratum, strata = self.step.place(sample_index, self.split_sampling, self.seed, _ORDER)
        if self.apply_probability < 1 and self._generator(_APPLY, group).random() >= self.apply_probability:
            return Draw(View.identity(), 0.0)
        if self.perturbation not in SPLIT_VIEWS:
            return Draw(self._unsplit_view(sample_index), 1 / self.apply_probability)
        uniform = (stratum + self._generator(_SPLIT, group).random()) / strata
        place, weight = self._warp(uniform)
        first, stop = self._splits()
        split = min(first + math.floor(place * (stop - first)), stop - 1)
        split -= split % self.granule
        if self.perturbation == "cyclic":
            view = cyclic_view((self.length - split) % self.length, self.length)
        else:
            shift = self._generator(_SHIFT, sample_index).integers(1, self.max_shift, endpoint=True)
            view = skip_view(split, int(shift), self.length)
        return Draw(view, weight / self.apply_probability)

    def view(self, sample_index: int) -> View:
        """The view alone."""
        return self.draw(sample_index).view

    def expected_suffix(self) -> tuple[float, float]:
        """Expected extra cost of the shared prefix over one view: (linear layers, attention), 0.5 and 2/3 by default.

        With x = s / L the suffix costs 1 - x of the linear layers and 1 - x^2 of the attention; x is spread over the
        range of splits. Views without a split cost a whole second view.
        """
        a, p = self.split_density, self.apply_probability
        if self.perturbation not in SPLIT_VIEWS:
            return p, p
        low, high = (float(bound) for bound in self._bounds())
        width = high - low
        mean, square = 1 / 2 + a / 6, 1 / 3 + a / 6  # of the place in the range, and of its square
        return p * (1 - low - width * mean), p * (1 - low**2 - 2 * low * width * mean - width**2 * square)

    def _bounds(self) -> tuple[Fraction, Fraction]:
        """The range of splits, as the decimals that were typed: 0.1 is 1/10, not the binary number beside it."""
        low, high = self.split_range
        return Fraction(str(low)), Fraction(str(high))

    def _splits(self) -> tuple[int, int]:
        """Half-open range of splits before they are rounded down; it starts at a multiple of the granule.

        So rounding down cannot leave the range. A cyclic view's starts at 1 (u = L - s is never L).
        """
        if self.perturbation == "cyclic":
            return 1, self.length
        low, high = (math.ceil(bound * self.length) for bound in self._bounds())
        return -(-low // self.granule) * self.granule, high

    def _unsplit_view(self, sample_index: int) -> View:
        """The view of a sample under a perturbation without a drawn split."""
        if self.perturbation == "nope":
            return nope_view()
        if self.perturbation == "chunk-permutation":
            generator = self._generator(_PERMUTATION, sample_index)
            order = list(range(self.permutation_chunks))
            while order == sorted(order):  # drawing again leaves every other order as likely as before
                order = generator.permutation(self.permutation_chunks).tolist()
            return chunk_permutation_view(order, self.length)
        lengths, skips = self._generator(_LENGTHS, sample_index), self._generator(_SKIPS, sample_index)
        if self.pose_chunks == 2:
            cuts = [int(lengths.integers(1, (self.length + 1) // 2, endpoint=True))]
        else:
            cuts = sorted((lengths.choice(self.length - 1, self.pose_chunks - 1, replace=False) + 1).tolist())
        bias = [0]
        for _ in cuts:
            bias.append(int(skips.integers(bias[-1], self.target_length - self.length, endpoint=True)))
        ends = [*cuts, self.length]
        return pose_view([end - start for start, end in zip([0, *cuts], ends, strict=True)], bias)

    def _warp(self, uniform: float) -> tuple[float, float]:
        """(place x in [0, 1), importance weight) under density 1 - a + 2 a x, by its inverse distribution function."""
        a = self.split_density
        if a == 0:
            return uniform, 1.0
        place = (math.sqrt((1 - a) ** 2 + 4 * a * uniform) - (1 - a)) / (2 * a)
        return place, 1 / split_density_at(place, a)

    def _generator(self, stream: int, index: int) -> np.random.Generator:
        return keyed_generator(self.seed, stream, index)
