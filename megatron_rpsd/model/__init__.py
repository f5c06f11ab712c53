"""Megatron's GPTModel with explicit positions and view pairs: the one door through which models are built."""

from megatron_rpsd.model.config import RPSDModelConfig, model_config_from_args
from megatron_rpsd.model.sequence import ViewSequence

__all__ = ["RPSDModelConfig", "ViewSequence", "model_config_from_args"]
