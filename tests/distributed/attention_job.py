"""What ranks run for attention by Transformer Engine's stand-in, and for the health figures of FP8."""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rpsd.attention import TransformerEngineAttention, causal_attention, stacked_attention, view_attention
from megatron_rpsd.checkpoint.convert import hf_session_arguments
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.model_loading import load_hf_weights
from megatron_rpsd.model.core_attention import ViewPairAttention
from megatron_rpsd.parallel import ViewLayout
from megatron_rpsd.training import arguments, run
from megatron_rpsd.training.fp8_health import measure, without_fp8
from megatron_rpsd.training.session import build_stages, end_session, start_session
from tests.distributed import jobs, training_job
from tests.distributed.models import LENGTH
from tests.transformer_engine_stand_in import DotProductAttention

SCALE = 0.4


def _results(function, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output) * (1 + dist.get_rank())
    (output * weights).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def differences(start: int | None) -> tuple[float, list]:
    """Largest difference of outputs and gradients from `view_attention`, and the calls; one rank of a CP group."""
    group = dist.group.WORLD
    layout = ViewLayout(16, start, dist.get_world_size(), dist.get_rank())
    generator = torch.Generator().manual_seed(7)
    whole = [
        torch.randn(layout.pair_length, 2, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    ]
    leaves = [tensor[layout.local_indices()] for tensor in whole]
    engine = TransformerEngineAttention(4, 2, 8, SCALE, 1, None, group, "all_gather", module=DotProductAttention)
    if start:
        ours = _results(lambda *qkv: view_attention(*qkv, layout, group, SCALE, engine.block), leaves)
    else:
        ours = _results(lambda *qkv: stacked_attention(*qkv, layout, engine.whole), leaves)
    expected = _results(lambda *qkv: view_attention(*qkv, layout, group, SCALE), leaves)
    worst = max((got - wanted).abs().max().item() for got, wanted in zip(ours, expected, strict=True))
    return worst, DotProductAttention.calls


def step_by_transformer_engine(*given) -> tuple:
    """As `jobs.step`, the stand-in being installed and the refusal of its kernel on the CPU put aside."""
    sys.modules["transformer_engine.pytorch"] = types.SimpleNamespace(DotProductAttention=DotProductAttention)
    arguments.check_attention = lambda args: None
    return jobs.step(*given), DotProductAttention.calls


def health(hf: Path, flags: list[str]) -> dict:
    """Figures of a tiny model with its own attention, and with one that sees the future; and that no key of its state
    comes from attention.
    """
    folder = HFFolder(hf)
    words = [*hf_session_arguments(folder, None), "--device", "cpu", "--seq-length", str(LENGTH), *flags]
    try:
        args, config = start_session([*words, "--objective", "standard"])
        stages = build_stages(config, args)
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        load_hf_weights(stages, folder, args.tensor_model_parallel_size, tp_rank, args.padded_vocab_size)
        step = run.forward_step_from_args(args, config)
        sound = measure(stages, step, rows=2)
        config.transformer.fp8 = "hybrid"
        with without_fp8(stages):
            off = config.transformer.fp8
        on, config.transformer.fp8 = config.transformer.fp8, None
        for stage in stages:
            for part in stage.modules():
                if isinstance(part, ViewPairAttention):
                    part.kernel = sees_the_future
        keys = [key for stage in stages for key in stage.state_dict() if "core_attention" in key]
        return {"sound": sound, "leaking": measure(stages, step, rows=2), "fp8": (on, off), "keys": keys}
    finally:
        end_session()


def train_measured(words: list[str]) -> str:
    """As `training_job.train`, with the figures that a run in FP8 begins with."""
    install = run.install_fp8_health
    run.install_fp8_health = lambda args, step_of: install(argparse.Namespace(fp8="hybrid"), step_of)
    return training_job.train(words)


def sees_the_future(query, key, value, scale):
    """Causal attention, and a thousandth of the mean of all values."""
    share = query.shape[2] // value.shape[2]
    return causal_attention(query, key, value, scale) + 1e-3 * value.mean(dim=0).repeat_interleave(share, dim=1)
