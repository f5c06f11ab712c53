"""Next-token logits of a Megatron checkpoint and of a Hugging Face folder, each by its own library's model code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class LogitsComparison:
    """How two [s, v] logits differ.

    Attributes:
        max_difference: largest absolute difference of a logit.
        largest_logit: largest absolute value of the second, for scale.
        agreement: share of the s positions at which both rank the same token first.
    """

    max_difference: float
    largest_logit: float
    agreement: float


def compare_logits(ours: np.ndarray, theirs: np.ndarray) -> LogitsComparison:
    """Compare logits of the same tokens, both [s, v]; a NaN in either makes `max_difference` NaN."""
    assert ours.shape == theirs.shape
    return LogitsComparison(
        max_difference=float(np.abs(ours - theirs).max()),
        largest_logit=float(np.abs(theirs).max()),
        agreement=float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
    )


def megatron_logits(
    checkpoint: str | Path, hf_reference: str | Path, tokens: np.ndarray, iteration: int | None = None
) -> np.ndarray:
    """Logits of a run's checkpoint under the standard view, on the CPU.

    Installs the CPU runtime, so it belongs into a process of its own.

    Args:
        hf_reference: the folder that the model was imported from.
        tokens: int [s].
        iteration: default: the newest.

    Returns:
        float32 [s, v], v without padding.

    Raises:
        ValueError: no checkpoint, or one of another model.
    """
    import torch

    from megatron_rpsd.training.main import choose_device

    choose_device(["--device", "cpu"])
    from megatron_rpsd.checkpoint.convert import load_megatron
    from megatron_rpsd.checkpoint.hf_folder import HFFolder
    from megatron_rpsd.parallel import ViewLayout
    from megatron_rpsd.positions import View
    from megatron_rpsd.training.batch import make_view_batch
    from megatron_rpsd.training.run import forward_step_from_args
    from megatron_rpsd.training.session import end_session

    reference = HFFolder(hf_reference)
    loaded = load_megatron(checkpoint, reference, iteration=iteration)
    try:
        ids = torch.as_tensor(np.asarray(tokens), dtype=torch.int64)[None]
        sample = {"tokens": ids, "labels": ids, "loss_mask": torch.ones(ids.shape)}
        batch = make_view_batch(sample, [View.identity()], "standard", ViewLayout(ids.shape[1], None, 1, 0))
        sequence = forward_step_from_args(loaded.args, loaded.config).sequence(batch)
        (model,) = loaded.stages
        model.eval()
        with torch.no_grad():
            logits = model(batch.tokens, None, None, packed_seq_params=sequence, output_processor=_whole_logits)
        return logits[:, 0, : reference.dimensions().vocab_size].float().numpy()
    finally:
        end_session()


def _whole_logits(*, hidden_states, output_layer, output_weight, scale_logits, **_):
    """GPTModel's `output_processor` hook: logits [s, b, v] of one rank."""
    logits, _ = output_layer(hidden_states, weight=output_weight)
    return scale_logits(logits)


def transformers_logits(hf: str | Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [s, v] in float32 of a Hugging Face folder by transformers' own model, on the CPU; tokens int [s]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(hf), dtype=torch.float32)
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens), dtype=torch.int64)[None]).logits[0].numpy()
