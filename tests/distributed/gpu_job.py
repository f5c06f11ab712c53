"""What a rank of the pool runs in the tests of the GPU check: checks that need a Megatron session, tiny, on the CPU."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Sequence

from megatron.core import parallel_state

from megatron_rpsd.checkpoint.convert import export_hf, import_hf
from megatron_rpsd.planning import gpu_loss, gpu_steps, loss_costs
from megatron_rpsd.planning.gpu_rows import Row
from megatron_rpsd.planning.loss_peers import megatron_and_dense_kl
from tests.distributed.plan_job import leave_the_pool


def step_and_plan_rows() -> tuple[list[Row], list[Row]]:
    """Both, one after the other in one process."""
    leave_the_pool()
    sizes = gpu_steps.TINY_SIZES
    return list(gpu_steps.step_rows("cpu", sizes)), list(gpu_steps.plan_rows("cpu", sizes))


def loss_rows() -> list[Row]:
    """With measurements in this process, in place of one that a launcher starts, beside the peer quickest to import."""
    leave_the_pool()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def here(function, world_size: int, *arguments):
        assert world_size == 1
        try:
            return function(*arguments)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            parallel_state.destroy_model_parallel()

    loss_costs.run_on_local_ranks = here
    peers = {"megatron+dense-kl": megatron_and_dense_kl}, {"liger": "needs one GPU"}
    gpu_loss.available_peers = lambda device, ranks: peers
    return list(gpu_loss.loss_rows("cpu", gpu_loss.TINY_SIZES))


def convert(words: Sequence[str]) -> str:
    """As tools/convert_checkpoint.py."""
    given = dict(zip(words[1::2], words[2::2], strict=False))
    if words[0] == "import":
        import_hf(given["--hf"], given["--output"])
    else:
        export_hf(given["--checkpoint"], given["--hf-reference"], given["--output"])
    return ""
