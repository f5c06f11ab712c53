"""From parsed arguments to what Megatron's `pretrain` takes."""

from __future__ import annotations

import argparse

from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.utils.common_utils import print_rank_0

from megatron_rpsd.loss import Divergence
from megatron_rpsd.model import RPSDModelConfig, model_config_from_args
from megatron_rpsd.positions import SPLIT_VIEWS
from megatron_rpsd.runtime.wheel import repair_wheel
from megatron_rpsd.training.arguments import parse_and_check
from megatron_rpsd.training.arms import sampler_from_args, views_of
from megatron_rpsd.training.batch import TWO_VIEWS
from megatron_rpsd.training.dataset import datasets_provider
from megatron_rpsd.training.distillation import distillation_from_args
from megatron_rpsd.training.forward_step import ForwardStep
from megatron_rpsd.training.fp8_health import install_fp8_health
from megatron_rpsd.training.frozen_dims import install_frozen_dims
from megatron_rpsd.training.lengths import describe_lengths, mixed_lengths_from_args
from megatron_rpsd.training.longce import LongCE
from megatron_rpsd.training.objective import LossOptions, Objective
from megatron_rpsd.training.packing import packing_from_args
from megatron_rpsd.training.phases import phased_datasets_provider, phased_forward_step
from megatron_rpsd.training.resuming import step_shape
from megatron_rpsd.training.ruler_scores import RulerScores, ruler_scores_from_args
from megatron_rpsd.training.run_folder import guarded
from megatron_rpsd.training.teacher_cache import source_from_args


def forward_step_from_args(args: argparse.Namespace, model_config: RPSDModelConfig) -> ForwardStep:
    """The forward step that the arguments describe."""
    options = LossOptions(
        args.loss_implementation,
        args.loss_chunk_bytes,
        Divergence(args.rpsd_kl_direction, args.rpsd_kl_temperature, args.rpsd_kl_top_k),
    )
    longce = LongCE(args.longce_context, args.longce_stride, args.longce_max_weight) if args.longce else None
    teacher = source_from_args(args)  # first: a cache says which K it holds
    distillation, vocab_size = distillation_from_args(args), model_config.real_vocab_size
    objective = Objective(views_of(args), args.rpsd_kl_weight, vocab_size, options, longce, distillation)
    step = step_shape(args)
    sampler = sampler_from_args(args, step)
    mix, packing = mixed_lengths_from_args(args, step), packing_from_args(args)
    return ForwardStep(model_config, objective, sampler, args.seq_length, args.rpsd_execution, mix, packing, teacher)


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
    if views_of(args) not in TWO_VIEWS:
        return
    linear, attention = forward_step.sampler.expected_suffix()
    if args.rpsd_execution == "full":
        linear = attention = args.rpsd_apply_probability
    splits = f"splits {args.rpsd_split_sampling} in granules of {args.rpsd_split_granule} tokens"
    if args.perturb_documents:
        splits = f"{args.rpsd_perturbation} views with a split and a shift in every document"
    elif args.rpsd_perturbation not in SPLIT_VIEWS:
        splits = f"{args.rpsd_perturbation} views of the whole sequence"
    elif args.reset_attention_mask:  # RoPE does not see a shift that a whole document shares
        splits += ", each perturbing the document that it falls into alone (see --perturb-documents)"
    print_rank_0(
        f"{args.objective}: --rpsd-execution {args.rpsd_execution}, {splits}; expected cost of a step over one view: "
        f"{1 + linear:.3f} in the linear layers, {1 + attention:.3f} in attention"
    )


def prepare():
    """Configuration container, datasets provider, forward step and `--eval-ruler`'s scores of this process's command
    line, the last None without that flag.

    Raises:
        ValueError: one line that names what the user can change.
    """
    repair_wheel()
    args = parse_and_check()
    install_frozen_dims(args)
    model_config = model_config_from_args(args)
    forward_step = forward_step_from_args(args, model_config)
    _announce(args, forward_step)
    provider = datasets_provider
    if args.rope_phases is not None:
        forward_step, provider = phased_forward_step(args, model_config, forward_step), phased_datasets_provider
    scores = ruler_scores_from_args(args, forward_step)
    install_fp8_health(args, RulerScores((), forward_step).current_step)
    return pretrain_cfg_container_from_args(args, model_config), provider, guarded(args, forward_step), scores
