"""Floating-point operations of a training step, from the model's shape alone.

A matrix product of a token with an [out, in] weight is 2 x out x in operations forward and twice that backward. A
causal query-key pair costs 2 d for the score and 2 d for the value, per head, and again twice that backward. Norms,
rotation, softmax and the losses are left out: they move memory rather than multiply.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder with a gated feed-forward network."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int

    @property
    def weights_per_token(self) -> int:
        """Weights that every token is multiplied with, the output layer included."""
        heads = self.num_attention_heads * self.head_dim
        keys_and_values = 2 * self.num_query_groups * self.head_dim
        layer = self.hidden_size * (2 * heads + keys_and_values + 3 * self.ffn_hidden_size)
        return self.num_layers * layer + self.hidden_size * self.vocab_size

    @property
    def flops_per_pair(self) -> int:
        """Forward operations of one query-key pair over all layers."""
        return 4 * self.num_layers * self.num_attention_heads * self.head_dim


def step_flops(shape: ModelShape, length: int, suffix_start: int | None = None) -> int:
    """Forward and backward operations of one sequence: one view (None), or a view pair from `suffix_start` on."""
    tokens, pairs = length, length * (length + 1) // 2
    if suffix_start is not None:
        tokens += length - suffix_start
        pairs += length * (length + 1) // 2 - suffix_start * (suffix_start + 1) // 2
    return 3 * (2 * shape.weights_per_token * tokens + shape.flops_per_pair * pairs)


def step_ratio_bound(shape: ModelShape, length: int, suffix_start: int) -> float:
    """A view pair's operations over one view's: 2 for a whole second view, less where the prefix is shared."""
    return step_flops(shape, length, suffix_start) / step_flops(shape, length)
