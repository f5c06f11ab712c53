"""Positions: what a view of a sequence is, which view a sample gets, and the RoPE tables at given positions."""

from megatron_rpsd.positions.perturbations import (
    View,
    batch_position_ids,
    chunk_permutation_view,
    cyclic_definition,
    cyclic_view,
    nope_view,
    pose_view,
    skip_view,
)
from megatron_rpsd.positions.rope import (
    EXACT_FP32_INTEGERS,
    RopeConfig,
    check_positions,
    inverse_frequencies,
    rope_tables,
    rotate,
)
from megatron_rpsd.positions.sampler import (
    PERTURBATIONS,
    POSE_CHUNKS,
    SPLIT_SAMPLINGS,
    SPLIT_VIEWS,
    Draw,
    StepShape,
    ViewSampler,
    split_density_at,
)

__all__ = [
    "EXACT_FP32_INTEGERS",
    "PERTURBATIONS",
    "POSE_CHUNKS",
    "SPLIT_SAMPLINGS",
    "SPLIT_VIEWS",
    "Draw",
    "RopeConfig",
    "StepShape",
    "View",
    "ViewSampler",
    "batch_position_ids",
    "check_positions",
    "chunk_permutation_view",
    "cyclic_definition",
    "cyclic_view",
    "inverse_frequencies",
    "nope_view",
    "pose_view",
    "rope_tables",
    "rotate",
    "skip_view",
    "split_density_at",
]
