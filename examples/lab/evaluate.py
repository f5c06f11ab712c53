"""A trained checkpoint's exam: which of the ten answers at the end of each document it gets right."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.lab.data import read_exam

_DOCUMENTS_AT_ONCE = 4


def examine(checkpoint: Path, data: Path, lengths: Sequence[int]) -> dict[int, np.ndarray]:
    """Whether the newest checkpoint of a run answers each query, under standard positions. On one rank of its own.

    Answers are teacher-forced: each is predicted from everything before it, earlier answers included.

    Returns:
        bool [documents, 10] by depth decile, for every length.
    """
    from megatron_rpsd.training.main import choose_device

    choose_device(["--device", "cpu", "--force-cpu-runtime"])
    from megatron.training.checkpointing import load_checkpoint

    from megatron_rpsd.training.run import forward_step_from_args
    from megatron_rpsd.training.session import build_stages, end_session, start_session

    args, config = start_session([
        "--device", "cpu", "--use-checkpoint-args", "--load", str(checkpoint), "--seq-length", str(max(lengths)),
        "--tokenizer-type", "NullTokenizer", "--make-vocab-size-divisible-by", "1", "--auto-detect-ckpt-format",
        "--objective", "standard", "--exit-on-missing-checkpoint",
    ])  # fmt: skip
    try:
        (model,) = build_stages(config, args)
        with contextlib.redirect_stdout(io.StringIO()):
            load_checkpoint([model], None, None)
        model.eval()
        forward_step = forward_step_from_args(args, config)
        return {length: _right_answers(model, forward_step, read_exam(data, length)) for length in lengths}
    finally:
        end_session()


def _right_answers(model, forward_step, exam) -> np.ndarray:
    import torch

    from megatron_rpsd.parallel import ViewLayout
    from megatron_rpsd.positions import View
    from megatron_rpsd.training.batch import make_view_batch

    right = []
    for start in range(0, len(exam.tokens), _DOCUMENTS_AT_ONCE):
        rows = slice(start, start + _DOCUMENTS_AT_ONCE)
        ids, positions = torch.from_numpy(exam.tokens[rows]), torch.from_numpy(exam.positions[rows])
        sample = {"tokens": ids, "labels": ids, "loss_mask": torch.ones(ids.shape)}
        layout = ViewLayout(ids.shape[1], None, 1, 0)
        batch = make_view_batch(sample, [View.identity()] * len(ids), "standard", layout)
        with torch.no_grad():
            logits = model(
                batch.tokens, None, None, packed_seq_params=forward_step.sequence(batch),
                output_processor=_logits_at, output_processor_context=positions,
            )  # fmt: skip
        right.append(logits.argmax(dim=-1).numpy() == exam.answers[rows])
    return np.concatenate(right)


def _logits_at(*, hidden_states, output_layer, output_weight, context, scale_logits, **_):
    """GPTModel's `output_processor` hook: logits [b, q, v] at the positions `context` [b, q] of one rank's tokens."""
    import torch

    rows = torch.arange(len(context))[:, None].expand_as(context)
    logits, _ = output_layer(hidden_states[context, rows], weight=output_weight)
    return scale_logits(logits)
