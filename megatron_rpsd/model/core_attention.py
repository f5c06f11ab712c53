"""Megatron's core attention slot, filled with rotation at explicit positions and view attention."""

from __future__ import annotations

import math

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rpsd.attention import (
    BLOCK_KERNELS,
    TransformerEngineAttention,
    stackable,
    stacked_attention,
    view_attention,
)
from megatron_rpsd.model.sequence import ViewSequence
from megatron_rpsd.positions import rotate


class ViewPairAttention(MegatronModule):
    """Rotates queries and keys in fp32 at the micro-batch's positions, then attends within each view.

    Rotation happens here rather than in Megatron's attention because that takes one row of angles for the whole
    micro-batch (every sample has a shift of its own) and rotates in the activations' dtype.

    Args:
        kernel: one of `attention.KERNELS`. Under te, whole views go to Transformer Engine as rows of one batch
            (`attention.stacking`), in FP8 where the configuration says fp8_dot_product_attention, and everything else a
            block at a time in bf16. No other kernel has a state.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        kernel: str = "sdpa",
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self" and attn_mask_type == AttnMaskType.causal
        head_dim = config.kv_channels
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(head_dim)
        self.cp_group = pg_collection.cp
        self.in_fp8 = bool(config.fp8 and config.fp8_dot_product_attention)
        self.kernel, self.engine = BLOCK_KERNELS.get(kernel), None
        if kernel == "te":
            self.engine = TransformerEngineAttention(
                config.num_attention_heads, config.num_query_groups, head_dim, self.scale, layer_number,
                pg_collection.tp, pg_collection.cp, cp_comm_type or "p2p",
            )  # fmt: skip
            self.kernel = self.engine.block

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: ViewSequence | None = None,
    ) -> Tensor:
        """Context of local queries.

        Args:
            query: [(2L-t)/cp, b, n/tp, d], not rotated.
            key, value: [(2L-t)/cp, b, g/tp, d], not rotated.
            packed_seq_params: the micro-batch's layout and rotary tables.

        Returns:
            [(2L-t)/cp, b, n/tp * d].
        """
        assert isinstance(packed_seq_params, ViewSequence), "the forward step passes the layout with every micro-batch"
        assert attention_mask is None and attention_bias is None, "views are causal; no other mask is applied"
        sequence = packed_seq_params
        query = rotate(query, sequence.cos, sequence.sin)
        key = rotate(key, sequence.cos, sequence.sin)
        if self.engine is not None:
            self.engine.train(self.training)
        if self.engine is not None and stackable(sequence.layout, sequence.documents):
            context = stacked_attention(query, key, value, sequence.layout, self.engine.whole)
        else:
            assert not self.in_fp8, "FP8 attention reads whole views of one document; the arguments' check says so"
            context = view_attention(
                query, key, value, sequence.layout, self.cp_group, self.scale, self.kernel, sequence.documents
            )
        return context.reshape(*context.shape[:2], -1)
