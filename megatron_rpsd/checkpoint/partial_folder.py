"""A folder that appears whole or not at all, for one process and for all ranks of a job.

It is filled under another name beside its final place, forced to the disk and renamed. A lock tells a live writer from
what a killed one left behind, and the next conversion to the same place removes the latter.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_REASONS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EFBIG: "the file system takes no files of this size",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EIO: "the device reports an input/output error",
}


@contextlib.contextmanager
def partial_folder(output: str | Path) -> Iterator[Path]:
    """Yield the folder to fill; it becomes `output` when the block ends, and vanishes when the block raises.

    In a job of several ranks (torch.distributed initialised) all of them enter: rank 0 makes and ends the folder, and
    what fails on one rank fails on all, so that none waits for ever. A killed job leaves `.NAME.partial-*` and a lock.

    Raises:
        ValueError: `output` exists, or the device refuses (full, read-only, no permission): one line.
    """
    output = Path(output)
    refuse_existing(output)
    with contextlib.ExitStack() as stack:
        partial = lock = failure = None
        try:
            if rank() == 0:
                output.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(output)
                partial, lock = _locked_folder(output)
                stack.callback(_remove, partial, lock)
        except OSError as error:
            failure = error
        _agree(failure, output)
        partial = _from_rank_0(partial)
        try:
            yield partial
            _sync_files(partial)
        except BaseException as error:  # an interrupt too: siblings must hear of it
            failure = error
        _agree(failure, output)
        try:
            if rank() == 0:
                refuse_existing(output)
                _sync_tree(partial)
                partial.rename(output)
                _sync(output.parent)
        except (OSError, ValueError) as error:
            failure = error
        _agree(failure, output)


def refuse_existing(output: Path) -> None:
    """Raise ValueError when something of that name is there."""
    if output.exists() or output.is_symlink():
        raise ValueError(f"--output {output} exists already; name a new folder, or remove that one first")


def remove_leftovers(output: Path) -> None:
    """Remove partial folders for `output` whose writers are dead; their locks are free."""
    for lock_path in sorted(output.parent.glob(f".{glob.escape(output.name)}.partial-*.lock")):
        with contextlib.suppress(FileNotFoundError):  # its writer has just ended
            descriptor = os.open(lock_path, os.O_RDWR)
            try:
                if _try_lock(descriptor):
                    shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
                    lock_path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def rank() -> int:
    """This process's rank; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Ranks of the job; 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _locked_folder(output: Path) -> tuple[Path, tuple[Path, int]]:
    """A new folder and the lock beside it, held until its descriptor is closed or this process dies."""
    while True:
        partial = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:12]}"
        lock_path = partial.with_name(partial.name + ".lock")
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        # Between these lines another conversion may take the lock for a dead one's, and remove it.
        held = _try_lock(descriptor, say=True) and lock_path.exists()
        if held:
            try:
                partial.mkdir()
            except OSError:
                lock_path.unlink(missing_ok=True)
                raise
            return partial, (lock_path, descriptor)
        os.close(descriptor)


def _try_lock(descriptor: int, say: bool = False) -> bool:
    """Whether the lock was free. Where a file system has no locks, a writer says so and no leftovers are removed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        if say:
            print(
                "warning: this file system has no locks; a conversion that is killed leaves a partial folder for good",
                file=sys.stderr,
            )
        return say
    return True


def _remove(partial: Path, lock: tuple[Path, int]) -> None:
    """End a partial folder: after the rename only the lock is left of it."""
    shutil.rmtree(partial, ignore_errors=True)
    lock[0].unlink(missing_ok=True)
    os.close(lock[1])


def _agree(failure: BaseException | None, output: Path) -> None:
    """Raise on every rank when one failed: this rank's own error, or the first other's."""
    if isinstance(failure, OSError) and failure.errno in _REASONS:
        failure = ValueError(f"--output {output}: {_REASONS[failure.errno]}; nothing is left there")
    if world_size() > 1:
        told: list[tuple[bool, str] | None] = [None] * world_size()
        mine = None if failure is None else (isinstance(failure, ValueError), str(failure) or type(failure).__name__)
        dist.all_gather_object(told, mine)
        for index, other in enumerate(told):
            if failure is None and other is not None:
                users, text = other
                failure = ValueError(text) if users else RuntimeError(f"rank {index} failed: {text}")
    if failure is not None:
        raise failure


def _from_rank_0(partial: Path | None) -> Path:
    if world_size() == 1:
        return partial
    box = [partial]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_files(folder: Path) -> None:
    """Force the files to the disk, on every rank: on a network file system each machine holds what it wrote."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync(path)


def _sync_tree(folder: Path) -> None:
    """Force the entries of all folders to the disk."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync(path)
