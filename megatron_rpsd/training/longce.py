"""LongCE: tokens weighed by how much the long context helps them (arXiv 2410.23771).

    w_i = min(exp(l_short(i) - l_long(i)), w_max)         detached; w_i = 1 for i < K

l_long is the token's loss with its whole context, l_short its loss with K to K + stride - 1 tokens before it, both by
the weights being trained. Token i is read again in the window that starts at floor((i - K) / stride) stride:

    window 0   |------ K ------|- stride -|            scores tokens K .. K + stride - 1
    window 1            |------ K ------|- stride -|   scores the next stride tokens

The objective is the mean of w_i l_long(i), not renormalised. The windows cost forward passes over
(L - K) / stride x (K + stride) tokens more: 4.4 times the sequence's at L = 32,768 with the paper's K = 4,096 and
stride 1,024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LongCE:
    """The paper's constants.

    Attributes:
        context: K, tokens that a token's short reading sees at least.
        stride: tokens that a window scores.
        max_weight: w_max.
    """

    context: int = 4096
    stride: int = 1024
    max_weight: float = 5.0

    def window_starts(self, length: int) -> list[int]:
        """First token of every window over a sequence of `length` tokens."""
        return list(range(0, max(0, length - self.context), self.stride))

    def windows(self, sequences: Tensor) -> Tensor:
        """All windows [b x windows, K + stride] of sequences [b, L]; what lies beyond L repeats the last token.

        Attention is causal, so the repeated tokens change nothing of those before them.
        """
        width, length = self.context + self.stride, sequences.shape[1]
        missing = max(0, max(self.window_starts(length)) + width - length)
        padded = torch.cat([sequences, sequences[:, -1:].expand(-1, missing)], dim=1)
        return torch.stack([padded[:, start : start + width] for start in self.window_starts(length)], 1).flatten(0, 1)

    def scored(self, losses: Tensor, length: int) -> Tensor:
        """Short losses [b, L] out of windows' losses [b x windows, K + stride]; nan for tokens before K."""
        per_window = losses[:, self.context :].unflatten(0, (-1, len(self.window_starts(length))))
        known = per_window.flatten(1)[:, : length - self.context]
        return torch.cat([known.new_full((len(known), self.context), torch.nan), known], dim=1)

    def weights(self, short: Tensor, long: Tensor) -> Tensor:
        """w of tokens with these losses; 1 where the short one is nan."""
        return torch.where(short.isnan(), 1.0, (short - long).exp().clamp(max=self.max_weight))
