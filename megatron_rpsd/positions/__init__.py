"""Positions: what a view of a sequence is, which view a sample gets, and the RoPE tables at given positions."""

from megatron_rpsd.positions.perturbations import (
    View,
    batch_position_ids,
    cyclic_definition,
    cyclic_view,
    skip_view,
)
from megatron_rpsd.positions.rope import (
    RopeConfig,
    check_positions,
    inverse_frequencies,
    rope_tables,
    rotate,
)
from megatron_rpsd.positions.sampler import (
    PERTURBATIONS,
    SPLIT_SAMPLINGS,
    Draw,
    StepShape,
    ViewSampler,
    split_density_at,
)

__all__ = [
    "PERTURBATIONS",
    "SPLIT_SAMPLINGS",
    "Draw",
    "RopeConfig",
    "StepShape",
    "View",
    "ViewSampler",
    "batch_position_ids",
    "check_positions",
    "cyclic_definition",
    "cyclic_view",
    "inverse_frequencies",
    "rope_tables",
    "rotate",
    "skip_view",
    "split_density_at",
]
