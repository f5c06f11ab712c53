"""From parsed arguments to what Megatron's `pretrain` takes."""

from __future__ import annotations

import argparse

from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.utils.common_utils import print_rank_0

from megatron_rpsd.model import RPSDModelConfig, model_config_from_args
from megatron_rpsd.positions import StepShape, ViewSampler
from megatron_rpsd.runtime.wheel import repair_wheel
from megatron_rpsd.training.arguments import parse_and_check
from megatron_rpsd.training.dataset import datasets_provider
from megatron_rpsd.training.forward_step import ForwardStep
from megatron_rpsd.training.objective import Objective


def forward_step_from_args(args: argparse.Namespace, model_config: RPSDModelConfig) -> ForwardStep:
    """The forward step that the arguments describe."""
    objective = Objective(args.objective, args.rpsd_kl_weight, model_config.real_vocab_size)
    sampler = ViewSampler(
        seed=args.rpsd_seed,
        perturbation=args.rpsd_perturbation,
        length=args.seq_length,
        max_shift=args.rpsd_max_shift,
        granule=args.rpsd_split_granule,
        split_sampling=args.rpsd_split_sampling,
        step=StepShape(args.global_batch_size, args.micro_batch_size, args.data_parallel_size),
        apply_probability=args.rpsd_apply_probability,
        split_density=args.rpsd_split_density,
    )
    return ForwardStep(model_config, objective, sampler, args.seq_length, args.rpsd_execution)


def _announce(args: argparse.Namespace, forward_step: ForwardStep) -> None:
    """Say once what a step will cost."""
    if args.objective != "rpsd":
        return
    linear, attention = forward_step.sampler.expected_suffix()
    if args.rpsd_execution == "full":
        linear = attention = args.rpsd_apply_probability
    print_rank_0(
        f"rpsd: --rpsd-execution {args.rpsd_execution}, splits {args.rpsd_split_sampling} in granules of "
        f"{args.rpsd_split_granule} tokens; expected cost of a step over one view: {1 + linear:.3f} in the linear "
        f"layers, {1 + attention:.3f} in attention"
    )


def prepare():
    """Configuration container, datasets provider and forward step of this process's command line.

    Raises:
        ValueError: one line that names what the user can change.
    """
    repair_wheel()
    args = parse_and_check()
    model_config = model_config_from_args(args)
    forward_step = forward_step_from_args(args, model_config)
    _announce(args, forward_step)
    return pretrain_cfg_container_from_args(args, model_config), datasets_provider, forward_step
