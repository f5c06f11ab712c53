"""Death of a process in the middle of a write, as by SIGKILL or a power cut: nothing is flushed, nothing cleans up."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import megatron_rpsd.data.indexed as indexed
import megatron_rpsd.data.shards as shards

_KILLED = 9


def contents(prefix: Path) -> dict[str, bytes]:
    """The bytes of P.*, by suffix."""
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}.*")}


def die_at(step: int, run: Callable[[], None]) -> bool:
    """Runs in a forked process that dies at its write number `step`; False where the run ends before that.

    Writes are: tokens added to a shard or to the output (half of them reach the file), and every fsync, rename,
    removal and new folder.
    """
    child = os.fork()
    if not child:
        try:
            _arm(step)
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _KILLED), f"the run failed by itself: {code}"
    return code == _KILLED


def _arm(step: int) -> None:
    left = [step]

    def counted(call: Callable, half: Callable | None = None) -> Callable:
        def wrapped(*arguments, **named):
            if not left[0]:
                if half is not None:
                    half(*arguments)
                os._exit(_KILLED)
            left[0] -= 1
            return call(*arguments, **named)

        return wrapped

    def torn(writer, content) -> None:
        raw = content if isinstance(content, bytes) else content.tobytes()
        writer._file.write(raw[: len(raw) // 2])
        writer._file.flush()

    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    shards.ShardWriter.add = counted(shards.ShardWriter.add, torn)
    indexed._HashedOutput.write = counted(indexed._HashedOutput.write, torn)
