"""A run's status as lines for a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator

from megatron_rpsd.runs.status import Status

_BAR = 30


def status_lines(status: Status, now: float | None = None) -> Iterator[str]:
    """The status in at most a screen; durations are rounded to their two largest units."""
    now = time.time() if now is None else now
    done = f"{status.iteration}" + (f" of {status.total} steps" if status.total else " steps")
    yield f"{status.run}: {status.state}, {done}"
    if status.total:
        filled = min(_BAR, _BAR * status.iteration // status.total)
        yield f"  [{'#' * filled}{'.' * (_BAR - filled)}] {100 * status.iteration / status.total:.1f}%"
    if status.rate is not None:
        tokens = "" if status.rate.tokens_per_s is None else f", {status.rate.tokens_per_s:,.0f} tokens/s"
        yield f"  rate        {status.rate.steps_per_s:.4g} steps/s{tokens} by the clock, over the newest steps"
    if status.ends is not None:
        yield f"  ends        in {duration(status.remaining_s)}, {_clock(status.ends)}"
    if status.step_age_s is not None and status.state not in ("finished", "never started"):
        yield f"  last sign   {duration(status.step_age_s)} ago"
    if status.checkpoint is None:
        yield "  checkpoint  none that is whole"
    else:
        yield f"  checkpoint  iteration {status.checkpoint}, {duration(status.checkpoint_age_s)} ago"
    for number, start in enumerate(status.starts, 1):
        origin = f" from iteration {start.iteration}" if start.iteration else ""
        ranks = f", {start.ranks} ranks" if start.ranks else ""
        yield f"  start {number:<5} {_clock(start.began)}{origin}{ranks}: {start.ended or 'no end so far'}"
    for name, value in status.logged.items():
        yield f"  {name:<24} {value:.6g}"
    for warning in status.warnings:
        yield f"  warning: {warning}"


def duration(seconds: float) -> str:
    """5 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    parts = []
    for name, size in units:
        count, whole = divmod(whole, size)
        parts.append((count, name))
    first = next((index for index, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {name}" for count, name in parts[first : first + 2] if count or first == len(parts) - 1)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
