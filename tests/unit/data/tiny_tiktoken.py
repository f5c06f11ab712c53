"""A tiktoken file in which every byte is a token: it loads without transformers, so a process starts at once."""

from __future__ import annotations

import base64
from pathlib import Path

PATTERN = r"\w+|\W+"
EOD = 256


def save_tiktoken(path: Path) -> Path:
    """Ids are the bytes' values, the end token is 256."""
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)))
    return path


def ids_of(text: str) -> list[int]:
    """The tokens of a text by definition: its UTF-8 bytes and the end token."""
    return [*text.encode(), EOD]
