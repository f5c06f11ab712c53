"""What ranks of the pool run in the tests of conversion."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import runpy
import sys
import time
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.training.checkpointing import load_checkpoint

from megatron_rpsd.checkpoint import convert, torch_dist_writer
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.model_loading import named_parameters, table_by_name
from megatron_rpsd.planning.conversion_costs import measure_conversion
from megatron_rpsd.training.session import build_stages, end_session, start_session

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def parameters_that_differ(hf: Path, checkpoint: Path, flags: list[str]) -> tuple[int, list[str]]:
    """Load a checkpoint by Megatron's own code at the layout of `flags`; compare this rank's shards with the folder's.

    Returns:
        parameters compared, names of those that differ in any bit.
    """
    folder = HFFolder(hf)
    dims, table = folder.dimensions(), table_by_name(folder.dimensions())
    arguments = [*convert.hf_session_arguments(folder), "--device", "cpu", "--seq-length", "16", *flags]
    try:
        args, config = start_session([*arguments, "--load", str(checkpoint), "--exit-on-missing-checkpoint"])
        stages = build_stages(config, args)
        for stage in stages:
            for parameter in stage.parameters():
                torch.nn.init.constant_(parameter, float("nan"))  # so that what is not loaded differs
        with contextlib.redirect_stdout(io.StringIO()):
            load_checkpoint(stages, None, None)
        tp_rank, tp_size = parallel_state.get_tensor_model_parallel_rank(), args.tensor_model_parallel_size
        compared, different = 0, []
        for name, parameter in named_parameters(stages):
            layout = table[name].layout
            full = layout.to_megatron([folder.tensor(hf_name) for hf_name in table[name].hf_names], dims)
            compared += 1
            if not torch.equal(layout.split(full, tp_size, tp_rank, dims, args.padded_vocab_size), parameter):
                different.append(name)
        return compared, different
    finally:
        end_session()


def _leave_the_pool() -> None:
    """Be a process that nobody started as a rank, as a user's is."""
    torch.distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name)


def command(words: list[str], file_bytes: int | None = None, full_after: int | None = None) -> tuple[int, str, str]:
    """Run `tools/convert_checkpoint.py` in this process; exit code, stdout and stderr.

    Args:
        file_bytes: the system refuses to write a file beyond this size.
        full_after: bytes after which every write fails as on a full device.
    """
    _leave_the_pool()
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if full_after is not None:
        _fill_device(full_after)
    out, error = io.StringIO(), io.StringIO()
    sys.argv = [str(TOOL), *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), error.getvalue()


def _fill_device(room: int) -> None:
    """Make the writes of both directions fail with ENOSPC once `room` bytes are taken."""
    taken = 0
    pwrite, write = os.pwrite, torch_dist_writer._Stream.write

    def take(data) -> None:
        nonlocal taken
        taken += len(data)
        if taken > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_pwrite(descriptor, data, offset):
        take(data)
        return pwrite(descriptor, data, offset)

    def full_write(stream, data):
        try:
            take(memoryview(data).cast("B"))
        except OSError as error:
            stream._error = error
            raise
        return write(stream, data)

    os.pwrite, torch_dist_writer._Stream.write = full_pwrite, full_write


def benchmark(hf: Path, scratch: Path) -> dict:
    """One repetition of the benchmark."""
    _leave_the_pool()
    return measure_conversion(hf, scratch, repetitions=1)


def slowly(direction: str, hf: Path, checkpoint: Path, output: Path) -> None:
    """Convert with a pause before every tensor, so that a kill meets the writing."""
    from megatron_rpsd.checkpoint.torch_dist_reader import TorchDistModel

    for owner, name in ((HFFolder, "tensor"), (TorchDistModel, "full")):
        read = getattr(owner, name)
        setattr(owner, name, lambda *args, read=read: time.sleep(0.01) or read(*args))
    if direction == "import":
        convert.import_hf(hf, output)
    else:
        convert.export_hf(checkpoint, hf, output, max_shard_bytes=20_000)
