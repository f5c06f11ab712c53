"""Import, export and verify: a Hugging Face folder to a torch_dist checkpoint and back, on a CPU.

Both ways stream: one tensor is in memory at a time, whatever the model's size. Started by torchrun, the ranks share the
work. Folders are written aside and renamed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from torch import Tensor

from megatron_rpsd.checkpoint.families import EMBEDDING, entries
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.hf_source import HFSource, mixed_dtypes, warn_unless_finite
from megatron_rpsd.checkpoint.hf_writer import Source, exported_config, with_yarn, write_hf_folder
from megatron_rpsd.checkpoint.layouts import bitwise_equal
from megatron_rpsd.checkpoint.megatron_arguments import megatron_arguments
from megatron_rpsd.checkpoint.partial_folder import partial_folder, rank, refuse_existing
from megatron_rpsd.checkpoint.progress import Progress
from megatron_rpsd.checkpoint.torch_dist_reader import TorchDistModel
from megatron_rpsd.checkpoint.torch_dist_writer import StreamingSave, meta_stages
from megatron_rpsd.positions import RopeConfig
from megatron_rpsd.training.saved_checkpoint import checkpoint_folder, saved_arguments
from megatron_rpsd.training.session import build_stages, end_session, precision_arguments, start_session


def model_dtype(folder: HFFolder) -> torch.dtype:
    """The dtype in which the folder stores its embedding, taken as the model's."""
    return folder.stored(EMBEDDING).dtype


def hf_session_arguments(folder: HFFolder, dtype: torch.dtype | None = None) -> list[str]:
    """Command-line arguments of a session on a Hugging Face model, its tokenizer included where the folder has one."""
    has_tokenizer = (folder.path / "tokenizer_config.json").exists()
    tokenizer = (
        ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder.path.resolve())]
        if has_tokenizer
        else ["--tokenizer-type", "NullTokenizer"]
    )
    precision = precision_arguments(model_dtype(folder) if dtype is None else dtype)
    return [*megatron_arguments(folder), *tokenizer, *precision, "--no-initialization", "--transformer-impl", "local"]


@dataclass(frozen=True)
class ImportLayout:
    """How the ranks of an import divide the model, and with it the files of the checkpoint; any other layout loads it.

    first_stage_layers, last_stage_layers: None, or the layers of an uneven first or last pipeline stage.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    def arguments(self) -> list[str]:
        """Megatron's flags.

        Raises:
            ValueError: the number of started ranks is another one.
        """
        given = {
            "--tensor-model-parallel-size": self.tensor_model_parallel_size,
            "--pipeline-model-parallel-size": self.pipeline_model_parallel_size,
            "--decoder-first-pipeline-num-layers": self.first_stage_layers,
            "--decoder-last-pipeline-num-layers": self.last_stage_layers,
        }
        for flag, value in given.items():
            if value is not None and value < 1:
                raise ValueError(f"{flag} {value} must be at least 1")
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != tp * pp:
            raise ValueError(
                f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} = {tp * pp} ranks, "
                f"{started} started; run torchrun --nproc-per-node {tp * pp} tools/convert_checkpoint.py import ..."
            )
        return [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


@contextlib.contextmanager
def _old_objects_aside() -> Iterator[None]:
    """Garbage collections that pass over what was there before: with Megatron imported, a full one takes 0.3 s."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_old_objects_aside()
def import_hf(
    hf: str | Path,
    output: str | Path,
    device: str = "cpu",
    layout: ImportLayout | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Write a Hugging Face model as a torch_dist checkpoint that `--load` and `--pretrained-checkpoint` take.

    Its saved arguments describe the model, so that training needs only `--use-checkpoint-args` beside it. Every rank of
    the job calls it. Memory: the largest tensor a few times, on every rank.

    Args:
        layout: default: one rank.
        dtype: of the checkpoint; default: as stored.

    Returns:
        The number of parameters.

    Raises:
        ValueError: the folder is no model that converts, `output` exists, or the device is full.
    """
    refuse_existing(Path(output))
    folder = HFFolder(hf)
    folder.check()
    tokenizer_checked = folder.check_tokenizer()
    dtype = dtype or model_dtype(folder)
    arguments = [*hf_session_arguments(folder, dtype), *(layout or ImportLayout()).arguments()]
    if dtype == torch.float16:
        arguments += ["--loss-implementation", "unfused"]  # the fused loss refuses fp16; no loss is computed here
    arguments += ["--device", device, "--seq-length", str(folder.rope()[2])]
    # Loading a tokenizer takes as long as writing 300 MB. Where its size is known it is only written down.
    later = ["--tokenizer-type", "NullTokenizer"] if tokenizer_checked else []
    try:
        args, config = start_session([*arguments, *later, "--save", str(output), "--save-interval", "1"])
        stages = meta_stages(config)
        if later and args.tokenizer_model is not None:
            args.tokenizer_type = "HuggingFaceTokenizer"
        args.seq_length = None  # a choice of the run, not of the model: --use-checkpoint-args shall not bring it back
        with partial_folder(output) as partial:
            args.save = str(partial)
            _save(stages, folder, dtype)
            args.save = None
    finally:
        end_session()
    return sum(math.prod(shape) for mapped in entries(folder.dimensions()) for shape in mapped.hf_shapes)


def _save(stages: list, folder: HFFolder, dtype: torch.dtype) -> None:
    """Write this rank's part of the checkpoint, by Megatron's own `save_checkpoint`."""
    reads_first = parallel_state.get_tensor_model_parallel_rank() == 0  # of those that read the same tensors
    cast = list(mixed_dtypes(folder, dtype))
    if cast and rank() == 0:
        print(f"warning: {len(cast)} tensor(s) are cast to {dtype}, first {cast[0]}", file=sys.stderr, flush=True)
    total = sum(parameter.nbytes for stage in stages for parameter in stage.parameters())
    progress = Progress("import", total)
    strategy = StreamingSave(HFSource(folder, warn=reads_first).piece, progress.add)
    with contextlib.redirect_stdout(io.StringIO()):
        save_checkpoint(0, stages, None, None, 0, {"save_strategy": strategy}, release=True)
    progress.close()


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's model, whole, in this process; `args` are the session's, with the checkpoint's model arguments."""

    stages: list
    args: argparse.Namespace
    config: object

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.stages[0].parameters()).dtype


def load_megatron(
    checkpoint: str | Path, reference: HFFolder, device: str = "cpu", iteration: int | None = None
) -> LoadedCheckpoint:
    """Start a session and load a run's checkpoint into it, without optimizer state. Ends with `end_session`.

    Args:
        iteration: default: the newest.

    Raises:
        ValueError: no checkpoint, or one of another model than `reference`.
    """
    saved = _arguments_of(checkpoint, reference, iteration)
    arguments = [
        *hf_session_arguments(reference, saved.params_dtype), "--device", device,
        "--rotary-base", str(saved.rotary_base), "--max-position-embeddings", str(saved.max_position_embeddings),
        "--seq-length", str(saved.max_position_embeddings),
        # The run's own scaling or none: the reference's counts for nothing here, and the last one given counts.
        "--rope-parameters", getattr(saved, "rope_parameters", None) or '{"rope_type": "default"}',
        "--load", str(checkpoint), "--ckpt-format", "torch_dist", "--exit-on-missing-checkpoint",
    ]  # fmt: skip
    arguments += [] if iteration is None else ["--ckpt-step", str(iteration)]
    arguments += ["--loss-implementation", "unfused"] if saved.params_dtype == torch.float16 else []
    args, config = start_session(arguments)
    stages = build_stages(config, args)
    with contextlib.redirect_stdout(io.StringIO()):
        load_checkpoint(stages, None, None)
    return LoadedCheckpoint(stages, args, config)


def _arguments_of(checkpoint: str | Path, reference: HFFolder, iteration: int | None) -> argparse.Namespace:
    """The saved arguments, of the same model as `reference`."""
    saved = saved_arguments(checkpoint_folder(checkpoint, iteration))
    expected = reference.dimensions()
    for name in ("hidden_size", "num_layers", "num_attention_heads"):
        if getattr(saved, name) != getattr(expected, name):
            raise ValueError(
                f"--checkpoint {checkpoint} has {name} {getattr(saved, name)}, the Hugging Face folder "
                f"{reference.path} {getattr(expected, name)}: they are different models"
            )
    return saved


@_old_objects_aside()
def export_hf(
    checkpoint: str | Path,
    hf_reference: str | Path,
    output: str | Path,
    max_shard_bytes: float = 5e9,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    yarn_factor: float | None = None,
) -> None:
    """Write a run's checkpoint as a Hugging Face folder, with the RoPE and window it was trained at.

    Every rank of the job calls it; they share the tensors. Optimizer state is not read. Memory: the largest tensor a
    few times, on every rank.

    Args:
        hf_reference: the folder that the model came from: its config, tokenizer and generation config are taken over.
        iteration: default: the newest.
        dtype: default: as in the checkpoint.
        yarn_factor: declare the model good for so many times its window, by YaRN.

    Raises:
        ValueError: no checkpoint, another model, `output` exists, or the device is full.
    """
    refuse_existing(Path(output))
    reference = HFFolder(hf_reference)
    reference.check_tokenizer()
    saved = _arguments_of(checkpoint, reference, iteration)
    model = TorchDistModel(checkpoint_folder(checkpoint, iteration), reference.dimensions())
    dtype = dtype or model.dtype("embedding.word_embeddings.weight")
    base, scaling, length = rope_of_run(saved, reference)
    if yarn_factor is not None:
        scaling, length = with_yarn(scaling, length, yarn_factor)

    def read(mapped):
        tensors = model.hf_tensors(mapped, dtype)
        for name, tensor in zip(mapped.hf_names, tensors, strict=True):
            warn_unless_finite(name, tensor)
        return tensors

    sources = [Source(model.specs(mapped, dtype), functools.partial(read, mapped)) for mapped in model.tensors()]
    config = exported_config(reference.config, base, scaling, length, dtype)
    with _ranks():
        write_hf_folder(output, sources, config, hf_reference, max_shard_bytes)


def rope_of_run(saved: argparse.Namespace, reference: HFFolder) -> tuple[float, dict | None, int]:
    """Base, scaling in Hugging Face's schema and window of a run."""
    typed = getattr(saved, "rope_parameters", None)
    rope = RopeConfig(
        reference.dimensions().head_dim,
        float(saved.rotary_base),
        json.loads(typed) if typed else None,
        saved.max_position_embeddings,
    )
    return rope.base, rope.exported_scaling(), saved.max_position_embeddings


@contextlib.contextmanager
def _ranks() -> Iterator[None]:
    """The ranks that torchrun started, if it did and nobody else joined them."""
    joined = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if joined:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if joined:
            dist.destroy_process_group()


def different_tensors(
    hf: str | Path, checkpoint: str | Path, iteration: int | None = None, dtype: torch.dtype | None = None
) -> tuple[int, list[str]]:
    """Compare every tensor of a checkpoint with a Hugging Face folder, bit by bit, one in memory at a time.

    Args:
        iteration: default: the newest.
        dtype: cast both to it first; default: as they are stored, so that another dtype is a difference.

    Returns:
        number of tensors compared, names of those that differ (Hugging Face names).
    """
    folder = HFFolder(hf)
    folder.check()
    _arguments_of(checkpoint, folder, iteration)
    model = TorchDistModel(checkpoint_folder(checkpoint, iteration), folder.dimensions())

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for mapped in model.tensors():
            for name, tensor in zip(mapped.hf_names, model.hf_tensors(mapped), strict=True):
                yield name, tensor, folder.tensor(name)

    return _compare(pairs(), dtype)


def different_folders(left: str | Path, right: str | Path, dtype: torch.dtype | None = None) -> tuple[int, list[str]]:
    """As `different_tensors`, of two Hugging Face folders of the same model."""
    first, second = HFFolder(left), HFFolder(right)
    first.check()
    second.check()
    if first.dimensions() != second.dimensions():
        raise ValueError(f"{left} and {right} are different models: {first.dimensions()}, {second.dimensions()}")
    names = [name for mapped in entries(first.dimensions()) for name in mapped.hf_names]
    return _compare(((name, first.tensor(name), second.tensor(name)) for name in names), dtype)


def _compare(pairs: Iterator[tuple[str, Tensor, Tensor]], dtype: torch.dtype | None) -> tuple[int, list[str]]:
    compared, different = 0, []
    for name, left, right in pairs:
        compared += 1
        if not bitwise_equal(left.to(dtype or left.dtype), right.to(dtype or right.dtype)):
            different.append(name)
    return compared, different
