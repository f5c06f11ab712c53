"""Our command-line arguments beside Megatron's, and every check that a user can fail."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import get_tokenizer, set_global_variables
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_rpsd.data.chat import check_conversations
from megatron_rpsd.data.manifest import check_prefix
from megatron_rpsd.loss import DEFAULT_CHUNK_BYTES, DIRECTIONS
from megatron_rpsd.positions import RopeConfig, check_positions
from megatron_rpsd.runtime.cpu import cpu_runtime_installed, set_cpu_arguments
from megatron_rpsd.training.arms import add_arm_arguments, check_arm, default_granule, settle_arm, suffix_unit
from megatron_rpsd.training.attention_arguments import add_attention_arguments, check_attention, settle_attention
from megatron_rpsd.training.chat_dataset import check_chat_tokenizer
from megatron_rpsd.training.distillation import add_distillation_arguments, check_distillation
from megatron_rpsd.training.errors import quiet_parser
from megatron_rpsd.training.frozen_dims import add_freezing_arguments, check_frozen_dims
from megatron_rpsd.training.implied import head_dim_of
from megatron_rpsd.training.lengths import add_length_arguments, check_length_mix
from megatron_rpsd.training.megatron_checks import (
    check_batch,
    check_folders,
    check_numbers,
    check_sources,
    check_stages,
    refusal,
    settle_fusions,
)
from megatron_rpsd.training.objective import LOSS_IMPLEMENTATIONS
from megatron_rpsd.training.packing import add_packing_arguments, check_document_ends, settle_packing
from megatron_rpsd.training.phases import (
    add_phase_arguments,
    check_phases,
    follow_checkpoint_phases,
    phase_prefixes,
    settle_phases,
)
from megatron_rpsd.training.ruler_scores import add_ruler_arguments
from megatron_rpsd.training.run_folder import add_run_arguments, settle_run_folder
from megatron_rpsd.training.saved_checkpoint import check_start, read_alone
from megatron_rpsd.training.splits import check_splits, data_blends


def add_rpsd_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the method's flags to Megatron's parser (its `extra_args_provider`)."""
    group = parser.add_argument_group(title="rpsd")
    add_arm_arguments(group)
    add_attention_arguments(group)
    add_length_arguments(group)
    add_distillation_arguments(group)
    add_packing_arguments(group)
    add_phase_arguments(group)
    add_freezing_arguments(group)
    add_ruler_arguments(group)
    add_run_arguments(group)
    group.add_argument(
        "--rpsd-kl-direction", choices=DIRECTIONS, default=None,
        help="Divergence of the perturbed view p from the standard view q: KL(p || q) (the paper, default), "
        "KL(q || p), or JSD.",
    )  # fmt: skip
    group.add_argument(
        "--rpsd-kl-temperature", type=float, default=None,
        help="T: both views' logits / T, the divergence x T^2. Default: 1.",
    )  # fmt: skip
    group.add_argument(
        "--rpsd-kl-top-k", type=int, default=None,
        help="Compare the standard view's K likeliest tokens and all others as one. Default: the whole vocabulary.",
    )  # fmt: skip
    group.add_argument(
        "--loss-implementation", choices=LOSS_IMPLEMENTATIONS, default="fused",
        help="fused: output layer and loss together, a chunk of tokens at a time; unfused: from whole logits.",
    )  # fmt: skip
    group.add_argument(
        "--loss-chunk-bytes", type=int, default=None,
        help="Memory of a rank for a chunk's logits (fused). Default: 64 MiB on CPU, 1 GiB on GPU.",
    )  # fmt: skip
    group.add_argument(
        "--rope-parameters", type=str, default=None,
        help='RoPE scaling as JSON in Hugging Face\'s schema, e.g. \'{"rope_type": "linear", "factor": 4.0}\'; '
        'replaces the checkpoint\'s, which is kept by default. \'{"rope_type": "default"}\' drops it.',
    )  # fmt: skip
    group.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the CPU runtime over gloo.")
    group.add_argument(
        "--force-cpu-runtime", action="store_true", help="Allow --device cpu on a machine that has a GPU."
    )
    return quiet_parser(parser)


def parse_and_check(defaults: dict | None = None, starting: bool = True) -> argparse.Namespace:
    """Parse, complete, check and publish the arguments of this process, in the order that Megatron expects.

    The same steps as Megatron's `parse_and_validate_args`, with our checks before its assertions. Model arguments come
    from the checkpoint under `--use-checkpoint-args`.

    Args:
        starting: False: a look at the command line alone (`settle_run_folder`).

    Raises:
        ValueError: one line that names the flag.
    """
    args = parse_args(add_rpsd_arguments)
    check_numbers(args)
    check_folders(args)
    check_sources(args)
    settle_run_folder(args, starting)
    check_start(args)
    if args.use_checkpoint_args:
        _load_model_arguments(args)
    if cpu_runtime_installed():
        set_cpu_arguments(args)
    _complete(args)
    check_arguments(args)
    settle_fusions(args)
    try:
        validate_args(args, defaults or {})
    except AssertionError as refused:
        raise ValueError(refusal(refused, args)) from refused
    if args.vocab_size is not None:
        args.padded_vocab_size = calculate_padded_vocab_size(
            args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
        )
    try:
        set_global_variables(args)
    except ValueError as refused:
        if "okenizer" not in str(refused):
            raise
        given = f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}"
        raise ValueError(f"{given}: {str(refused).splitlines()[0]}") from refused
    _settle_vocabulary(args)
    if args.conversations:
        check_chat_tokenizer(args)
    elif args.reset_attention_mask or args.reset_position_ids or args.teacher_document_mask:
        check_document_ends(args, get_tokenizer().eod, [*_data_prefixes(args), *phase_prefixes(args)])
    check_splits(args)
    return args


def _load_model_arguments(args: argparse.Namespace) -> None:
    """Take the model's arguments from the checkpoint; those that only this project knows, too."""
    if args.load is None and args.pretrained_checkpoint is None:
        raise ValueError("--use-checkpoint-args needs --load or --pretrained-checkpoint to name a checkpoint")
    typed_rope, typed_vocab = args.rope_parameters, args.vocab_size
    # Megatron would overwrite a raised base, and the tokenizer, with the checkpoint's; whoever types them means them.
    flags = {word.split("=")[0] for word in sys.argv}
    typed_base = args.rotary_base if "--rotary-base" in flags else None
    if "--tokenizer-model" in flags:
        args.use_tokenizer_model_from_checkpoint_args = False
    # A run's own checkpoint knows all of it: what the pretrained one says must not mix in.
    for name in ("load", "pretrained_checkpoint"):
        with read_alone():
            loaded = load_args_from_checkpoint(args, load_arg=name)
        if isinstance(loaded, tuple):
            saved = loaded[1]
            args.vocab_size = typed_vocab or getattr(saved, "vocab_size", None)
            args.rope_parameters = getattr(saved, "rope_parameters", None) if typed_rope is None else typed_rope
            args.qk_layernorm = saved.qk_layernorm
            args.layernorm_epsilon = saved.layernorm_epsilon
            if name == "load" and not args.finetune:
                follow_checkpoint_phases(args, saved)
            break
    args.rotary_base = args.rotary_base if typed_base is None else typed_base
    # Padding depends on this run's tensor parallelism, so it is computed, never loaded.
    args.padded_vocab_size = None


def _complete(args: argparse.Namespace) -> None:
    settle_phases(args)
    args.calculate_per_token_loss = True
    args.create_attention_mask_in_dataloader = False
    # Under its own --sft Megatron's evaluation averages the means of ranks, in which a context-parallel rank without an
    # assistant token counts as a loss of 0; so its loop is not told.
    args.conversations, args.sft = args.sft, False
    if args.eval_interval is None:  # Megatron 0.19 has no default, and divides by it: evaluate at the end
        args.eval_interval = args.train_iters or 1000
    if args.loss_chunk_bytes is None:
        args.loss_chunk_bytes = DEFAULT_CHUNK_BYTES[args.device]
    if args.rpsd_seed is None:
        args.rpsd_seed = args.seed
    settle_packing(args)
    settle_arm(args)
    settle_attention(args)
    if args.rpsd_split_granule is None and args.seq_length:
        args.rpsd_split_granule = default_granule(args, args.seq_length)
    if args.seq_length and args.max_position_embeddings and args.max_position_embeddings < args.seq_length:
        # The window grows: the adapted model's configuration must say so.
        args.max_position_embeddings = args.seq_length


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot run, before any process group or file is touched.

    Raises:
        ValueError: one line with the flag, the value, the arithmetic and the way out.
    """
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        if getattr(args, name) is None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} is not set: give it, or --use-checkpoint-args with --load or --pretrained-checkpoint"
            )
    check_attention(args)
    _check_parallel_degrees(args)
    check_batch(args)
    check_stages(args)
    _check_objective(args)
    _check_loss(args)
    _check_model(args)
    _check_rope(args)
    _check_data(args)
    check_phases(args)
    check_frozen_dims(args)
    decay = args.lr_decay_iters or args.train_iters
    if decay and args.lr_warmup_iters >= decay:
        raise ValueError(
            f"--lr-warmup-iters {args.lr_warmup_iters} must be smaller than the {decay} steps of --train-iters (or "
            "--lr-decay-iters): the learning rate would never reach its peak"
        )


def _check_parallel_degrees(args: argparse.Namespace) -> None:
    tp, cp, pp = args.tensor_model_parallel_size, args.context_parallel_size, args.pipeline_model_parallel_size
    if args.world_size % (tp * cp * pp):
        raise ValueError(
            f"the world size must be TP x CP x PP x DP: {args.world_size} processes were started, and TP x CP x PP = "
            f"{tp} x {cp} x {pp} = {tp * cp * pp} does not divide them; change --nproc-per-node/--nnodes or the degrees"
        )
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.num_attention_heads % groups:
        raise ValueError(
            f"--num-query-groups {groups} does not divide --num-attention-heads {args.num_attention_heads}: every "
            "group of query heads shares a key head"
        )
    for name, count in (("--num-attention-heads", args.num_attention_heads), ("--num-query-groups", groups)):
        if count % tp:
            raise ValueError(
                f"--tensor-model-parallel-size {tp} does not divide {name} {count}: {count} / {tp} = {count / tp:.2f} "
                "heads a rank; choose a divisor of both"
            )
    unit = suffix_unit(args)
    if args.seq_length % unit:
        factors = f"2 x CP{' x TP' if unit > 2 * cp else ''}" if cp > 1 else "TP (sequence parallelism)"
        raise ValueError(
            f"--seq-length {args.seq_length} does not divide by {factors} = {unit}; "
            f"the nearest lengths are {args.seq_length // unit * unit} and {-(-args.seq_length // unit) * unit}"
        )


def _check_objective(args: argparse.Namespace) -> None:
    if not math.isfinite(args.rpsd_kl_weight) or args.rpsd_kl_weight < 0:
        raise ValueError(
            f"--rpsd-kl-weight {args.rpsd_kl_weight}: the KL's weight must be a finite number of at least 0"
        )
    if args.rpsd_max_shift < 1:
        raise ValueError(f"--rpsd-max-shift {args.rpsd_max_shift}: shifts are drawn from 1..Y, so Y must be at least 1")
    check_positions(args.seq_length, args.rpsd_max_shift)
    unit = suffix_unit(args)
    if args.rpsd_split_granule < 1 or args.rpsd_split_granule % unit:
        raise ValueError(
            f"--rpsd-split-granule {args.rpsd_split_granule}: a suffix must divide by 2 x CP (x TP under sequence "
            f"parallelism) = {unit}, so the granule must be a multiple of {unit}"
        )
    check_arm(args)
    check_distillation(args)
    check_length_mix(args)
    if args.rpsd_split_sampling == "stratified" and (args.rampup_batch_size or args.step_batch_size_schedule):
        raise ValueError(
            "--rpsd-split-sampling stratified spreads splits over a global batch of one size; with --rampup-batch-size "
            "or --step-batch-size-schedule use independent"
        )


def _check_loss(args: argparse.Namespace) -> None:
    if not math.isfinite(args.rpsd_kl_temperature) or args.rpsd_kl_temperature <= 0:
        raise ValueError(f"--rpsd-kl-temperature {args.rpsd_kl_temperature} must be a positive number")
    if args.rpsd_kl_top_k is not None and args.rpsd_kl_top_k < 1:
        raise ValueError(f"--rpsd-kl-top-k {args.rpsd_kl_top_k} must be at least 1")
    if args.loss_chunk_bytes < 1:
        raise ValueError(f"--loss-chunk-bytes {args.loss_chunk_bytes} must be at least 1; one token is always taken")
    if args.loss_implementation == "fused":
        if args.fp16:
            raise ValueError(
                "--fp16: the fused loss forms gradients before the loss scale is known, and fp16 would round them to "
                "0; use --bf16, or --loss-implementation unfused"
            )
    elif (args.rpsd_kl_direction, args.rpsd_kl_temperature, args.rpsd_kl_top_k) != ("reverse-kl", 1.0, None):
        raise ValueError(
            "--loss-implementation unfused knows the reverse KL at temperature 1 over the whole vocabulary; leave out "
            "--rpsd-kl-direction, --rpsd-kl-temperature and --rpsd-kl-top-k, or use fused"
        )


def _check_model(args: argparse.Namespace) -> None:
    if args.attention_dropout or args.hidden_dropout:
        raise ValueError(
            f"--attention-dropout {args.attention_dropout} --hidden-dropout {args.hidden_dropout}: both views must see "
            "the same network, so dropout is not supported; set both to 0"
        )
    if args.position_embedding_type != "rope" or args.rotary_percent != 1.0:
        raise ValueError(
            f"--position-embedding-type {args.position_embedding_type} --rotary-percent {args.rotary_percent}: "
            "views differ in their RoPE positions; use rope over the whole head (scaling such as YaRN goes into "
            "--rope-parameters)"
        )
    if args.normalization != "RMSNorm":
        raise ValueError(f"--normalization {args.normalization}: only RMSNorm models are supported")
    if args.num_experts or args.multi_latent_attention or args.mtp_num_layers:
        raise ValueError("mixture of experts, multi-latent attention and multi-token prediction are not supported")
    if args.kv_channels is not None and args.kv_channels % 2:
        raise ValueError(f"--kv-channels {args.kv_channels}: RoPE rotates pairs, so the head dimension must be even")


def _check_rope(args: argparse.Namespace) -> None:
    if args.rope_parameters is None:
        return
    try:
        scaling = json.loads(args.rope_parameters)
        if not isinstance(scaling, dict):
            raise ValueError("it must be a JSON object")
        RopeConfig(head_dim_of(args), float(args.rotary_base), scaling, args.max_position_embeddings)
    except ValueError as refused:
        raise ValueError(f"--rope-parameters {args.rope_parameters}: {refused}") from refused


def _data_prefixes(args: argparse.Namespace) -> list[str]:
    """What --data-path and its kin name, each once."""
    blend, per_split = data_blends(args)
    return sorted({prefix for part in [blend, *(per_split or [])] if part for prefix in part[0]})


def _check_data(args: argparse.Namespace) -> None:
    prefixes = _data_prefixes(args)
    if args.conversations and (args.mock_data or not prefixes):
        raise ValueError("--sft needs --data-path (or --train-data-path) to name JSONL files of conversations")
    for prefix in prefixes:
        if args.conversations:
            check_conversations(prefix)
        elif prefix.endswith(".jsonl") and Path(prefix).is_file():
            raise ValueError(
                f"--data-path {prefix} is JSONL, not the prefix of .bin and .idx: add --sft if its lines are "
                "conversations, or make tokens of it with tools/preprocess_data.py"
            )
        else:
            check_prefix(prefix, args.vocab_size)


def _settle_vocabulary(args: argparse.Namespace) -> None:
    """The model's real vocabulary: the checkpoint's or the flag's, else the tokenizer's."""
    tokens = get_tokenizer().vocab_size
    if args.vocab_size is None:
        args.vocab_size = tokens
    if tokens > args.vocab_size:
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model} has {tokens} tokens, "
            f"the model's vocabulary only {args.vocab_size}; use the model's own tokenizer"
        )
