"""Transformer Engine's norms without the empty state that they would add to checkpoints.

From Transformer Engine 2 on its norms are operators with an `_extra_state`, which is empty: a norm has no scale. The
local layer specification has none, so a checkpoint written on the CPU, every converted one included, would be refused
for want of it. What linear layers keep (FP8 scales) stays: both specifications have that key. Ends when Megatron skips
keys without content.
"""

from __future__ import annotations

import functools

import torch

_NORM_STATES = ("norm._extra_state",)


def leave_norm_states_out(model: torch.nn.Module) -> None:
    """Neither save nor ask for the norms' empty states; `model` is a GPTModel of Transformer Engine's layers."""
    original = model.sharded_state_dict

    @functools.wraps(original)
    def sharded_state_dict(*given, **named) -> dict:
        return {key: value for key, value in original(*given, **named).items() if not key.endswith(_NORM_STATES)}

    def forgive(module, incompatible_keys) -> None:
        for key in [key for key in incompatible_keys.missing_keys if key.endswith(_NORM_STATES)]:
            incompatible_keys.missing_keys.remove(key)

    model.sharded_state_dict = sharded_state_dict
    model.register_load_state_dict_post_hook(forgive)
