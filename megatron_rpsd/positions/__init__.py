"""Positions: what a view of a sequence is, which view a sample gets, and the RoPE tables at given positions."""

from megatron_rpsd.positions.documents import Documents, DocumentViews, document_ids, draw_document_views
from megatron_rpsd.positions.lengths import LengthSchedule, MixedLengths, cut_rows, parse_share, scaled_step
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
from megatron_rpsd.positions.phases import Phase, PhaseSchedule, parse_phases
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
    keyed_generator,
    split_density_at,
)

__all__ = [
    "EXACT_FP32_INTEGERS",
    "PERTURBATIONS",
    "POSE_CHUNKS",
    "SPLIT_SAMPLINGS",
    "SPLIT_VIEWS",
    "DocumentViews",
    "Documents",
    "Draw",
    "LengthSchedule",
    "MixedLengths",
    "Phase",
    "PhaseSchedule",
    "RopeConfig",
    "StepShape",
    "View",
    "ViewSampler",
    "batch_position_ids",
    "check_positions",
    "chunk_permutation_view",
    "cut_rows",
    "cyclic_definition",
    "cyclic_view",
    "document_ids",
    "draw_document_views",
    "inverse_frequencies",
    "keyed_generator",
    "nope_view",
    "parse_phases",
    "parse_share",
    "pose_view",
    "rope_tables",
    "rotate",
    "scaled_step",
    "skip_view",
    "split_density_at",
]
