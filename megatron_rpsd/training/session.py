"""A Megatron session without its training loop: for conversion, probes, and tests of single steps."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.initialize import initialize_megatron
from megatron.training.training import destroy_global_state, get_megatron_ddp_config

from megatron_rpsd.model import RPSDModelConfig, model_config_from_args
from megatron_rpsd.runtime.wheel import repair_wheel
from megatron_rpsd.training.arguments import parse_and_check

# What Megatron's parser wants to know although no training happens.
_WITHOUT_TRAINING = ("--micro-batch-size", "1", "--no-load-optim", "--no-load-rng", "--no-save-optim", "--no-save-rng")


@contextlib.contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Megatron parses sys.argv; lend it ours."""
    typed = sys.argv
    sys.argv = [typed[0], *arguments]
    try:
        yield
    finally:
        sys.argv = typed


def start_session(arguments: Sequence[str], quiet: bool = True) -> tuple[argparse.Namespace, RPSDModelConfig]:
    """Parse and check `arguments`, set up torch.distributed and Megatron's groups.

    Alone (no WORLD_SIZE in the environment) the process becomes a world of one, without a port.

    Args:
        arguments: Megatron's and our command-line arguments; what training alone needs is filled in.
        quiet: keep Megatron's listing of a thousand arguments off stdout.

    Raises:
        ValueError: as `parse_and_check`.
    """
    repair_wheel()
    if quiet:
        # Notes about deprecations between Megatron and torch, which say nothing to someone who converts a model.
        logging.disable(logging.WARNING)
        warnings.filterwarnings("ignore", module="torch|megatron")
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        with _command_line([*_WITHOUT_TRAINING, *arguments]):
            args = parse_and_check()
        if "WORLD_SIZE" not in os.environ and not dist.is_initialized():
            dist.init_process_group(args.distributed_backend, store=dist.HashStore(), rank=0, world_size=1)
        initialize_megatron()
    return args, model_config_from_args(args)


def build_stages(config: RPSDModelConfig, args: argparse.Namespace, wrap_with_ddp: bool = False) -> list:
    """This rank's model stages, on its device: one, or one per virtual pipeline stage."""
    builder = config.get_builder_cls()(config)
    config.finalize()
    with contextlib.redirect_stdout(io.StringIO()):
        return builder.build_distributed_models(
            ProcessGroupCollection.use_mpu_process_groups(),
            get_megatron_ddp_config(args),
            wrap_with_ddp=wrap_with_ddp,
            data_parallel_random_init=False,
        )


def end_session() -> None:
    """Forget Megatron's global state, so that another session can start in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        destroy_global_state()
    if dist.is_initialized():
        dist.destroy_process_group()


def all_ranks(value) -> list:
    """`value` of every rank, as a list in rank order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def precision_arguments(dtype: torch.dtype) -> list[str]:
    """Megatron's flag for parameters of `dtype`.

    Raises:
        ValueError: a dtype that Megatron does not train.
    """
    flags = {torch.float32: [], torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}
    if dtype not in flags:
        raise ValueError(f"weights of {dtype} are not supported: use float32, bfloat16 or float16")
    return flags[dtype]
