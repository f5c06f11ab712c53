"""Import, export and verify: a Hugging Face folder to a torch_dist checkpoint and back, on a CPU.

One process holds the model once, without parallelism; torch_dist checkpoints load at any tensor, pipeline and data
parallelism. Folders are written aside and renamed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.training.checkpointing import load_checkpoint, save_checkpoint

from megatron_rpsd.checkpoint.families import entries
from megatron_rpsd.checkpoint.families import hf_tensors as to_hf_tensors
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.hf_writer import exported_config, write_hf_folder
from megatron_rpsd.checkpoint.layouts import bitwise_equal
from megatron_rpsd.checkpoint.megatron_arguments import megatron_arguments
from megatron_rpsd.checkpoint.model_loading import full_tensors, load_hf_weights
from megatron_rpsd.training.session import build_stages, end_session, precision_arguments, start_session

_TRACKER = "latest_checkpointed_iteration.txt"


def model_dtype(folder: HFFolder) -> torch.dtype:
    """The dtype in which the folder stores its embedding, taken as the model's."""
    return folder.tensor(entries(folder.dimensions())[0].hf_names[0]).dtype


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


def import_hf(hf: str | Path, output: str | Path, device: str = "cpu") -> int:
    """Write a Hugging Face model as a torch_dist checkpoint that `--load` and `--pretrained-checkpoint` take.

    Its saved arguments describe the model, so that training needs only `--use-checkpoint-args` beside it.

    Returns:
        The number of parameters.

    Raises:
        ValueError: the folder is no model that converts, or `output` exists.
    """
    output, folder = Path(output), HFFolder(hf)
    if output.exists():
        raise ValueError(f"--output {output} exists already; name a new folder, or remove that one first")
    folder.check()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:12]}"
    length = str(folder.rope()[2])
    arguments = [*hf_session_arguments(folder), "--device", device, "--seq-length", length]
    try:
        args, config = start_session(
            [*arguments, "--save", str(partial), "--save-interval", "1", "--ckpt-format", "torch_dist"]
        )
        stages = build_stages(config, args)
        load_hf_weights(stages, folder, tp_size=1, tp_rank=0, padded_vocab_size=args.padded_vocab_size)
        args.seq_length = None  # a choice of the run, not of the model: --use-checkpoint-args shall not bring it back
        with contextlib.redirect_stdout(io.StringIO()):
            save_checkpoint(0, stages, None, None, 0, release=True)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        end_session()
    return sum(parameter.numel() for stage in stages for parameter in stage.parameters())


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """The folder of the newest checkpoint of a run, as its tracker file names it.

    Raises:
        ValueError: there is no checkpoint.
    """
    checkpoint = Path(checkpoint)
    tracker = checkpoint / _TRACKER
    if not tracker.exists():
        raise ValueError(f"--checkpoint {checkpoint} holds no {_TRACKER}, so it is no Megatron checkpoint folder")
    newest = tracker.read_text().strip()
    folder = checkpoint / (newest if newest == "release" else f"iter_{int(newest):07d}")
    if not (folder / "metadata.json").exists():
        raise ValueError(f"--checkpoint {checkpoint}: {tracker.name} names {folder.name}, which is not complete")
    return folder


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


def load_megatron(checkpoint: str | Path, reference: HFFolder, device: str = "cpu") -> LoadedCheckpoint:
    """Start a session and load a run's newest checkpoint into it, without optimizer state. Ends with `end_session`.

    Raises:
        ValueError: no checkpoint, or one of another model than `reference`.
    """
    folder = checkpoint_folder(checkpoint)
    saved = load_common_state_dict(str(folder))["args"]
    expected = reference.dimensions()
    for name, value in (("hidden_size", expected.hidden_size), ("num_layers", expected.num_layers)):
        if getattr(saved, name) != value:
            raise ValueError(
                f"--checkpoint {checkpoint} has {name} {getattr(saved, name)}, "
                f"the Hugging Face folder {reference.path} {value}: they are different models"
            )
    arguments = [
        *hf_session_arguments(reference, saved.params_dtype), "--device", device,
        "--rotary-base", str(saved.rotary_base), "--max-position-embeddings", str(saved.max_position_embeddings),
        "--seq-length", str(saved.max_position_embeddings),
        # The run's own scaling or none: the reference's counts for nothing here, and the last one given counts.
        "--rope-parameters", getattr(saved, "rope_parameters", None) or '{"rope_type": "default"}',
        "--load", str(checkpoint), "--ckpt-format", "torch_dist", "--exit-on-missing-checkpoint",
    ]  # fmt: skip
    args, config = start_session(arguments)
    stages = build_stages(config, args)
    with contextlib.redirect_stdout(io.StringIO()):
        load_checkpoint(stages, None, None)
    return LoadedCheckpoint(stages, args, config)


def export_hf(
    checkpoint: str | Path,
    hf_reference: str | Path,
    output: str | Path,
    device: str = "cpu",
    max_shard_bytes: float = 5e9,
) -> None:
    """Write the newest checkpoint of a run as a Hugging Face folder, with the RoPE and window it was trained at.

    Args:
        hf_reference: the folder that the model came from: its config, tokenizer and generation config are taken over.

    Raises:
        ValueError: no checkpoint, another model, or `output` exists.
    """
    reference = HFFolder(hf_reference)
    if Path(output).exists():
        raise ValueError(f"--output {output} exists already; name a new folder, or remove that one first")
    dims = reference.dimensions()
    loaded = load_megatron(checkpoint, reference, device)
    try:
        rope = loaded.config.rope
        config = exported_config(
            reference.config, rope.base, rope.exported_scaling(), loaded.args.max_position_embeddings, loaded.dtype
        )
        write_hf_folder(
            output, to_hf_tensors(full_tensors(loaded.stages, dims), dims), config, hf_reference, max_shard_bytes
        )
    finally:
        end_session()


def different_tensors(hf: str | Path, checkpoint: str | Path, device: str = "cpu") -> tuple[int, list[str]]:
    """Compare every tensor of a checkpoint with a Hugging Face folder, bit by bit.

    Returns:
        number of tensors compared, names of those that differ (Hugging Face names).
    """
    folder = HFFolder(hf)
    dims = folder.dimensions()
    loaded = load_megatron(checkpoint, folder, device)
    try:
        compared, different = 0, []
        for name, tensor in to_hf_tensors(full_tensors(loaded.stages, dims), dims):
            compared += 1
            if not bitwise_equal(tensor.contiguous(), folder.tensor(name)):
                different.append(name)
        return compared, different
    finally:
        end_session()
