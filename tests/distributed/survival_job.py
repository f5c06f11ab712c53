"""Runs that are disturbed or watched from within: a full disk, an infinite gradient, a rank that hangs, wandb."""

from __future__ import annotations

import contextlib
import errno
import importlib.machinery
import io
import os
import sys
import time
import types
from pathlib import Path

import torch

from tests.distributed import training_job


def train_on_a_full_disk(arguments: list[str], full_at: int) -> str:
    """As `training_job.train`; the device is full when the checkpoint number `full_at` (from 0) asks for room."""
    real, asked = os.posix_fallocate, []

    def posix_fallocate(descriptor, offset, size):
        asked.append(size)
        if len(asked) - 1 == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, size)

    os.posix_fallocate = posix_fallocate
    return training_job.train(arguments)


def train_with_bad_samples(arguments: list[str], bad: list[int]) -> tuple[str, str, int | None]:
    """As `run`; the loss of samples `bad` is infinite."""
    from megatron_rpsd.runs.steps import SampleIndices
    from megatron_rpsd.training import run as entry

    original = entry.guarded

    def spoiled(forward_step):
        def call(data_iterator, model):
            samples = SampleIndices(data_iterator)
            output, loss_function = forward_step(samples, model)

            def loss_of(sums):
                loss, tokens, logged = loss_function(sums)
                return (loss * float("inf") if set(samples.seen) & set(bad) else loss), tokens, logged

            return output, loss_of

        return call

    entry.guarded = lambda args, forward_step: original(args, spoiled(forward_step))
    return run(arguments)


def run(arguments: list[str]) -> tuple[str, str, int | None]:
    """Standard output, standard error and exit code of the entry point."""
    output, errors, code = io.StringIO(), io.StringIO(), None
    from megatron_rpsd.training import main as entry
    from megatron_rpsd.training.session import end_session

    try:
        with training_job._argv(arguments), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            entry.main()
    except SystemExit as left:
        code = left.code
    finally:
        end_session()
    return output.getvalue(), errors.getvalue(), code


def hang(arguments: list[str], errors: Path) -> None:
    """A run whose rank 1 sleeps in its third step; standard error goes to ERRORS/RANK.err."""
    sys.__stderr__ = (errors / f"{torch.distributed.get_rank()}.err").open("w")
    from megatron_rpsd.runs.steps import SampleWatch

    original, steps = SampleWatch.__call__, []

    def call(self, data_iterator, model):
        steps.append(1)
        if torch.distributed.get_rank() == 1 and len(steps) > 4:
            time.sleep(600)
        return original(self, data_iterator, model)

    SampleWatch.__call__ = call
    training_job.train(arguments)


def train_with_wandb(arguments: list[str]) -> tuple[str, dict, dict[str, list[float]]]:
    """As `training_job.train`, with a wandb that remembers: standard output, what it began with, name -> values."""
    begun, logged = {}, {}
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.Error, wandb.run, wandb.finish = type("Error", (Exception,), {}), None, lambda: None
    wandb.config = types.SimpleNamespace(update=lambda values: None)

    def init(**given) -> None:
        begun.update(given, config=None, id=os.environ["WANDB_RUN_ID"], resume=os.environ["WANDB_RESUME"])

    def log(values: dict, step: int) -> None:
        for name, value in values.items():
            logged.setdefault(name, []).append((step, float(value)))

    wandb.init, wandb.log = init, log
    sys.modules["wandb"] = wandb
    from megatron.training import checkpointing

    checkpointing.wandb_utils.on_save_checkpoint_success = lambda *given: None  # artifacts need a server
    checkpointing.wandb_utils.on_load_checkpoint_success = lambda *given: None
    return training_job.train(arguments), begun, logged


def train_asynchronously(arguments: list[str]) -> dict[str, list[tuple[str, bool, bool]]]:
    """By checkpoint, in order: (what happened, whether Megatron had finished it, whether it had sums)."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.training import checkpointing

    from megatron_rpsd.runs import saving
    from megatron_rpsd.training import run_folder

    happened, guard, seal = {}, saving.guard_saving, saving.seal

    def note(what: str, folder: Path) -> None:
        state = (what, (folder / ".metadata").is_file(), (folder / "checksums.json").is_file())
        happened.setdefault(folder.name, []).append(state)

    def sealed(folder: Path, keeping) -> None:
        note("written", folder)
        seal(folder, keeping)
        note("sealed", folder)

    def guarded(save: Path, *given, **named) -> None:
        guard(save, *given, **named)
        schedule = checkpointing.schedule_async_save

        def scheduled(request):
            schedule(request)
            note("scheduled", max(save.glob("iter_*")))

        checkpointing.schedule_async_save = scheduled

    saving.seal, run_folder.guard_saving = sealed, guarded
    start_writer = PersistentAsyncCaller._get_process.__func__

    def forked(cls, rank, mp_mode="fork", *given, **named):  # Megatron's own start imports torch in every writer
        return start_writer(cls, rank, "fork", *given, **named)

    PersistentAsyncCaller._get_process = classmethod(forked)
    training_job.train(arguments)
    return happened
