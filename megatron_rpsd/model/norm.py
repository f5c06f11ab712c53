"""RMSNorm for the layer specification without Transformer Engine, sequence parallelism included."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight tells Megatron to sum its gradient over the tensor-parallel group.

    Under sequence parallelism every rank normalises its own tokens with a replicated weight, so the weight's gradient
    is a sum over ranks; Megatron finds such weights by the attribute `sequence_parallel`. Its own wrapper of torch's
    norms refuses sequence parallelism instead.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        assert config.normalization == "RMSNorm"
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
