"""What drawing splits independently on every data-parallel rank costs: a step waits for the longest suffix.

With x = s / L a micro-step of a view pair costs 1 + 1 - x of one view's linear layers and 1 + 1 - x^2 of its attention.
All data-parallel ranks finish a micro-step's gradients together only at the end of a global step, so a rank's time is
the sum over its M micro-steps, and the step takes the maximum over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rpsd.positions import StepShape, ViewSampler


@dataclass(frozen=True)
class WaitingCost:
    """Expected step time over one view's, with the share of attention in one view's cost."""

    data_parallel_size: int
    independent: float
    stratified: float


def expected_step_time(
    data_parallel_size: int, micro_steps: int, attention_share: float, length: int = 65536, steps: int = 200
) -> WaitingCost:
    """Simulate `steps` global steps with the sampler itself.

    Args:
        micro_steps: M, micro-batches that a rank runs in a global step.
        attention_share: attention's share of one view's time, 0 to 1.

    Raises:
        ValueError: a size below 1, or a share outside of [0, 1].
    """
    if min(data_parallel_size, micro_steps, steps) < 1:
        raise ValueError(
            f"--micro-steps {micro_steps}, --steps {steps}, data-parallel size {data_parallel_size}: the least is 1"
        )
    if not 0 <= attention_share <= 1:
        raise ValueError(f"--attention-share {attention_share} must lie in [0, 1]")
    shape = StepShape(data_parallel_size * micro_steps, 1, data_parallel_size)
    times = {}
    for sampling in ("independent", "stratified"):
        sampler = ViewSampler(seed=1, perturbation="skip", length=length, split_sampling=sampling, step=shape)
        ranks = data_parallel_size if sampling == "independent" else 1  # stratified: every rank draws the same
        samples = np.arange(steps * micro_steps)[:, None] * data_parallel_size + np.arange(ranks)
        x = np.vectorize(lambda index, draw=sampler.view: draw(int(index)).split)(samples) / length
        cost = 1 + (1 - attention_share) * (1 - x) + attention_share * (1 - x**2)
        times[sampling] = cost.reshape(steps, micro_steps, ranks).sum(axis=1).max(axis=1).mean() / micro_steps
    return WaitingCost(data_parallel_size, float(times["independent"]), float(times["stratified"]))
