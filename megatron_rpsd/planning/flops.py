"""Floating-point operations before a run: the same counting that a run's throughput uses (`runs.flops`)."""

from megatron_rpsd.runs.flops import ModelShape, step_flops, step_ratio_bound

__all__ = ["ModelShape", "step_flops", "step_ratio_bound"]
