"""A Llama written out in fp64: attention with an explicit mask, rotation at explicit positions. An oracle."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class PlainLlama:
    """Logits of one sequence; `weights` by Hugging Face name, leaves that take gradients."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self.weights = {name: tensor.double().requires_grad_() for name, tensor in stored.items()}
        rope = self.config.get("rope_parameters") or self.config
        self.base, self.dim = float(rope["rope_theta"]), self.config["head_dim"]

    def logits(self, tokens: Tensor, position_ids: Tensor, visible: Tensor) -> Tensor:
        """[s, v] of tokens [s] at position_ids [s]; query i sees key j where visible[i, j]."""
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            hidden = hidden + self._attention(layer, self._norm(hidden, layer, "input"), position_ids, visible)
            hidden = hidden + self._mlp(layer, self._norm(hidden, layer, "post_attention"))
        hidden = self._normed(hidden, self.weights["model.norm.weight"])
        return hidden @ self.weights["model.embed_tokens.weight"].T  # tied

    def _of(self, layer: int, name: str) -> Tensor:
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def _norm(self, hidden: Tensor, layer: int, which: str) -> Tensor:
        return self._normed(hidden, self._of(layer, f"{which}_layernorm"))

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden / (hidden.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt() * weight

    def _mlp(self, layer: int, hidden: Tensor) -> Tensor:
        gate, up = hidden @ self._of(layer, "mlp.gate_proj").T, hidden @ self._of(layer, "mlp.up_proj").T
        return (gate * gate.sigmoid() * up) @ self._of(layer, "mlp.down_proj").T

    def _attention(self, layer: int, hidden: Tensor, position_ids: Tensor, visible: Tensor) -> Tensor:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        query, key, value = (
            (hidden @ self._of(layer, f"self_attn.{name}_proj").T).view(len(hidden), count, self.dim)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        query, key = self._rotated(query, position_ids), self._rotated(key, position_ids)
        outputs = []
        for head in range(heads):
            own = head * groups // heads
            scores = query[:, head] @ key[:, own].T / self.dim**0.5
            outputs.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value[:, own])
        return torch.cat(outputs, dim=-1) @ self._of(layer, "self_attn.o_proj").T

    def _rotated(self, states: Tensor, position_ids: Tensor) -> Tensor:
        """Dimension pairs (j, j + d/2) as complex numbers, turned by position x base^(-2j/d)."""
        half = self.dim // 2
        angle = position_ids[:, None].double() * self.base ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        turned = torch.complex(states[..., :half], states[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)
