"""What a checkpoint's files held when they were written; the file that says so comes last, as the mark of the end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKSUMS = "checksums.json"


def file_sum(path: Path) -> dict:
    """{"bytes": size, "sha256": hexadecimal digest} of a file as it is on the disk now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def file_sums(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """The sums of files of a folder; reading and hashing go on in several threads."""
    names = sorted(names)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(file_sum, (folder / name for name in names)), strict=True))


def write_checksums(folder: Path, sums: dict[str, dict]) -> None:
    """Write CHECKSUMS, durably, whole or not at all."""
    partial = folder / f".{CHECKSUMS}"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(sums, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / CHECKSUMS)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete(folder: Path) -> bool:
    """Whether the folder's writing came to its end."""
    return (folder / CHECKSUMS).is_file()


def damage(folder: Path) -> str | None:
    """What is wrong with a complete checkpoint's files, or None. Sizes are looked at before any file is read."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in sums.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    for name, (size, _) in sorted(wanted.items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    try:
        found = file_sums(folder, wanted)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for name, (_, digest) in sorted(wanted.items()):
        if found[name]["sha256"] != digest:
            return f"{name} is not what was written: sha256 {found[name]['sha256'][:12]}, was {digest[:12]}"
    return None
