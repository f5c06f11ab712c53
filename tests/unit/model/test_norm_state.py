"""Transformer Engine's norms bring an empty state that checkpoints of the local layers do not have."""

from __future__ import annotations

import torch

from megatron_rpsd.model.norm_state import leave_norm_states_out


class Stateful(torch.nn.Module):
    """A module with an extra state, as Transformer Engine's."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        pass


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1, self.q_layernorm, self.final_norm = Stateful(), Stateful(), Stateful()

    def sharded_state_dict(self, prefix: str = "") -> dict:
        return self.state_dict(prefix=prefix)


def test_norms_are_left_out_and_linear_layers_stay():
    model = Model()
    assert len(model.sharded_state_dict()) == 3
    leave_norm_states_out(model)
    assert list(model.sharded_state_dict(prefix="module.")) == ["module.linear_fc1._extra_state"]
    model.load_state_dict({"linear_fc1._extra_state": torch.empty(0)})
    missing = model.load_state_dict({}, strict=False).missing_keys
    assert missing == ["linear_fc1._extra_state"], "what linear layers keep is still asked for"
