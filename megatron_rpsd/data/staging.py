"""A folder to write in before renaming, so that an interrupted or failed run leaves nothing half-written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder on `target`'s file system, removed on exit; rename what is finished out of it.

    It lies in the nearest ancestor of `target` that exists, so that a failed run does not leave new parents either;
    after a run that reaches the end without an exception the caller has made `target.parent` itself.
    Raises ValueError when that ancestor is not a folder.
    """
    ancestor = target.absolute().parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise ValueError(f"cannot write {target}: {ancestor} is not a folder")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=ancestor) as folder:
        yield Path(folder)
