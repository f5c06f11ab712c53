"""Which checkpoint of a folder is meant, and the arguments of the run that wrote it, without building a model."""

from __future__ import annotations

import argparse
import pickle
import warnings
from pathlib import Path

from megatron.core.dist_checkpointing import load_common_state_dict
from torch.distributed.checkpoint.api import CheckpointException

_TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint_folder(checkpoint: str | Path, iteration: int | None = None, flag: str = "--checkpoint") -> Path:
    """The folder of one checkpoint of a run: of `iteration`, or the newest, as the tracker file names it.

    `flag` is the one that `checkpoint` was typed for.

    Raises:
        ValueError: there is no such checkpoint.
    """
    checkpoint = Path(checkpoint)
    tracker = checkpoint / _TRACKER
    if not tracker.exists():
        raise ValueError(f"{flag} {checkpoint} holds no {_TRACKER}, so it is no Megatron checkpoint folder")
    newest = tracker.read_text().strip()
    if iteration is not None:
        folder = checkpoint / f"iter_{iteration:07d}"
        if not (folder / "metadata.json").exists():
            whole = sorted(path.parent.name for path in checkpoint.glob("*/metadata.json"))
            raise ValueError(
                f"--iteration {iteration}: {flag} {checkpoint} has no complete {folder.name}; it has "
                f"{', '.join(whole) or 'none'}"
            )
        return folder
    folder = checkpoint / (newest if newest == "release" else f"iter_{int(newest):07d}")
    if not (folder / "metadata.json").exists():
        raise ValueError(f"{flag} {checkpoint}: {tracker.name} names {folder.name}, which is not complete")
    return folder


def saved_arguments(folder: Path) -> argparse.Namespace:
    """Megatron's arguments of the run that wrote a checkpoint.

    Raises:
        ValueError: its files are damaged.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads it, as meant
        try:
            return load_common_state_dict(str(folder))["args"]
        except (CheckpointException, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{folder}: the checkpoint is damaged; its arguments cannot be read") from error
