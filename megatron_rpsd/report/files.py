"""Writing results so that no half of one is ever found under its name."""

from __future__ import annotations

import json
from pathlib import Path


def write_json(path: str | Path, value: object) -> None:
    """`value` as JSON at `path`, written aside and renamed; folders above it are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)
