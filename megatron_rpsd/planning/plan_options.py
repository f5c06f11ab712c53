"""Options that the planning tools share."""

from __future__ import annotations

import argparse

from megatron_rpsd.planning.gpus import GPU, GPUS, Assumptions
from megatron_rpsd.planning.known_models import KNOWN_MODELS
from megatron_rpsd.planning.layout_search import default_global_batch_size
from megatron_rpsd.planning.layouts import RECOMPUTATIONS, Workload

_SHARES = ("linear_efficiency", "attention_efficiency", "memory_efficiency", "link_efficiency", "overlap")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """The model, the step, and what is assumed of the machine."""
    known = ", ".join(sorted(KNOWN_MODELS))
    parser.add_argument("--model", required=True, help=f"{known}, or a Hugging Face folder; its config.json suffices.")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True)
    parser.add_argument("--global-batch-size", type=int, help="Sequences a step. Default: 4M tokens (ProLong).")
    parser.add_argument("--objective", choices=("rpsd", "standard"), default="rpsd")
    parser.add_argument("--execution", choices=("shared-prefix", "full"), default="shared-prefix")
    parser.add_argument("--longce", action="store_true", help="LongCE's windows; needs one pipeline stage.")
    parser.add_argument("--optimizer-states", choices=("fp32", "bf16"), default="fp32", help="Of Adam's moments.")
    parser.add_argument("--recompute", choices=RECOMPUTATIONS, nargs="+", default=RECOMPUTATIONS, help="Default: all.")
    group = parser.add_argument_group("assumptions", "Shares of the peak; see the first lines of the output.")
    for name in _SHARES:
        default = getattr(Assumptions(), name)
        said = "that of the GPU" if default is None else f"{default:g}"
        group.add_argument(f"--{name.replace('_', '-')}", type=float, default=default, help=f"Default: {said}.")


def workload_from(args: argparse.Namespace, length: int) -> Workload:
    """What a step of `length` tokens has to do.

    Raises:
        ValueError: a length below 1, or LongCE where the window is too short for it.
    """
    if length < 1:
        raise ValueError(f"--seq-length {length} must be at least 1")
    if args.longce and length <= 4096:
        raise ValueError(f"--longce reads windows of 4096 tokens of context, so --seq-length {length} must be longer")
    batch = default_global_batch_size(length) if args.global_batch_size is None else args.global_batch_size
    return Workload(length, batch, args.objective, args.execution, args.longce, args.optimizer_states)


def machine_from(args: argparse.Namespace) -> tuple[GPU, Assumptions]:
    """The GPU and what is assumed of it; ValueError for a share out of range."""
    return GPUS[args.gpu], Assumptions(**{name: getattr(args, name) for name in _SHARES})
