"""Run a teacher over the training data of a run, in the run's own order, and keep its likeliest tokens."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training.training import build_train_valid_test_data_iterators, update_train_iters

from megatron_rpsd.loss import likeliest_tokens
from megatron_rpsd.training.dataset import datasets_provider
from megatron_rpsd.training.forward_step import ForwardStep
from megatron_rpsd.training.run import forward_step_from_args
from megatron_rpsd.training.session import end_session, start_session
from megatron_rpsd.training.teacher_cache import (
    MANIFEST,
    CacheWriter,
    KeptMicroBatch,
    check_cacheable,
    contents,
    tokens_checksum,
)


def cache_teacher(output: str | Path, arguments: Sequence[str], iterations_per_file: int = 16) -> int:
    """Write the cache that a run with --teacher-cache `output` reads. Every rank of the job calls it.

    Args:
        output: a folder that does not exist yet, or is empty.
        arguments: the run's own command line, with --teacher-checkpoint and --distill-top-k in it and without
            --teacher-cache and pipeline parallelism. Tensor parallelism is free; context parallelism, batch sizes and
            data must be the run's, and one data-parallel size must divide the other.
        iterations_per_file: steps in one file, and in a rank's memory.

    Returns:
        Iterations written.

    Raises:
        ValueError: the arguments are not such a run's, or `output` holds something.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists and is no empty folder: name another, or remove it")
    if iterations_per_file < 1:
        raise ValueError(f"--iterations-per-file {iterations_per_file} must be at least 1")
    try:
        args, config = start_session(arguments)
        check_cacheable(args)
        if args.teacher_checkpoint is None or args.distill_top_k is None:
            raise ValueError(
                "tools/cache_teacher.py needs --objective distill, --teacher-checkpoint DIR and --distill-top-k K"
            )
        step = forward_step_from_args(args, config)
        args.iteration = args.num_floating_point_operations_so_far = 0
        update_train_iters(args)
        samples, _, _ = build_train_valid_test_data_iterators(datasets_provider)
        manifest = contents(args, step.teacher.identity, args.train_iters)
        output.mkdir(parents=True, exist_ok=True)
        writer = CacheWriter(output, manifest, iterations_per_file)
        for iteration in range(args.train_iters):
            kept = [_kept(step, next(samples), iteration) for _ in range(get_num_microbatches())]
            writer.add(iteration, kept)
        writer.flush()
        dist.barrier()
        if dist.get_rank() == 0:
            partial = output / f".{MANIFEST}"
            partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, output / MANIFEST)
        dist.barrier()
        return args.train_iters
    finally:
        end_session()


def _kept(step: ForwardStep, sample: dict, iteration: int) -> KeptMicroBatch:
    reading = step.teacher.read(step, None, sample)
    divergence, chunk_bytes = step.objective.distillation.divergence, step.objective.options.chunk_bytes
    read = likeliest_tokens(reading.hidden, reading.weight, reading.shard, divergence, reading.logit_scale, chunk_bytes)
    log_probs, tokens, log_rest = (part.unflatten(0, (-1, len(sample["tokens"]))).cpu() for part in read)
    return KeptMicroBatch(log_probs.float(), tokens, log_rest.float(), tokens_checksum(sample), iteration)


def report(output: Path, iterations: int) -> None:
    """One line on stderr about what was written."""
    size = sum(path.stat().st_size for path in output.glob("*.tar"))
    print(f"{output}: {iterations} iterations, {size / 2**20:.1f} MiB", file=sys.stderr, flush=True)
