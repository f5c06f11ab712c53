"""Adapt a model: `torchrun -m megatron_rpsd.training.main <Megatron's arguments> --objective rpsd --device cpu`."""

from __future__ import annotations

import argparse

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


def main() -> None:
    """Entry point of every rank."""
    with one_line_errors():
        choose_device()
        from megatron_rpsd.training.run import prepare

        cfg, datasets_provider, forward_step = prepare()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    pretrain(cfg, datasets_provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
