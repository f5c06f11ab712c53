"""How far a conversion is: bytes and rate, as a bar on a terminal and as a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from megatron_rpsd.checkpoint.partial_folder import rank


class Progress:
    """Counts bytes; rank 0 shows its own share on stderr, the others are silent.

    Args:
        what: the verb, e.g. "import".
        seconds: between two lines when stderr is not a terminal. The first comes after that time, so that a conversion
            of a moment says nothing.
    """

    def __init__(self, what: str, total_bytes: int = 0, seconds: float = 5.0) -> None:
        self.what, self.total, self.seconds = what, total_bytes, seconds
        self.done = 0
        self.started = self.said = time.monotonic()
        shown = rank() == 0 and sys.stderr.isatty()
        self.bar = tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, leave=False) if shown else None

    def add(self, count: int) -> None:
        """`count` more bytes are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
            return
        now = time.monotonic()
        if rank() == 0 and now - self.said >= self.seconds:
            self.said = now
            rate = self.done / (now - self.started)
            print(
                f"{self.what}: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
