"""Bytes that one layer keeps for its backward pass, tensor by tensor, and what its backward pass needs besides.

Two implementations are known, since they keep different tensors:

    te      GPU: Transformer Engine's layers around our core attention, whose kernel is a flash attention that takes
            grouped heads. bf16. Written down from their sources; not measured by this project.
    local   CPU: Megatron's layers without Transformer Engine, torch's norm, and the CPU's flash kernel, which takes
            equal head counts, so that keys and values are repeated. fp32. Checked against live tensors
            (`live_tensors`) by the tests.

Items are named alike. `core` items belong to the core attention: they are what selective recomputation drops.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpsd.checkpoint.layouts import ModelDimensions
from megatron_rpsd.planning.rank_shapes import RankShape


@dataclass(frozen=True)
class Software:
    """An implementation of the layers.

    Attributes:
        element: bytes of a parameter and of an activation.
        transformer_engine: whose layers.
        grouped_kernel: whether the attention kernel takes grouped heads.
    """

    name: str
    element: int
    transformer_engine: bool
    grouped_kernel: bool


TE = Software("te", 2, True, True)
LOCAL = Software("local", 4, False, False)

Items = dict[str, int]


def layer_input(rank: RankShape, software: Software) -> int:
    """The hidden states that enter a layer: all that full recomputation keeps of it."""
    return rank.rows * rank.hidden * software.element


def core_attention(rank: RankShape, dims: ModelDimensions, software: Software) -> Items:
    """Kept between rotation and output projection."""
    element, kinds = software.element, 2  # keys and values
    suffix = sum(rank.suffix_keys)
    repeated = not software.grouped_kernel and rank.key != rank.query
    if repeated:
        keys = (sum(rank.standard_keys) + suffix) * kinds * rank.query
    else:
        # Standard chunks see views of the gathered tensor. A suffix chunk copies its two ranges into one.
        keys = (rank.gathered + suffix * rank.cut) * kinds * rank.key
    return {
        "rotated queries": rank.pair * rank.query * element,
        "keys and values over CP": keys * element + (8 * rank.gathered if rank.cp > 1 else 0),  # and their order
        "attention output": rank.pair * rank.query * element + 4 * rank.pair * rank.heads,  # and its log-sum-exp
    }


def layer(rank: RankShape, dims: ModelDimensions, software: Software) -> Items:
    """Everything that a layer keeps without recomputation."""
    element, te = software.element, software.transformer_engine
    normed = (1 if te else 2) * rank.rows * rank.hidden * element + 4 * rank.rows  # normalised (x weight), 1 / rms
    heads = 0
    if dims.qk_norm:
        # Inputs of both norms: a copy of the queries, and the keys, as a copy under Transformer Engine, else as a view
        # that keeps the fused projection's output; then their normal form, too.
        fused = rank.query + 2 * rank.key
        held = rank.query + (rank.key if te else fused + rank.query + rank.key)
        heads = rank.pair * held * element + 4 * rank.pair * (rank.heads + rank.key // dims.head_dim)
    mlp = (3 if te else 5) * rank.ffn  # gate and up; product; and silu and up + 0 where the activation is not fused
    return {
        "layer input": layer_input(rank, software),
        "norms": 2 * normed,
        "norms of heads": heads,
        **core_attention(rank, dims, software),
        "output projection's input": rank.pair * rank.query * element,
        "second residual": rank.rows * rank.hidden * element,
        "feed-forward": rank.pair * mlp * element,
    }


def selective_layer(rank: RankShape, dims: ModelDimensions, software: Software) -> Items:
    """What a layer keeps when its core attention is run again: unrotated queries, keys, values instead of its items."""
    dropped = core_attention(rank, dims, software)
    kept = {name: size for name, size in layer(rank, dims, software).items() if name not in dropped}
    # Queries are a copy; values are a view of the fused projection's output, which is thereby kept whole (the norm of
    # keys may have kept it already); normed heads stand beside it.
    fused = 0 if dims.qk_norm and not software.transformer_engine else rank.query + 2 * rank.key
    beside = rank.query + rank.key * dims.qk_norm
    kept["queries, keys, values"] = rank.pair * (fused + beside) * software.element
    return kept


def backward_extra(rank: RankShape, dims: ModelDimensions, software: Software) -> int:
    """The most that one layer's backward pass holds beyond what its forward pass kept.

    It begins with the feed-forward network, whose tensors, and those of its norm and of the output projection, are gone
    when attention's turn comes.
    """
    element, h = software.element, rank.hidden
    residual = rank.rows * h
    whole = rank.pair * h * (rank.tp > 1)  # gathered along tensor parallelism
    inner = rank.pair * rank.ffn
    feed_forward = max(2 * inner, whole + inner, whole + rank.pair * h - inner)
    kept = (3, 1) if software.transformer_engine else (5, 2)
    released = element * (kept[0] * inner + kept[1] * rank.rows * h + rank.pair * rank.query)
    keys = rank.standard_keys + rank.suffix_keys
    # Gradients: of the queries twice, of every chunk's keys and values, of one chunk's by query head, of all gathered.
    chunks = 2 * sum(keys) * (rank.key if software.grouped_kernel else rank.query)
    by_head = 2 * max(keys) * rank.query * (software.grouped_kernel and rank.key != rank.query)
    attention = element * (2 * rank.pair * rank.query + chunks + max(by_head, 2 * rank.gathered * rank.key))
    attention += 4 * rank.pair * rank.query * software.grouped_kernel  # the queries' gradient is summed in fp32
    return element * residual + max(element * feed_forward, attention - released)
