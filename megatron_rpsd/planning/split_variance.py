"""How noisy the KL's gradient becomes when the second view is drawn more cheaply.

With g(x) the KL gradient of a micro-step whose split is x = s / L, a draw with density f weighs g by 1 / f, and a draw
that is taken with probability p by 1 / p. Both leave the mean g' unchanged; the variance per micro-step is

    mean over x of |g(x)|^2 / (f(x) p)  -  |g'|^2

so one sweep over splits gives every setting's variance without drawing any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_rpsd.positions import View, split_density_at


def kl_gradient_norms(
    hf: str, windows: np.ndarray, splits: Sequence[int], progress: Callable[[str], None] = lambda line: None
) -> tuple[list[float], float]:
    """Squared norms of the KL's gradient at every split (mean over windows' draws), and of their mean.

    Args:
        hf: a Hugging Face folder; fp32 on this process.
        windows: int64 [N, L + 1]; every (window, split) is one micro-step with a shift of its own.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_rpsd.checkpoint.convert import hf_session_arguments
    from megatron_rpsd.checkpoint.hf_folder import HFFolder
    from megatron_rpsd.checkpoint.model_loading import load_hf_weights
    from megatron_rpsd.training.run import forward_step_from_args
    from megatron_rpsd.training.session import build_stages, end_session, start_session

    folder, length = HFFolder(hf), windows.shape[1] - 1
    arguments = [*hf_session_arguments(folder, torch.float32), "--device", "cpu", "--seq-length", str(length)]
    args, config = start_session([*arguments, "--no-check-for-nan-in-loss-and-grad"])
    (stage,) = build_stages(config, args, wrap_with_ddp=True)
    load_hf_weights([stage], folder, 1, 0, args.padded_vocab_size)
    forward_step = forward_step_from_args(args, config)
    shifts = np.random.default_rng(0).integers(1, length + 1, (len(windows), len(splits)))
    parameters = list(stage.module.parameters())
    mean = [torch.zeros_like(parameter) for parameter in parameters]
    squares = [0.0] * len(splits)
    for row, window in enumerate(windows):
        ids = torch.as_tensor(window)
        sample = {"tokens": ids[None, :-1], "labels": ids[None, 1:], "loss_mask": torch.ones(1, length)}
        for place, split in enumerate(splits):
            view = View(split, int(shifts[row, place]))

            def kl_alone(iterator, model, sample=sample, view=view):
                output, _ = forward_step.run(model, sample, [view], forward_step.layout(view.split))
                return output, lambda sums: (sums[1], torch.tensor(length, dtype=torch.int), {})

            stage.zero_grad_buffer()
            get_forward_backward_func()(
                forward_step_func=kl_alone, data_iterator=None, model=stage, num_microbatches=1, seq_length=length,
                micro_batch_size=1, forward_only=False,
            )  # fmt: skip
            gradient = [parameter.main_grad / length for parameter in parameters]
            squares[place] += sum(part.double().pow(2).sum().item() for part in gradient) / len(windows)
            for total, part in zip(mean, gradient, strict=True):
                total += part / (len(windows) * len(splits))
            progress(f"window {row + 1}/{len(windows)}, split {split}: |gradient|^2 {squares[place]:.4g}")
    end_session()
    count = len(windows) * len(splits)
    square_of_mean = sum(total.double().pow(2).sum().item() for total in mean)
    # A mean of n draws keeps 1 / n of their variance in its square; taken out here.
    return squares, (count * square_of_mean - float(np.mean(squares))) / (count - 1)


def variance_ratio(
    squares: Sequence[float], mean_square: float, probability: float = 1.0, density: float = 0.0
) -> float:
    """Variance of a micro-step's KL gradient over that of uniform splits always taken; splits at stratum middles."""
    x = (np.arange(len(squares)) + 0.5) / len(squares)
    weights = 1 / (split_density_at(x, density) * probability)
    return float((np.mean(np.array(squares) * weights) - mean_square) / (np.mean(squares) - mean_square))
