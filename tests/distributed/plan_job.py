"""What a rank of the pool runs in the tests of plans: Megatron at any world size, weights and tensors left out."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.checkpointing import save_checkpoint

from megatron_rpsd.checkpoint.megatron_arguments import megatron_arguments
from megatron_rpsd.checkpoint.torch_dist_writer import StreamingSave, meta_stages
from megatron_rpsd.planning.dry_run import check_plan
from megatron_rpsd.planning.known_models import of_config
from megatron_rpsd.planning.layouts import Layout, Workload
from megatron_rpsd.planning.live_tensors import LiveTensors
from megatron_rpsd.positions import View
from megatron_rpsd.training.main import check_command_line
from megatron_rpsd.training.run import forward_step_from_args
from megatron_rpsd.training.session import build_stages, end_session, start_session


def leave_the_pool() -> None:
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)


def shards(cases: list[tuple[dict, Layout, list[str]]]) -> list[list[tuple[int, int, int]]]:
    """Of every (config.json, layout, training's arguments): (rank, planned, built) parameters of each stage."""
    leave_the_pool()
    return [check_plan(of_config("model", config), layout, arguments) for config, layout, arguments in cases]


def live_peak(config: dict, layout: Layout, work: Workload, start: int | None) -> tuple[int, int]:
    """Bytes of this rank's weights and gradients, and of all other tensors at the peak of a micro-batch."""
    model, length = of_config("model", config), work.length
    words = [*megatron_arguments(model), *layout.arguments(), "--seq-length", str(length), "--device", "cpu"]
    words += ["--objective", work.objective, "--loss-chunk-bytes", str(work.chunk_bytes)]
    args, model_config = start_session([*words, "--tokenizer-type", "NullTokenizer"])
    (stage,) = build_stages(model_config, args, wrap_with_ddp=True)
    forward_step = forward_step_from_args(args, model_config)
    ids = torch.randint(0, model.dims.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(1))
    sample = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": torch.ones(1, length)}
    views = [View(start or 0, 7)]

    def micro_batch() -> None:
        stage.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=lambda _, model: forward_step.run(model, sample, views, forward_step.layout(start)),
            data_iterator=None, model=stage, num_microbatches=1, seq_length=length, micro_batch_size=1,
            forward_only=False,
        )  # fmt: skip

    known = [*stage.parameters(), *(buffer.grad_data for buffer in stage.buffers)]
    micro_batch()  # what is made once and stays, such as indices
    with LiveTensors(known) as live:
        micro_batch()
    end_session()
    return sum(tensor.nbytes for tensor in known), live.peak


class _NoTensors(StreamingSave):
    """A checkpoint of arguments alone."""

    def __init__(self) -> None:
        super().__init__(None, None)

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        objects = [part for part in nested_values(sharded_state_dict) if isinstance(part, ShardedObject)]
        super().save(dict(enumerate(objects)), checkpoint_dir)


def _checkpoint_of_arguments(config: dict, folder: Path, tokenizer: Path) -> None:
    """What `--use-checkpoint-args` reads of an imported model of any size."""
    model = of_config("model", config)
    words = [*megatron_arguments(model), "--bf16", "--device", "cpu", "--seq-length", str(model.rope()[2])]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    try:
        args, model_config = start_session([*words, "--save", str(folder), "--save-interval", "1"])
        args.seq_length = None
        with contextlib.redirect_stdout(io.StringIO()):
            save_checkpoint(0, meta_stages(model_config), None, None, 0, {"save_strategy": _NoTensors()}, release=True)
    finally:
        end_session()


def checked_commands(
    config: dict, folder: Path, tokenizer: Path, commands: list[tuple[int, list[str]]]
) -> list[dict[str, object]]:
    """Parse every (world size, words) as `tools/attempt.py begin` does before a job starts; the settled arguments.

    Raises:
        ValueError: what the command line is refused for.
    """
    from megatron.training import get_args

    leave_the_pool()
    _checkpoint_of_arguments(config, folder, tokenizer)
    found = []
    for world_size, words in commands:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
        typed = ["--pretrained-checkpoint", str(folder), "--device", "cpu", "--force-cpu-runtime"]
        sys.argv = ["attempt.py", *words, *typed]
        try:
            check_command_line()
            args = get_args()
            found.append({name: getattr(args, name) for name in _SETTLED})
        finally:
            end_session()
    return found


_SETTLED = (
    "world_size", "data_parallel_size", "seq_length", "max_position_embeddings", "rotary_base", "train_iters", "lr",
    "global_batch_size", "objective", "longce", "conversations", "num_layers", "hidden_size", "bf16",
)  # fmt: skip
