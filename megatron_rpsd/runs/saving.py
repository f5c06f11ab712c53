"""Checkpoints that say whether they are whole, that are not begun on a full disk, and of which the old ones go.

Megatron writes a checkpoint and moves its tracker; no mark tells a whole folder from an interrupted one, and nothing
later tells a flipped bit. Here every rank hashes the files it wrote, rank 0 writes the sums last, and old checkpoints
go after that. Ends when upstream's own integrity manifest falls back to an older checkpoint instead of failing a load.
"""

from __future__ import annotations

import argparse
import errno
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.training import checkpointing, training
from megatron.training.utils.common_utils import print_rank_0

from megatron_rpsd.runs.checkpoints import iteration_folder, remove_superseded
from megatron_rpsd.runs.checksums import CHECKSUMS, file_sums, write_checksums

_OPTIMIZER_BYTES = {torch.float32: 8, torch.bfloat16: 12, torch.float16: 12}
"""Adam's two moments in fp32 and, beside 16-bit parameters, their fp32 copy, a parameter."""
_MARGIN = 1.05


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints stay: the `newest` ones, and those whose iteration is a multiple of `every`."""

    newest: int | None = None
    every: int | None = None


def checkpoint_bytes(model: Sequence[torch.nn.Module], with_optimizer: bool) -> int:
    """What a checkpoint will take on the disk, about; every rank calls it and gets the sum over the model's shards."""
    parameters = [parameter for stage in model for parameter in stage.parameters()]
    own = sum(parameter.nbytes for parameter in parameters)
    if with_optimizer:
        own += sum(parameter.numel() * _OPTIMIZER_BYTES[parameter.dtype] for parameter in parameters)
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    total = torch.tensor([own if replica == 0 else 0], dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(total)
    return int(total * _MARGIN)


def no_room(folder: Path, size: int) -> str | None:
    """Why `size` bytes cannot be written below `folder`, or None. They are reserved and given back, so quotas count."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".room"
    try:
        descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
            probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{folder} has no room for {size / 2**30:.2f} GiB ({error.strerror})"
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that reserves nothing says nothing
            raise
    return None


def agreed(value):
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def seal(folder: Path, keeping: Keeping) -> None:
    """Make a written checkpoint whole: every rank hashes what it wrote, rank 0 writes the sums and removes old ones."""
    mine = f"__{dist.get_rank()}_"
    with_prefix = {name for name in os.listdir(folder) if name.startswith("__")}
    own = {name for name in with_prefix if name.startswith(mine)}
    if dist.get_rank() == 0:
        own |= {name for name in os.listdir(folder) if name not in with_prefix and not name.startswith(f".{CHECKSUMS}")}
    parts: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, file_sums(folder, own))
    if dist.get_rank() == 0:
        write_checksums(folder, {name: entry for part in parts for name, entry in part.items()})
        if keeping.newest is not None:
            gone = remove_superseded(folder.parent, keeping.newest, keeping.every)
            if gone:
                print_rank_0(f"checkpoints removed: iterations {', '.join(map(str, gone))}")
    dist.barrier()


def check_async_save(args: argparse.Namespace) -> None:
    """Refuse --async-save where Megatron would save synchronously all the same, or fail at the first checkpoint.

    Raises:
        ValueError: in one line.
    """
    if not args.async_save:
        return
    if not args.use_persistent_ckpt_worker:
        raise ValueError("--async-save needs --use-persistent-ckpt-worker: without it Megatron saves synchronously")
    if args.async_strategy == "nvrx" and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        raise ValueError(
            "--async-save by --async-strategy nvrx (the default) needs the package nvidia-resiliency-ext, which is "
            "not installed: install it, or give --async-strategy mcore"
        )


def guard_saving(
    save: Path,
    keeping: Keeping,
    sealed: Callable[[int], None] = lambda iteration: None,
    tell: Callable[[str, str], None] = lambda kind, text: None,
) -> None:
    """Let Megatron's training loop save with room checked before and the sums written after. Once a process.

    Args:
        save: --save.
        sealed: called on every rank with the iteration of each checkpoint that became whole.
        tell: called on every rank with "no room" and a line for each checkpoint that is not written.
    """
    original_save, original_schedule = checkpointing.save_checkpoint, checkpointing.schedule_async_save
    pending: list[int] = []

    def finish(iteration: int) -> None:
        seal(iteration_folder(save, iteration), keeping)
        sealed(iteration)

    @functools.wraps(original_save)
    def save_checkpoint(iteration, model, optimizer, *args, **kwargs):
        if kwargs.get("non_persistent_ckpt"):
            return original_save(iteration, model, optimizer, *args, **kwargs)
        size = checkpoint_bytes(model, optimizer is not None)
        full = agreed(no_room(save, size) if dist.get_rank() == 0 else None)
        if full is not None:
            text = f"no checkpoint of iteration {iteration} is written: {full}; the run goes on"
            print_rank_0(f"warning: {text}")
            tell("no room", text)
            return None
        pending.append(iteration)
        original_save(iteration, model, optimizer, *args, **kwargs)
        if pending:  # written already: an asynchronous one is finished when Megatron says so
            finish(pending.pop())
        return None

    @functools.wraps(original_schedule)
    def schedule_async_save(request: AsyncRequest):
        if pending:
            request.add_finalize_fn(functools.partial(finish, pending.pop()))
        return original_schedule(request)

    checkpointing.save_checkpoint = training.save_checkpoint = save_checkpoint
    checkpointing.schedule_async_save = schedule_async_save
