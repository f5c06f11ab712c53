"""From parsed arguments to what Megatron's `pretrain` takes."""

from __future__ import annotations

import argparse

from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.utils.common_utils import print_rank_0

from megatron_rpsd.loss import Divergence
from megatron_rpsd.model import RPSDModelConfig, model_config_from_args
from megatron_rpsd.positions import SPLIT_VIEWS, StepShape
from megatron_rpsd.runtime.wheel import repair_wheel
from megatron_rpsd.training.arguments import parse_and_check
from megatron_rpsd.training.arms import sampler_from_args
from megatron_rpsd.training.batch import TWO_VIEWS
from megatron_rpsd.training.dataset import datasets_provider
from megatron_rpsd.training.forward_step import ForwardStep
from megatron_rpsd.training.lengths import describe_lengths, mixed_lengths_from_args
from megatron_rpsd.training.longce import LongCE
from megatron_rpsd.training.objective import LossOptions, Objective


def forward_step_from_args(args: argparse.Namespace, model_config: RPSDModelConfig) -> ForwardStep:
    """The forward step that the arguments describe."""
    options = LossOptions(
        args.loss_implementation,
        args.loss_chunk_bytes,
        Divergence(args.rpsd_kl_direction, args.rpsd_kl_temperature, args.rpsd_kl_top_k),
    )
    longce = LongCE(args.longce_context, args.longce_stride, args.longce_max_weight) if args.longce else None
    objective = Objective(args.objective, args.rpsd_kl_weight, model_config.real_vocab_size, options, longce)
    step = StepShape(args.global_batch_size, args.micro_batch_size, args.data_parallel_size)
    sampler = sampler_from_args(args, step)
    mix = mixed_lengths_from_args(args, step)
    return ForwardStep(model_config, objective, sampler, args.seq_length, args.rpsd_execution, mix)


def _announce(args: argparse.Namespace, forward_step: ForwardStep) -> None:
    """Say once what a step will cost."""
    if forward_step.mix is not None:
        print_rank_0(describe_lengths(forward_step.mix.schedule))
    if args.longce:
        windows = forward_step.objective.longce.window_starts(args.seq_length)
        read = len(windows) * (args.longce_context + args.longce_stride)
        print_rank_0(
            f"longce: {len(windows)} windows of {args.longce_context} + {args.longce_stride} tokens; forward passes "
            f"over {read / args.seq_length:.2f} times the sequence's tokens in every step"
        )
    if args.objective not in TWO_VIEWS:
        return
    linear, attention = forward_step.sampler.expected_suffix()
    if args.rpsd_execution == "full":
        linear = attention = args.rpsd_apply_probability
    splits = f"splits {args.rpsd_split_sampling} in granules of {args.rpsd_split_granule} tokens"
    if args.rpsd_perturbation not in SPLIT_VIEWS:
        splits = f"{args.rpsd_perturbation} views of the whole sequence"
    print_rank_0(
        f"{args.objective}: --rpsd-execution {args.rpsd_execution}, {splits}; expected cost of a step over one view: "
        f"{1 + linear:.3f} in the linear layers, {1 + attention:.3f} in attention"
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
