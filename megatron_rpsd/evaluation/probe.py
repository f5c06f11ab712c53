"""The losses of given sequences under given views, by the training path's own code, at any parallel layout.

A probe loads a Hugging Face folder straight into sharded Megatron stages and runs Megatron's pipeline schedule forward:
what it reports is what training would see for that sample and view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_rpsd.positions import View


@dataclass(frozen=True)
class ParallelLayout:
    """Parallel degrees of a probe; their product is its number of processes."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Processes needed."""
        return self.tensor * self.context * self.pipeline

    def arguments(self) -> list[str]:
        """Megatron's flags."""
        flags = [
            "--tensor-model-parallel-size", str(self.tensor), "--context-parallel-size", str(self.context),
            "--pipeline-model-parallel-size", str(self.pipeline),
        ]  # fmt: skip
        return flags + ["--sequence-parallel"] * self.sequence_parallel


@dataclass(frozen=True)
class ProbeResult:
    """Mean losses of one sequence under one view.

    Attributes:
        clm_loss: nats per token of the standard view, mean over all L.
        kl_loss: reverse KL of the views in nats, mean over the L - s tokens from the split on.
    """

    clm_loss: float
    kl_loss: float
    split: int
    shift: int
    length: int


def check_layout(length: int, split: int, layout: ParallelLayout, execution: str) -> None:
    """Refuse lengths that do not divide, in one line.

    Raises:
        ValueError: the sequence or, with a shared prefix, its suffix does not divide by 2 x CP (x TP).
    """
    tensor = layout.tensor if layout.sequence_parallel else 1
    unit = tensor * (2 * layout.context if layout.context > 1 else 1)
    factors = " x ".join(["2 x CP"] * (layout.context > 1) + ["TP"] * layout.sequence_parallel)
    if length % unit:
        raise ValueError(f"--tokens holds {length} + 1 ids: the length {length} does not divide by {factors} = {unit}")
    if execution == "shared-prefix" and (length - split) % unit:
        raise ValueError(
            f"--split {split} with --execution shared-prefix: the suffix of {length} - {split} = {length - split} "
            f"tokens does not divide by {factors} = {unit}; choose another split, or --execution full"
        )


class Probe:
    """A model loaded once, to be probed many times. On every rank of the layout; ends with `close`."""

    def __init__(self, hf: str | Path, length: int, layout: ParallelLayout, device: str = "cpu") -> None:
        from megatron.core import parallel_state

        from megatron_rpsd.checkpoint.convert import hf_session_arguments
        from megatron_rpsd.checkpoint.hf_folder import HFFolder
        from megatron_rpsd.checkpoint.model_loading import load_hf_weights
        from megatron_rpsd.training.run import forward_step_from_args
        from megatron_rpsd.training.session import build_stages, start_session

        folder = HFFolder(hf)
        dtype = torch.float32 if device == "cpu" else None
        arguments = [*hf_session_arguments(folder, dtype), "--device", device, "--seq-length", str(length)]
        self.args, config = start_session([*arguments, *layout.arguments(), "--objective", "rpsd"])
        self.stages = build_stages(config, self.args)
        load_hf_weights(
            self.stages, folder, layout.tensor, parallel_state.get_tensor_model_parallel_rank(),
            self.args.padded_vocab_size,
        )  # fmt: skip
        for stage in self.stages:
            stage.eval()
        self.forward_step = forward_step_from_args(self.args, config)
        self.length = length

    def __call__(self, tokens: np.ndarray, view: View, execution: str = "full") -> ProbeResult:
        """Losses of one sequence; collective over all ranks, the same result on each.

        Args:
            tokens: L + 1 token ids; the model reads the first L, labels are the last L.
            view: the perturbed view.
            execution: full (a whole second view) or shared-prefix (the suffix alone).
        """
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_rpsd.training.session import all_ranks

        ids = torch.as_tensor(np.asarray(tokens), dtype=torch.int64)
        sample = {"tokens": ids[None, :-1], "labels": ids[None, 1:], "loss_mask": torch.ones(1, self.length)}

        def forward(data_iterator, model):
            layout = self.forward_step.layout(view.split if execution == "shared-prefix" else 0)
            return self.forward_step.run(model, sample, [view], layout)

        with torch.no_grad():
            logged = get_forward_backward_func()(
                forward_step_func=forward, data_iterator=[None] * len(self.stages), model=self.stages,
                num_microbatches=1, seq_length=self.length, micro_batch_size=1, forward_only=True,
            )  # fmt: skip
        sums = torch.zeros(2, 2, dtype=torch.float64)
        if logged and parallel_state.get_tensor_model_parallel_rank() == 0:
            sums = torch.stack([logged[0]["lm loss"], logged[0]["view kl"]]).double().cpu()
        total = torch.stack(all_ranks(sums)).sum(dim=0)
        clm, kl = (total[:, 0] / total[:, 1]).tolist()
        return ProbeResult(clm, kl, view.split, view.shift, self.length)

    def close(self) -> None:
        """End the session."""
        from megatron_rpsd.training.session import end_session

        end_session()


def probe_on_this_rank(
    hf: str, windows: np.ndarray, views: Sequence[View], layout: ParallelLayout, execution: str, device: str = "cpu"
) -> list[list[ProbeResult]]:
    """Entry point of a rank: probe every window [N, L+1] under every view; results [N][views]."""
    from megatron_rpsd.training.main import choose_device

    torch.set_num_threads(max(1, torch.get_num_threads()))
    choose_device(["--device", device])
    probe = Probe(hf, windows.shape[1] - 1, layout, device)
    try:
        return [[probe(window, view, execution) for view in views] for window in windows]
    finally:
        probe.close()
