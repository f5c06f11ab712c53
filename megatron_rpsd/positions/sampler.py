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

import numpy as np

from megatron_rpsd.positions.perturbations import View, cyclic_view, skip_view

PERTURBATIONS = ("skip", "cyclic")
SPLIT_SAMPLINGS = ("stratified", "independent")

_WORD = 2**64
# Second half of Philox's key: one number per random quantity, so that quantities never share a stream.
_SHIFT, _SPLIT, _ORDER, _APPLY = 0x52505344, 0x52505345, 0x52505346, 0x52505347


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
    granule.

    Raises:
        ValueError: an argument out of range, naming the flag.
    """

    seed: int
    """--rpsd-seed, 0 <= seed < 2**64."""
    perturbation: str
    """--rpsd-perturbation: skip or cyclic."""
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
    """--rpsd-split-density a: splits have density 1 - a + 2 a s/L, and the KL weighs its inverse. 0 is uniform."""

    def __post_init__(self) -> None:
        if self.perturbation not in PERTURBATIONS:
            raise ValueError(f"--rpsd-perturbation {self.perturbation} is unknown: choose {' or '.join(PERTURBATIONS)}")
        if self.split_sampling not in SPLIT_SAMPLINGS:
            known = " or ".join(SPLIT_SAMPLINGS)
            raise ValueError(f"--rpsd-split-sampling {self.split_sampling} is unknown: choose {known}")
        if not 0 <= self.seed < _WORD:
            raise ValueError(f"--rpsd-seed {self.seed} is out of range: choose 0 <= seed < 2**64")
        if self.length < 2:
            raise ValueError(f"--seq-length {self.length} is too short to perturb: it needs at least 2 tokens")
        if self.max_shift is None:
            object.__setattr__(self, "max_shift", self.length)
        if self.max_shift < 1:
            raise ValueError(f"--rpsd-max-shift {self.max_shift} leaves no shift to draw: choose at least 1")
        if self.perturbation == "cyclic" and self.max_shift != self.length:
            raise ValueError(
                f"--rpsd-max-shift {self.max_shift} does not apply to --rpsd-perturbation cyclic, which always shifts "
                f"by --seq-length {self.length}: leave it out"
            )
        if not 1 <= self.granule <= self.length:
            raise ValueError(f"--rpsd-split-granule {self.granule} must lie in 1..--seq-length {self.length}")
        if not 0 < self.apply_probability <= 1:
            raise ValueError(f"--rpsd-apply-probability {self.apply_probability} must lie in (0, 1]")
        if not 0 <= self.split_density < 1:
            raise ValueError(f"--rpsd-split-density {self.split_density} must lie in [0, 1)")

    def draw(self, sample_index: int) -> Draw:
        """View and KL weight of the sample with this global index (its place in the run's order of samples)."""
        group, stratum, strata = self._place(sample_index)
        if self.apply_probability < 1 and self._generator(_APPLY, group).random() >= self.apply_probability:
            return Draw(View.identity(), 0.0)
        uniform = (stratum + self._generator(_SPLIT, group).random()) / strata
        place, weight = self._warp(uniform)
        first = 1 if self.perturbation == "cyclic" else 0
        split = min(first + math.floor(place * (self.length - first)), self.length - 1)
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

        With x = s / L the suffix costs 1 - x of the linear layers and 1 - x^2 of the attention.
        """
        a, p = self.split_density, self.apply_probability
        return p * (1 / 2 - a / 6), p * (2 / 3 - a / 6)

    def _place(self, sample_index: int) -> tuple[int, int, int]:
        """(key of the split, its stratum, number of strata) of a sample."""
        assert 0 <= sample_index < _WORD, f"sample index {sample_index} does not fit in 64 bits"
        micro_batch = sample_index // self.step.micro_batch_size
        if self.split_sampling == "independent":
            return micro_batch, 0, 1
        micro_step = micro_batch // self.step.data_parallel_size
        strata = self.step.micro_steps
        order = self._generator(_ORDER, micro_step // strata).permutation(strata)
        return micro_step, int(order[micro_step % strata]), strata

    def _warp(self, uniform: float) -> tuple[float, float]:
        """(place in [0, 1), importance weight) under density 1 - a + 2 a x, by its inverse distribution function."""
        a = self.split_density
        if a == 0:
            return uniform, 1.0
        place = (math.sqrt((1 - a) ** 2 + 4 * a * uniform) - (1 - a)) / (2 * a)
        return place, 1 / split_density_at(place, a)

    def _generator(self, stream: int, index: int) -> np.random.Generator:
        """Philox is a function of (key, counter): the key is (seed, stream), the index the counter's highest word.

        A draw advances the counter's lowest word, so two indices would meet only after 2**192 blocks.
        """
        bits = np.random.Philox(
            key=np.array([self.seed, stream], dtype=np.uint64), counter=np.array([0, 0, 0, index], dtype=np.uint64)
        )
        return np.random.Generator(bits)
