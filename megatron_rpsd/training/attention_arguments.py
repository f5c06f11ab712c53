"""`--attention-kernel` and FP8: which kernel a layer's attention runs on, and what FP8 asks of a run.

Megatron's own flags give FP8 linear layers (--fp8-format, --fp8-recipe). Its parser has no flag for FP8 attention, only
a field of its configuration, which ours sets. What Transformer Engine would not run, or would run in bf16 without a
word, is refused here. Sources: Transformer Engine 2.20.2 (`dot_product_attention/utils.py`, get_attention_backend) and
Megatron-Core 0.19.2 (`fp8_utils.py`, get_fp8_recipe). None of it has run on a GPU yet.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os

import torch

from megatron_rpsd.attention import KERNELS, PACKAGES
from megatron_rpsd.training.arms import TWO_VIEWS, fp8_multiple, suffix_unit, views_of
from megatron_rpsd.training.implied import head_dim_of

_CP_COMM_TYPES = ("p2p", "all_gather", "a2a")
_DPA_RECIPES = ("delayed", "tensorwise", "mxfp8")
_FULL = "give --rpsd-execution full, or leave --fp8-dot-product-attention out (linear layers stay in FP8)"


def add_attention_arguments(group) -> None:
    """Add the flags to the parser's group."""
    group.add_argument(
        "--attention-kernel", choices=("auto", *KERNELS), default="auto",
        help="sdpa (auto): torch's scaled_dot_product_attention; flash: the flash-attn package; cudnn: cuDNN through "
        "torch; te: Transformer Engine's DotProductAttention. All but sdpa need a GPU and --bf16.",
    )  # fmt: skip
    group.add_argument(
        "--fp8-dot-product-attention", action="store_true",
        help="Attention in FP8, too: with --fp8-format, --attention-kernel te and whole views (--rpsd-execution full "
        "where there are two).",
    )  # fmt: skip


def settle_attention(args: argparse.Namespace) -> None:
    """Name the kernel of `auto`."""
    if args.attention_kernel == "auto":
        args.attention_kernel = "sdpa"


def check_attention(args: argparse.Namespace) -> None:
    """Refuse a kernel that cannot run here, and an FP8 setting that would not run or would silently not be FP8.

    Raises:
        ValueError: one line with the flag, the value, the reason and the way out.
    """
    _check_kernel(args)
    if args.fp8_dot_product_attention and not args.fp8:
        raise ValueError(
            "--fp8-dot-product-attention without --fp8-format: Megatron would attend in bf16; add --fp8-format hybrid, "
            "or leave it out"
        )
    if args.fp8:
        _check_fp8(args)
    if args.fp8_dot_product_attention:
        _check_fp8_attention(args)


def _check_kernel(args: argparse.Namespace) -> None:
    kernel = args.attention_kernel
    if kernel == "sdpa":
        return
    flag = f"--attention-kernel {kernel}"
    if args.device == "cpu":
        raise ValueError(f"{flag} needs a GPU and this run has --device cpu: leave it out, or give sdpa")
    package = PACKAGES.get(kernel)
    if package is not None and not _installed(package):
        raise ValueError(f"{flag} needs the Python package {package}, which is not installed: install it, or give sdpa")
    if kernel == "flash":
        _check_flash_version(flag)
    if not (args.bf16 or args.fp16):
        raise ValueError(f"{flag} attends in 16 bits and this run is in fp32: add --bf16, or give sdpa")
    size = head_dim_of(args)
    if size % 8 or size > 256:
        raise ValueError(f"{flag} takes heads of at most 256 channels in multiples of 8; this model's have {size}")
    if kernel == "te" and args.context_parallel_size > 1:
        _check_context_parallelism(args)


def _check_context_parallelism(args: argparse.Namespace) -> None:
    """Under te whole views leave context parallelism to Transformer Engine."""
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    kinds = args.cp_comm_type
    other = sorted(set(kinds) - set(_CP_COMM_TYPES))
    if other:
        raise ValueError(
            f"--cp-comm-type {other[0]} with --attention-kernel te: choose of {', '.join(_CP_COMM_TYPES)}; "
            "hierarchical context parallelism is not supported"
        )
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if "a2a" in kinds and groups % (tp * cp):
        raise ValueError(
            f"--cp-comm-type a2a deals heads out over context-parallel ranks: {groups} key heads / TP {tp} / CP {cp} = "
            f"{groups / tp / cp:g} is not whole; use p2p or all_gather"
        )


def _check_fp8(args: argparse.Namespace) -> None:
    flag = f"--fp8-format {args.fp8}"
    if args.device == "cpu":
        raise ValueError(f"{flag} needs a GPU and this run has --device cpu: leave it out")
    if args.transformer_impl != "transformer_engine":
        raise ValueError(
            f"{flag} with --transformer-impl {args.transformer_impl}: only Transformer Engine's layers know FP8, the "
            "others would stay in bf16; give --transformer-impl transformer_engine"
        )
    if not _installed("transformer_engine"):
        raise ValueError(
            f"{flag} needs the Python package transformer_engine, which is not installed: install it, or leave FP8 out"
        )
    if not args.bf16:
        raise ValueError(f"{flag} needs --bf16: what is not in FP8 is in bf16")
    major, minor = _capability()
    if (major, minor) < (8, 9):
        raise ValueError(
            f"{flag} needs a GPU of compute capability 8.9 or above, and this one has {major}.{minor}: leave FP8 out"
        )
    _check_fp8_shapes(args, flag)


def _check_fp8_shapes(args: argparse.Namespace, flag: str) -> None:
    tp, heads, size = args.tensor_model_parallel_size, args.num_attention_heads, head_dim_of(args)
    groups = args.num_query_groups if args.group_query_attention else heads
    widths = {
        "--hidden-size": (args.hidden_size, 1),
        "--ffn-hidden-size / TP": (args.ffn_hidden_size or 4 * args.hidden_size, tp),
        "--num-attention-heads x head dimension / TP": (heads * size, tp),
        "the width of queries, keys and values / TP": ((heads + 2 * groups) * size, tp),
    }
    least = fp8_multiple(args)
    for name, (width, ranks) in widths.items():
        if width % (least * ranks):
            raise ValueError(
                f"{flag}: FP8 matrix products take widths in multiples of {least} (--fp8-recipe {args.fp8_recipe}), "
                f"and {name} is {width} / {ranks} = {width / ranks:g}; choose another --tensor-model-parallel-size, or "
                "leave FP8 out"
            )
    unit = suffix_unit(args)
    factors = f"CP x {'TP x ' if args.sequence_parallel else ''}{least}"
    for name, value in (("--seq-length", args.seq_length), ("--rpsd-split-granule", args.rpsd_split_granule)):
        if value % unit:
            raise ValueError(
                f"{name} {value} with {flag}: FP8 matrix products take a rank's tokens in multiples of {least}, so "
                f"{'whole sequences' if name == '--seq-length' else 'suffixes'} divide by {factors} = {unit}; the next "
                f"value is {-(-value // unit) * unit}"
            )


def _check_fp8_attention(args: argparse.Namespace) -> None:
    flag = "--fp8-dot-product-attention"
    if args.attention_kernel != "te":
        raise ValueError(f"{flag} with --attention-kernel {args.attention_kernel}: only te attends in FP8; give te")
    if args.fp8_recipe not in _DPA_RECIPES:
        raise ValueError(
            f"{flag} with --fp8-recipe {args.fp8_recipe}: Transformer Engine has no FP8 attention for it and would "
            "attend in bf16; use delayed, or leave the flag out"
        )
    if (override := os.environ.get("NVTE_DPA_FP8_RECIPE")) is not None:
        raise ValueError(
            f"{flag} with NVTE_DPA_FP8_RECIPE={override} in the environment, by which Transformer Engine would attend "
            "by another recipe than --fp8-recipe says: unset it"
        )
    if views_of(args) in TWO_VIEWS and args.rpsd_execution == "shared-prefix":
        length = args.seq_length
        raise ValueError(
            f"{flag} with --rpsd-execution shared-prefix: with a split at {length // 2} the suffix is a rectangle of "
            f"{length} - {length // 2} = {length - length // 2} queries over {length} keys, and Transformer Engine has "
            f"no FP8 kernel with a bottom-right mask: {_FULL}"
        )
    if args.reset_attention_mask:
        raise ValueError(
            f"{flag} with masked documents (--packing document-mask, which --sft begins with, or "
            "--reset-attention-mask): Transformer Engine attends in FP8 to whole causal sequences alone; give "
            "--packing concatenate, or leave the flag out (linear layers stay in FP8)"
        )
    if args.recompute_granularity == "selective" and "core_attn" in (args.recompute_modules or ["core_attn"]):
        raise ValueError(
            f"{flag} with --recompute-granularity selective --recompute-modules core_attn: Megatron runs attention "
            "again outside of FP8, so the gradient would be bf16's: give full recomputation, or none"
        )
    _check_fp8_heads(args, flag)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _check_flash_version(flag: str) -> None:
    version = _flash_version()
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 1):
        raise ValueError(
            f"{flag}: the flash-attn package is {version}, and before 2.1 a rectangle's causal mask starts at the top "
            "left: install a newer one"
        )


def _flash_version() -> str:
    return importlib.metadata.version("flash_attn")


def _capability() -> tuple[int, int]:
    """Compute capability of this process's GPU."""
    return torch.cuda.get_device_capability()


def _check_fp8_heads(args: argparse.Namespace, flag: str) -> None:
    """What the device's FP8 attention kernels train."""
    capability = _capability()
    size, hopper = head_dim_of(args), capability < (10, 0)
    if capability < (9, 0) or capability == (12, 0):
        raise ValueError(
            f"{flag}: Transformer Engine has no FP8 attention for compute capability {capability[0]}.{capability[1]}: "
            "leave the flag out (linear layers stay in FP8)"
        )
    if hopper and args.fp8_recipe != "delayed":
        raise ValueError(
            f"{flag} with --fp8-recipe {args.fp8_recipe}: on Hopper FP8 attention trains with delayed scaling alone: "
            "give --fp8-recipe delayed, or leave the flag out (linear layers stay in FP8)"
        )
    if (hopper and size != 128) or size > 128 or size % 16:
        allowed = "128 channels" if hopper else "at most 128 channels in multiples of 16"
        raise ValueError(
            f"{flag}: {'on Hopper ' * hopper}FP8 attention trains heads of {allowed}, and this model's have {size}: "
            "leave the flag out (linear layers stay in FP8)"
        )
