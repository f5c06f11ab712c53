"""Adapt a model: `torchrun -m megatron_rpsd.training.main <Megatron's arguments> --objective rpsd --device cpu`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron_rpsd.runs.folder import RunFolder
from megatron_rpsd.training.errors import one_line_errors


def choose_device(argv: list[str] | None = None) -> str:
    """Install the CPU runtime if `--device cpu` is among the arguments: before Megatron is imported.

    Raises:
        ValueError: the CPU runtime on a machine with a GPU, or no GPU where one is asked for.
    """
    import torch

    from megatron_rpsd.runtime.cpu import install_cpu_runtime

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--force-cpu-runtime", action="store_true")
    known, _ = parser.parse_known_args(argv)
    if known.device == "cpu":
        install_cpu_runtime(force=known.force_cpu_runtime)
    elif not torch.cuda.is_available():
        raise ValueError(
            f"--device {known.device}: no GPU is visible to this process; add --device cpu to run on the CPU"
        )
    return known.device


@contextlib.contextmanager
def _reason_kept() -> Iterator[None]:
    """Leave in the run's folder, in one line, why another attempt would end alike."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, default=None)
    folder = parser.parse_known_args()[0].run_dir
    try:
        yield
    except ValueError as error:
        if folder is not None and folder.is_dir() and os.environ.get("RANK", "0") == "0":
            RunFolder(folder).error.write_text(" ".join(str(error).split()) + "\n", encoding="utf-8")
        raise


def check_command_line() -> None:
    """Parse and check `sys.argv` as a rank of the job would, without a process group.

    Raises:
        ValueError: in one line.
    """
    choose_device()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process looks, as meant
        from megatron_rpsd.runtime.wheel import repair_wheel
        from megatron_rpsd.training.arguments import parse_and_check

        repair_wheel()
        parse_and_check(starting=False)


def main() -> None:
    """Entry point of every rank."""
    with one_line_errors(), _reason_kept():
        choose_device()
        from megatron_rpsd.training.run import prepare

        cfg, datasets_provider, forward_step, scores = prepare()
    from megatron.core.enums import ModelType
    from megatron.training import get_args, pretrain

    from megatron_rpsd.runs.steps import NonFinite
    from megatron_rpsd.training.run_folder import mark_finished

    try:
        pretrain(cfg, datasets_provider, ModelType.encoder_or_decoder, forward_step, non_loss_data_func=scores)
    except NonFinite as error:
        with one_line_errors(), _reason_kept():
            raise ValueError(str(error)) from error
    mark_finished(get_args())


if __name__ == "__main__":
    main()
