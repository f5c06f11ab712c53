"""Megatron's flags: values that it takes although it cannot run with them, and its own refusals with flag and value.

Megatron checks few values, and many of its checks are bare assertions; what is out of range shows minutes later, on
every rank, as a division by zero or a wait without end.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import linecache
import math
import os
import traceback
from pathlib import Path

from megatron_rpsd.training.implied import data_parallel_ranks

_AT_LEAST = {
    1: (
        "seq_length", "micro_batch_size", "global_batch_size", "num_layers", "hidden_size", "num_attention_heads",
        "vocab_size", "max_position_embeddings", "rotary_base", "tensor_model_parallel_size", "context_parallel_size",
        "pipeline_model_parallel_size", "make_vocab_size_divisible_by", "lr_decay_iters", "lr_decay_samples",
        "log_interval", "save_interval", "eval_interval", "num_dataset_builder_threads", "seed",
        "distributed_timeout_minutes",
    ),
    0: (
        "train_iters", "train_samples", "lr_warmup_iters", "lr_warmup_samples", "eval_iters", "exit_interval",
        "exit_duration_in_mins", "num_workers", "lr", "min_lr", "weight_decay", "clip_grad", "adam_eps",
    ),
}  # fmt: skip
_BELOW_ONE = ("lr_warmup_fraction", "adam_beta1", "adam_beta2")

_APEX_KERNEL = "fused_weight_gradient_mlp_cuda"


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers out of range, before anything is computed with them. What is not set is not looked at.

    Raises:
        ValueError: one line with the flag and the value.
    """
    for least, names in _AT_LEAST.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not least <= value < math.inf:  # NaN is neither
                raise ValueError(f"{_flag(name)} {value} must be a finite number of at least {least}")
    for name in _BELOW_ONE:
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{_flag(name)} {value} must be at least 0 and below 1")
    for name in ("lr_warmup_iters", "lr_warmup_samples"):
        if args.lr_warmup_fraction is not None and getattr(args, name):
            raise ValueError(
                f"--lr-warmup-fraction {args.lr_warmup_fraction} {_flag(name)} {getattr(args, name)}: both say how "
                "long the learning rate rises; leave one of the two out"
            )


def check_folders(args: argparse.Namespace) -> None:
    """Refuse places for results that no folder can be made at; nothing is made here.

    Raises:
        ValueError: one line with the flag and the path.
    """
    for name in ("run_dir", "save", "tensorboard_dir", "data_cache_path"):
        if (typed := getattr(args, name)) is None:
            continue
        place = Path(typed)
        there = next(path for path in (place, *place.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"{_flag(name)} {typed}: {there} is a file; name a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{_flag(name)} {typed}: {there} cannot be written to; name another folder")


def check_sources(args: argparse.Namespace) -> None:
    """Refuse data from several places, before any of them is read.

    Raises:
        ValueError: one line with the flags.
    """
    of_splits = ("train_data_path", "valid_data_path", "test_data_path")
    given = [name for name in ("data_path", "data_args_path", "per_split_data_args_path") if getattr(args, name)]
    given += [name for name in of_splits if getattr(args, name)][:1] + ["mock_data"] * args.mock_data
    if len(given) > 1:
        raise ValueError(f"{' and '.join(map(_flag, given))} both name the run's data: leave all but one out")


def check_batch(args: argparse.Namespace) -> None:
    """Refuse a global batch that the ranks' micro-batches do not make up, two lengths of one run, and no learning rate.

    Raises:
        ValueError: one line with the arithmetic and the nearest sizes.
    """
    if args.micro_batch_size is None:
        raise ValueError("--micro-batch-size is not set: give the samples that a rank reads at once, for example 1")
    if args.train_samples and args.train_iters:
        raise ValueError(
            f"--train-samples {args.train_samples} --train-iters {args.train_iters}: both say how long the run is; "
            "leave one of the two out"
        )
    if args.lr is None and (args.train_samples or args.train_iters) and not args.skip_train:
        raise ValueError("--lr is not set: give the largest learning rate of the run, for example 2e-5")
    if args.global_batch_size is None or args.decrease_batch_size_if_needed:
        return
    replicas = data_parallel_ranks(args)
    unit = args.micro_batch_size * replicas
    if args.global_batch_size % unit:
        below = args.global_batch_size // unit * unit
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} does not divide by --micro-batch-size "
            f"{args.micro_batch_size} x {replicas} data-parallel ranks = {unit}; the nearest sizes are "
            f"{f'{below} and ' if below else ''}{below + unit}"
        )


def check_stages(args: argparse.Namespace) -> None:
    """Refuse sizes of the first and last pipeline stage that no pipeline has.

    Raises:
        ValueError: one line with the flag, the stages and the layers.
    """
    stages = args.pipeline_model_parallel_size
    for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        value = getattr(args, name)
        if value is not None and not (stages > 1 and 0 < value < args.num_layers):
            raise ValueError(
                f"{_flag(name)} {value} with --pipeline-model-parallel-size {stages}: it needs at least 2 stages, and "
                f"a stage at least 1 and not all of the {args.num_layers} layers"
            )


def refusal(refused: AssertionError, args: argparse.Namespace) -> str:
    """What one of Megatron's assertions wants, in one line, with the flags that it looks at and their values."""
    frame = traceback.extract_tb(refused.__traceback__)[-1]
    test = next(
        (
            node.test
            for node in ast.walk(ast.parse("".join(linecache.getlines(frame.filename))))
            if isinstance(node, ast.Assert) and node.lineno <= frame.lineno <= node.end_lineno
        ),
        None,
    )
    names = [] if test is None else list(dict.fromkeys(_names(test)))
    given = ", ".join(f"{_flag(name)} {getattr(args, name)}" for name in names if hasattr(args, name))
    # Many of the assertions carry no message; their source says what they want.
    reason = str(refused) or (frame.line if test is None else ast.unparse(test))
    return f"Megatron refuses {given or 'these arguments'}: {reason}"


def _names(test: ast.expr) -> list[str]:
    """Arguments that an expression reads as args.NAME, or as NAME where they were handed on, in its order."""
    found = [
        (node.lineno, node.col_offset, node.attr if isinstance(node, ast.Attribute) else node.id)
        for node in ast.walk(test)
        if isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    ]
    return [name for *_, name in sorted(found)]


def _flag(name: str) -> str:
    if name == "transformer_pipeline_model_parallel_size":  # Megatron's name for it while it checks
        name = "pipeline_model_parallel_size"
    return "--" + name.replace("_", "-")


def settle_fusions(args: argparse.Namespace) -> None:
    """Leave out the fusion of gradient accumulation where Apex's kernel for it is absent, and say so.

    Megatron's default is on, and its output layer then stops without Apex, under Transformer Engine too. The sums are
    the same, in an addition of their own.
    """
    if args.gradient_accumulation_fusion and importlib.util.find_spec(_APEX_KERNEL) is None:
        args.gradient_accumulation_fusion = False
        if args.rank == 0:
            print(f"--no-gradient-accumulation-fusion is set: Apex's {_APEX_KERNEL} is not installed", flush=True)
