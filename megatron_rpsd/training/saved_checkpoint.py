"""Which checkpoint of a folder is meant, and the arguments of the run that wrote it, without building a model."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron.core.dist_checkpointing import load_common_state_dict
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rpsd.runs.checkpoints import TRACKER, iteration_folder

_UNREADABLE = (
    CheckpointException, OSError, RuntimeError, EOFError, LookupError, AttributeError, ImportError, TypeError,
    ValueError, pickle.UnpicklingError,
)  # fmt: skip
"""What torch and pickle raise on bytes that are not theirs."""


def checkpoint_folder(checkpoint: str | Path, iteration: int | None = None, flag: str = "--checkpoint") -> Path:
    """The folder of one checkpoint of a run: of `iteration`, or the newest, as the tracker file names it.

    `flag` is the one that `checkpoint` was typed for.

    Raises:
        ValueError: there is no such checkpoint.
    """
    checkpoint = Path(checkpoint)
    tracker = checkpoint / TRACKER
    if not tracker.exists():
        raise ValueError(f"{flag} {checkpoint} holds no {TRACKER}, so it is no Megatron checkpoint folder")
    newest = tracker.read_text(errors="replace").strip()
    if newest != "release" and not newest.isdecimal():
        raise ValueError(f"{flag} {checkpoint}: {tracker.name} is damaged; it names no iteration: {newest[:20]!r}")
    if iteration is not None:
        folder = iteration_folder(checkpoint, iteration)
        if not (folder / "metadata.json").exists():
            whole = sorted(path.parent.name for path in checkpoint.glob("*/metadata.json"))
            raise ValueError(
                f"--iteration {iteration}: {flag} {checkpoint} has no complete {folder.name}; it has "
                f"{', '.join(whole) or 'none'}"
            )
        return folder
    folder = checkpoint / newest if newest == "release" else iteration_folder(checkpoint, int(newest))
    if not (folder / "metadata.json").exists():
        raise ValueError(f"{flag} {checkpoint}: {tracker.name} names {folder.name}, which is not complete")
    return folder


def in_torch_format(checkpoint: str | Path) -> bool:
    """Whether the checkpoints are of --ckpt-format torch, a file a rank; Megatron's reader finds out by itself."""
    return any(Path(checkpoint).glob("iter_*/mp_rank_*"))


@contextlib.contextmanager
def read_alone() -> Iterator[None]:
    """Around a process's look into a checkpoint by itself: without torch's warning that it is alone, as it should."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def common_state(folder: Path) -> dict:
    """What a checkpoint holds beside tensors: `args`, Megatron's arguments of the run that wrote it, and more.

    Raises:
        ValueError: its files are damaged.
    """
    with read_alone():
        try:
            state = load_common_state_dict(str(folder))
            if "args" not in state:
                raise KeyError("args")
        except _UNREADABLE as error:
            raise ValueError(f"{folder}: the checkpoint is damaged; its arguments cannot be read") from error
    return state


def saved_arguments(folder: Path) -> argparse.Namespace:
    """Megatron's arguments of the run that wrote a checkpoint; see `common_state`."""
    return common_state(folder)["args"]


def check_tensors(folder: Path) -> None:
    """Refuse a checkpoint whose files are not there as its own metadata describe them: looked at, not read.

    Raises:
        ValueError: its metadata cannot be read, or a file is missing or breaks off.
    """
    try:
        places = FileSystemReader(folder).read_metadata().storage_data.values()
    except _UNREADABLE as error:
        raise ValueError(f"{folder}: the checkpoint is damaged; its .metadata cannot be read") from error
    needed: dict[str, int] = {}
    for place in places:
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for name, size in sorted(needed.items()):
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None or found < size:
            what = "is missing" if found is None else f"has {found} bytes and needs {size}"
            raise ValueError(f"{folder}: the checkpoint is damaged; its {name} {what}")


def check_start(args: argparse.Namespace) -> None:
    """Refuse a checkpoint to start from that is not there or not whole, before any process group is made.

    A --load without a checkpoint is a run's first start, which goes on from --pretrained-checkpoint.

    Raises:
        ValueError: one line with the flag and what is wrong.
    """
    if args.ckpt_format != "torch_dist":
        return
    for flag, path in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        if path is None or (flag == "--load" and not (Path(path) / TRACKER).exists()):
            continue
        if in_torch_format(path):
            return
        folder = checkpoint_folder(path, args.ckpt_step, flag)
        try:
            saved_arguments(folder)
            check_tensors(folder)
        except ValueError as error:
            raise ValueError(f"{flag} {path}: {error}") from error
        return
