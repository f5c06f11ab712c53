"""What a step costs before it is run: floating-point operations of one view and of a view pair."""

from megatron_rpsd.planning.flops import ModelShape, step_flops, step_ratio_bound

__all__ = ["ModelShape", "step_flops", "step_ratio_bound"]
