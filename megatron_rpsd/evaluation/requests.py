"""What a user asks a probe for, checked before any process starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_rpsd.checkpoint.layouts import ModelDimensions
from megatron_rpsd.evaluation.probe import ParallelLayout
from megatron_rpsd.positions import View, check_positions, cyclic_view, skip_view


def read_tokens(path: str | Path, vocab_size: int) -> np.ndarray:
    """Token ids int64 [L + 1] of an .npy file.

    Raises:
        ValueError: no such file, another shape or type, or an id outside of the vocabulary.
    """
    if not Path(path).is_file():
        raise ValueError(f"--tokens {path} is not a file")
    try:
        with open(path, "rb") as file:
            tokens = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"--tokens {path} is no .npy array: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or len(tokens) < 3:
        raise ValueError(f"--tokens {path} holds {tokens.dtype} {tokens.shape}; it must be integer [L + 1] with L >= 2")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        raise ValueError(f"--tokens {path} holds id {outside[0]}, outside of the model's vocabulary of {vocab_size}")
    return tokens.astype(np.int64)


def view_of(kind: str, split: int, shift: int | None, length: int) -> View:
    """The perturbed view that the flags describe; a cyclic view's split is L - u, its shift -L.

    Raises:
        ValueError: split or shift out of range.
    """
    if not 0 <= split < length:
        raise ValueError(f"--split {split}: it must lie in 0..{length - 1}, the sequence has {length} tokens")
    if kind == "cyclic":
        if shift is not None and abs(shift) != length:
            raise ValueError(f"--shift {shift}: a cyclic view always shifts by the length {length}; leave it out")
        return cyclic_view((length - split) % length, length)
    if shift is None or shift < 0:
        raise ValueError(f"--shift {shift}: a skip view needs a shift of at least 0")
    check_positions(length, max(shift, 1))
    return skip_view(split, shift, length)


def check_heads(dims: ModelDimensions, layout: ParallelLayout) -> None:
    """Refuse parallel degrees that do not divide the model.

    Raises:
        ValueError: TP does not divide the heads, PP not the layers, or a degree below 1.
    """
    degrees = {
        "--tensor-model-parallel-size": layout.tensor,
        "--context-parallel-size": layout.context,
        "--pipeline-model-parallel-size": layout.pipeline,
    }
    for flag, degree in degrees.items():
        if degree < 1:
            raise ValueError(f"{flag} {degree}: a parallel degree is at least 1")
    for name, count, flag in (
        ("attention heads", dims.num_attention_heads, "--tensor-model-parallel-size"),
        ("key-value heads", dims.num_query_groups, "--tensor-model-parallel-size"),
        ("layers", dims.num_layers, "--pipeline-model-parallel-size"),
    ):
        if count % degrees[flag]:
            raise ValueError(
                f"{flag} {degrees[flag]} does not divide the model's {count} {name}: "
                f"{count} / {degrees[flag]} = {count / degrees[flag]:.2f}"
            )
