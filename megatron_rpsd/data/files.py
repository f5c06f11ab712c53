"""Writing results so that no half of one is ever found under its name."""

from __future__ import annotations

import json
from pathlib import Path


def replace_file(path: str | Path, content: bytes) -> None:
    """`content` at `path`, written aside and renamed; folders above it are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def write_json(path: str | Path, value: object) -> None:
    """`value` as JSON, as `replace_file` writes."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())
