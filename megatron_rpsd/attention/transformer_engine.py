"""Transformer Engine's DotProductAttention as a layer's attention, in bf16 or FP8. It has not run on a GPU yet.

Two forms of one layer:

- `whole`: whole sequences, causal, over the context-parallel group by Transformer Engine itself (p2p ring, all_gather
  or a2a). The only form that FP8 has: there is no FP8 kernel with a bottom-right mask, and under context parallelism
  Transformer Engine takes none in any precision.
- `block`: queries that end where their keys end, on one rank, in bf16: what a shared prefix and documents ask for.

Scales of delayed FP8 scaling live in the module and are not saved with checkpoints, as with Megatron's own wrapper: a
resumed run starts them anew. The modules have no parameters. They are kept out of torch's module tree, so that they
add no `_extra_state` to a model: checkpoints load in both directions, and conversion sees nothing of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpsd.parallel.collectives import group_size


class TransformerEngineAttention:
    """One layer's attention.

    Args:
        heads, groups: query and key heads of the whole layer, over all tensor-parallel ranks.
        head_dim: d.
        scale: factor on the scores.
        layer_number: from 1.
        tp_group, cp_group: the rank's groups; None for one rank.
        cp_comm_type: how keys travel: p2p, all_gather or a2a.
        module: a class with the constructor and the call of transformer_engine.pytorch.DotProductAttention, which is
            the default.
    """

    _stream: torch.cuda.Stream | None = None  # one for all layers: p2p overlaps two steps of the ring

    def __init__(
        self,
        heads: int,
        groups: int,
        head_dim: int,
        scale: float,
        layer_number: int,
        tp_group: dist.ProcessGroup | None = None,
        cp_group: dist.ProcessGroup | None = None,
        cp_comm_type: str = "p2p",
        module: Callable | None = None,
    ) -> None:
        module = module or importlib.import_module("transformer_engine.pytorch").DotProductAttention
        self.scale = scale
        options = {
            "num_attention_heads": heads,
            "kv_channels": head_dim,
            "num_gqa_groups": groups,
            "attention_dropout": 0.0,
            "qkv_format": "sbhd",
            "attn_mask_type": "causal",
            "tp_size": group_size(tp_group),
            "tp_group": tp_group,
            "layer_number": layer_number,
            "attention_type": "self",
            "softmax_scale": scale,
        }
        self._block = self._whole = module(**options)
        if group_size(cp_group) > 1:
            ranks = dist.get_process_group_ranks(cp_group)
            self._whole = module(
                **options,
                cp_group=cp_group,
                cp_global_ranks=ranks,
                cp_stream=self._ring_stream(),
                cp_comm_type=cp_comm_type,
            )

    @property
    def modules(self) -> tuple:
        """Transformer Engine's modules: one, or under context parallelism one for each form."""
        return (self._whole,) if self._whole is self._block else (self._whole, self._block)

    @classmethod
    def _ring_stream(cls) -> torch.cuda.Stream:
        if TransformerEngineAttention._stream is None:
            TransformerEngineAttention._stream = torch.cuda.Stream()
        return TransformerEngineAttention._stream

    def train(self, mode: bool) -> None:
        """Follow the layer: in evaluation Transformer Engine may choose kernels that have no backward."""
        for module in self.modules:
            module.train(mode)

    def whole(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of whole sequences; a rank's zigzag shard [L/cp, sequences, n/tp, d] in and out; keys and
        values have g/tp heads.
        """
        return self._call(self._whole, query, key, value, "causal")

    def block(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `causal_attention`: query [sq, b, n/tp, d], key and value [sk, b, g/tp, d]."""
        assert scale == self.scale
        mask = "causal" if query.shape[0] == key.shape[0] else "causal_bottom_right"
        return self._call(self._block, query, key, value, mask)

    @staticmethod
    def _call(module: Callable, query: Tensor, key: Tensor, value: Tensor, mask: str) -> Tensor:
        tensors = (tensor.contiguous() for tensor in (query, key, value))
        return module(*tensors, qkv_format="sbhd", attn_mask_type=mask).view(query.shape)  # heads come back merged
