"""What follows from Megatron's arguments before Megatron has settled them."""

from __future__ import annotations

import argparse


def head_dim_of(args: argparse.Namespace) -> int:
    """d of the model's heads."""
    return args.kv_channels or args.hidden_size // args.num_attention_heads


def data_parallel_ranks(args: argparse.Namespace) -> int:
    """Ranks that read other samples: what TP x CP x PP leaves of all."""
    return args.world_size // (
        args.tensor_model_parallel_size * args.context_parallel_size * args.pipeline_model_parallel_size
    )


def global_batch(args: argparse.Namespace) -> int:
    """Sequences of a step; where none is typed, a micro-batch of every data-parallel rank."""
    return args.global_batch_size or args.micro_batch_size * data_parallel_ranks(args)
