"""Plain attention behind the constructor and the call of transformer_engine.pytorch.DotProductAttention (2.20.2).

The parameters are those that are used, by Transformer Engine's names; another one is a TypeError. It has a context
parallelism of its own: keys are gathered from all ranks and put in order by Transformer Engine's rule, that rank r
holds chunks r and 2 CP - 1 - r of a sequence cut into 2 CP.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class _GatherTokens(torch.autograd.Function):
    """Every rank's tokens in rank order; each token's gradients are added over the ranks that read it."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


class DotProductAttention(torch.nn.Module):
    """See the module's docstring; remembers its calls' shapes and masks."""

    calls: list[tuple] = []

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        tp_size: int = 1,
        tp_group: dist.ProcessGroup | None = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: dist.ProcessGroup | None = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: torch.cuda.Stream | None = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0 and attention_type == "self" and layer_number >= 1
        assert tp_size == (1 if tp_group is None else tp_group.size()) and cp_comm_type in ("p2p", "all_gather", "a2a")
        if cp_group is not None:
            assert cp_global_ranks == dist.get_process_group_ranks(cp_group) and cp_stream is not None
        self.heads, self.groups, self.size = num_attention_heads // tp_size, num_gqa_groups // tp_size, kv_channels
        self.cp_group, self.scale = cp_group, softmax_scale

    def get_extra_state(self) -> torch.Tensor:
        """As Transformer Engine's modules: a key of every state_dict that reaches them."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Nothing is kept."""

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str | None = None,
        attn_mask_type: str | None = None,
    ) -> torch.Tensor:
        """[s, b, heads, d] each -> [s, b, heads x d], as Transformer Engine gives it."""
        tokens, rows = query_layer.shape[:2]
        assert attention_mask is None and qkv_format == "sbhd"
        assert query_layer.shape[2:] == (self.heads, self.size) and key_layer.shape[2:] == (self.groups, self.size)
        assert all(tensor.is_contiguous() for tensor in (query_layer, key_layer, value_layer))
        self.calls.append((tuple(query_layer.shape[:2]), tuple(key_layer.shape[:2]), attn_mask_type, self.training))
        places, keys = torch.arange(tokens), torch.arange(key_layer.shape[0])
        if attn_mask_type == "causal_bottom_right":
            assert self.cp_group is None, "Transformer Engine has no bottom-right mask under context parallelism"
            places = places + len(keys) - tokens
        else:
            assert attn_mask_type == "causal" and len(keys) == tokens
        if self.cp_group is not None:
            size, rank = self.cp_group.size(), self.cp_group.rank()
            chunks = torch.arange(size * tokens).chunk(2 * size)
            held = [torch.cat([chunks[other], chunks[2 * size - 1 - other]]) for other in range(size)]
            places, keys = held[rank], torch.cat(held)
            key_layer, value_layer = (_GatherTokens.apply(tensor, self.cp_group) for tensor in (key_layer, value_layer))
        key, value = (tensor.repeat_interleave(self.heads // self.groups, dim=2) for tensor in (key_layer, value_layer))
        scores = self.scale * torch.einsum("qbnd,kbnd->bnqk", query_layer, key)
        weights = scores.masked_fill(keys > places[:, None], float("-inf")).softmax(dim=-1)
        return torch.einsum("bnqk,kbnd->qbnd", weights, value).reshape(tokens, rows, -1)
