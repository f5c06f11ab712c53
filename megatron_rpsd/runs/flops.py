"""Floating-point operations of a training step, from the model's shape and what was read.

A matrix product of a token with an [out, in] weight is 2 x out x in operations forward and twice that backward. A
causal query-key pair costs 2 d for the score and 2 d for the value, per head, and again twice that backward. Norms,
rotation, softmax and the losses are left out: they move memory rather than multiply.

These are *model* operations: what the step needs. What a kernel or a setting does on top (scores rebuilt in a flash
kernel's backward, layers rebuilt by activation recomputation, keys multiplied and then masked) is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder; its feed-forward network is gated (three matrices) or not (two)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    gated: bool = True

    @property
    def weights_per_token(self) -> int:
        """Weights that every token is multiplied with, the output layer included."""
        heads = self.num_attention_heads * self.head_dim
        keys_and_values = 2 * self.num_query_groups * self.head_dim
        feed_forward = (3 if self.gated else 2) * self.ffn_hidden_size
        layer = self.hidden_size * (2 * heads + keys_and_values + feed_forward)
        return self.num_layers * layer + self.hidden_size * self.vocab_size

    @property
    def flops_per_pair(self) -> int:
        """Forward operations of one query-key pair over all layers."""
        return 4 * self.num_layers * self.num_attention_heads * self.head_dim


def causal_pairs(length: int, start: int = 0, borders: Sequence[int] | None = None) -> int:
    """Query-key pairs of queries `start` .. `length` - 1, each with the keys of its document up to itself.

    Args:
        borders: 0, the first token of every further document, `length`; None: one document.
    """
    pairs = 0
    for first, stop in pairwise((0, length) if borders is None else borders):
        size, before = stop - first, min(max(start - first, 0), stop - first)
        pairs += size * (size + 1) // 2 - before * (before + 1) // 2
    return pairs


def forward_flops(
    shape: ModelShape, length: int, suffix_start: int | None = None, borders: Sequence[int] | None = None
) -> int:
    """Forward operations of one sequence: one view (None), or a view pair from `suffix_start` on.

    The suffix's tokens run through every layer and the output layer again; its queries see the prefix's keys and its
    own, as many as under the standard view.

    Args:
        suffix_start: the split where the prefix is shared, 0 for a whole second view.
        borders: of the documents that attention does not cross; see `causal_pairs`.
    """
    tokens, pairs = length, causal_pairs(length, 0, borders)
    if suffix_start is not None:
        tokens += length - suffix_start
        pairs += causal_pairs(length, suffix_start, borders)
    return 2 * shape.weights_per_token * tokens + shape.flops_per_pair * pairs


def step_flops(
    shape: ModelShape, length: int, suffix_start: int | None = None, borders: Sequence[int] | None = None
) -> int:
    """Forward and backward operations of one sequence; see `forward_flops`."""
    return 3 * forward_flops(shape, length, suffix_start, borders)


def step_ratio_bound(shape: ModelShape, length: int, suffix_start: int) -> float:
    """A view pair's operations over one view's: 2 for a whole second view, less where the prefix is shared."""
    return step_flops(shape, length, suffix_start) / step_flops(shape, length)
