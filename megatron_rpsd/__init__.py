"""Long-context adaptation by RoPE-perturbed self-distillation (RPSD) on Megatron's own training loop."""

__version__ = "0.1.0"
