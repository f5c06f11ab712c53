"""Megatron's own answer to a plan: any world size in one process, this rank's shard built on the meta device.

`--fake-process-group` initialises all groups without a peer, so the training's parser, its checks and Megatron's model
builder see exactly the arguments of the launch. No weight gets memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_rpsd.checkpoint.megatron_arguments import megatron_arguments
from megatron_rpsd.planning.known_models import PlannedModel
from megatron_rpsd.planning.layouts import Layout, parameters_of_stage

_FAKE = ("--fake-process-group", "--tokenizer-type", "NullTokenizer", "--device", "cpu", "--force-cpu-runtime")


def built_parameters(model: PlannedModel, arguments: Sequence[str], world_size: int, rank: int) -> int:
    """Parameters that Megatron builds for `rank` of a world started with `arguments`.

    The CPU runtime has to be installed (`training.main.choose_device`).

    Raises:
        ValueError: the training's parser or Megatron refuses the arguments.
    """
    from megatron_rpsd.checkpoint.torch_dist_writer import meta_stages
    from megatron_rpsd.training.session import end_session, start_session

    lent = {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in lent}
    os.environ.update(lent)
    try:
        _, config = start_session([*megatron_arguments(model), *arguments, *_FAKE])
        return sum(parameter.numel() for stage in meta_stages(config) for parameter in stage.parameters())
    finally:
        end_session()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def check_plan(model: PlannedModel, layout: Layout, arguments: Sequence[str]) -> list[tuple[int, int, int]]:
    """(rank, planned, built) parameters for one rank of the first, a middle and the last pipeline stage.

    Raises:
        ValueError: as `built_parameters`.
    """
    stride = layout.gpus // layout.pp  # the pipeline is Megatron's slowest dimension
    return [
        (
            stage * stride,
            parameters_of_stage(model.dims, layout, stage),
            built_parameters(model, arguments, layout.gpus, stage * stride),
        )
        for stage in sorted({0, layout.pp // 2, layout.pp - 1})
    ]
