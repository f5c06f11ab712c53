"""What training changed in W_q and W_k, by RoPE frequency: the update spectrum of arXiv 2604.06070.

Frequency i of a head of d channels turns the pair (i, i + d/2) of its queries and keys (rotate-half pairing, as in
Llama, Qwen and Mistral). Its change in a layer and head is

    |W' - W| / |W|    over the rows i and i + d/2 of that head, Frobenius norms in fp64

W_v, which RoPE does not turn, is grouped in the same way as a control: what its curve shows is no effect of rotation.
One layer's projections are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_rpsd.checkpoint.families import MappedTensor, entries
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.layouts import ModelDimensions
from megatron_rpsd.positions import RopeConfig, inverse_frequencies

PROJECTIONS = ("W_q", "W_k", "W_v")
_QKV = "self_attention.linear_qkv.weight"


@dataclass(frozen=True)
class Weights:
    """Query, key and value projections of a model, wherever it is stored.

    Attributes:
        rope: base, scaling and window.
        read: a layer's line of the table -> [W_q, W_k, W_v], each [heads * d, h] as Hugging Face orders rows.
    """

    name: str
    dims: ModelDimensions
    rope: RopeConfig
    read: Callable[[MappedTensor], list[Tensor]]


def open_weights(path: str | Path, hf_reference: str | Path | None = None) -> Weights:
    """A Hugging Face folder, or a Megatron checkpoint folder with the Hugging Face folder that it came from.

    Raises:
        ValueError: neither, a checkpoint without a reference, or one of another model.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        folder = HFFolder(path)
        folder.check()
        base, scaling, window = folder.rope()
        dims = folder.dimensions()
        rope = RopeConfig(dims.head_dim, base, scaling, window)
        return Weights(str(path), dims, rope, lambda mapped: [folder.tensor(name) for name in mapped.hf_names])
    if hf_reference is None:
        raise ValueError(
            f"{path} has no config.json, so it is no Hugging Face folder; if it is a Megatron checkpoint, give "
            "--hf-reference, the folder that its model was imported from"
        )
    from megatron_rpsd.checkpoint.convert import rope_of_run  # Megatron takes seconds to import
    from megatron_rpsd.checkpoint.torch_dist_reader import TorchDistModel
    from megatron_rpsd.training.saved_checkpoint import checkpoint_folder, saved_arguments

    reference = HFFolder(hf_reference)
    at = checkpoint_folder(path)
    base, scaling, window = rope_of_run(saved_arguments(at), reference)
    dims = reference.dimensions()
    model = TorchDistModel(at, dims)
    return Weights(str(path), dims, RopeConfig(dims.head_dim, base, scaling, window), model.hf_tensors)


@dataclass(frozen=True)
class Updates:
    """The changes of one training.

    Attributes:
        changes: W_q, W_k, W_v -> float64 [layers, heads (W_k, W_v: KV heads), d/2]; NaN where the weight was 0.
        base_before, base_after: RoPE bases.
        window: of the model after training, in tokens.
        wavelengths: float64 [d/2], tokens in which a pair of the model after training turns once.
    """

    before: str
    after: str
    changes: dict[str, np.ndarray]
    base_before: float
    base_after: float
    window: int
    wavelengths: np.ndarray

    def curve(self, projection: str) -> np.ndarray:
        """Mean over layers and heads, [d/2]."""
        return _mean_of_known(self.changes[projection], (0, 1))

    def by_layer(self, projection: str) -> np.ndarray:
        """Mean over heads, [layers, d/2]."""
        return _mean_of_known(self.changes[projection], (1,))


def relative_change(before: Tensor, after: Tensor, head_dim: int) -> np.ndarray:
    """|after - before| / |before| of each head's frequencies, float64 [heads, d/2], of weights [heads * d, h].

    NaN where `before` is 0.
    """

    def norms(weight: Tensor) -> Tensor:
        return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).double().norm(dim=(1, 3))

    return (norms(after.double() - before.double()) / norms(before).where(norms(before) > 0, torch.nan)).numpy()


def compare_updates(before: Weights, after: Weights, progress: Callable[[], None] = lambda: None) -> Updates:
    """Changes of every layer, head and frequency.

    Args:
        progress: called after every layer.

    Raises:
        ValueError: different models.
    """
    if before.dims != after.dims:
        raise ValueError(
            f"--before {before.name} and --after {after.name} are different models: {before.dims}, {after.dims}"
        )
    changes: dict[str, list[np.ndarray]] = {name: [] for name in PROJECTIONS}
    for mapped in _layers(before.dims):
        pairs = zip(before.read(mapped), after.read(mapped), strict=True)
        for name, (old, new) in zip(PROJECTIONS, pairs, strict=True):
            changes[name].append(relative_change(old, new, before.dims.head_dim))
        progress()
    inv_freq, _ = inverse_frequencies(after.rope)
    return Updates(
        before.name,
        after.name,
        {name: np.stack(layers) for name, layers in changes.items()},
        before.rope.base,
        after.rope.base,
        after.rope.max_position_embeddings,
        2 * math.pi / inv_freq.double().numpy(),
    )


def _layers(dims: ModelDimensions) -> Iterator[MappedTensor]:
    """The fused projections of the table, from the first layer to the last."""
    return (mapped for mapped in entries(dims) if mapped.megatron_name.endswith(_QKV))


def most_changed(updates: Updates, count: int = 8) -> list[dict]:
    """The frequencies whose W_q changed most: index, wavelength in tokens, and each projection's mean change."""
    curves = {name: updates.curve(name) for name in PROJECTIONS}
    order = np.argsort(-np.nan_to_num(curves["W_q"]), kind="stable")[:count]
    return [
        {
            "index": int(index),
            "wavelength": float(updates.wavelengths[index]),
            **{name: _number(curve[index]) for name, curve in curves.items()},
        }
        for index in order
    ]


def update_record(updates: Updates, window: int) -> dict:
    """The comparison as a JSON value; what is undefined (a weight that was 0) is null.

    Args:
        window: tokens that the figures mark.
    """
    return {
        "before": updates.before,
        "after": updates.after,
        "rotary_base": {"before": updates.base_before, "after": updates.base_after},
        "window": window,
        "wavelengths": [float(value) for value in updates.wavelengths],
        "mean": {name: _numbers(updates.curve(name)) for name in PROJECTIONS},
        "most_changed": most_changed(updates),
        "by_layer_and_head": {name: _numbers(updates.changes[name]) for name in PROJECTIONS},
    }


def _mean_of_known(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Mean of what is not NaN; NaN where all is."""
    count = (~np.isnan(values)).sum(axis=axes)
    return np.where(count, np.nansum(values, axis=axes) / np.maximum(count, 1), np.nan)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _numbers(values: np.ndarray) -> list:
    return [_numbers(part) if part.ndim else _number(part) for part in values]
