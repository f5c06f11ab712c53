"""What the models of a run hold on a rank, part by part, said once when all of them are there."""

from __future__ import annotations

import argparse

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils.common_utils import print_rank_0

_GIB = 2**30


def memory_parts(args: argparse.Namespace, student, teacher: torch.nn.Module | None) -> dict[str, int]:
    """Bytes on this rank.

    Weights and gradients are counted where they lie. The optimizer's are computed, since a forward step does not see
    it: fp32 moments (two of Adam, one of SGD), and the fp32 weights beside 16-bit ones, of what is trained, shared out
    over the data-parallel group by the distributed optimizer.

    Args:
        student: the model as Megatron wraps it, one pipeline stage.
        teacher: None where its likeliest tokens were kept.
    """
    parameters = list(unwrap_model(student).parameters())
    buffers = student.buffers if isinstance(student, DistributedDataParallel) else []
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    size = sum(_optimizer_bytes(args, parameter) for parameter in trained)
    shares = args.data_parallel_size * args.context_parallel_size if args.use_distributed_optimizer else 1
    return {
        "student weights": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": size // shares,
        "teacher weights": sum(parameter.nbytes for parameter in teacher.parameters()) if teacher is not None else 0,
    }


def _optimizer_bytes(args: argparse.Namespace, parameter: torch.nn.Parameter) -> int:
    main = 4 if parameter.dtype != torch.float32 else 0
    moments = 4 if args.optimizer == "sgd" else 8
    return parameter.numel() * (main + moments)


def report_memory(args: argparse.Namespace, student, teacher: torch.nn.Module | None) -> None:
    """Print `memory_parts` of rank 0, and log it as `memory/..._gib` at step 0."""
    parts = memory_parts(args, student, teacher)
    said = ", ".join(f"{name} {size / _GIB:.4g}" for name, size in parts.items())
    print_rank_0(f"memory of a rank in GiB: {said}; together {sum(parts.values()) / _GIB:.4g}, activations not counted")
    metrics = {f"memory/{name.replace(' ', '_')}_gib": size / _GIB for name, size in parts.items()}
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    if tensorboard:
        for name, value in metrics.items():
            tensorboard.add_scalar(name, value, 0)
    if wandb:
        wandb.log(metrics, 0)
