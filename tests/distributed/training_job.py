"""Whole training runs and refused command lines, on ranks of the pool."""

from __future__ import annotations

import contextlib
import io
import sys

from megatron_rpsd.training import main as entry
from megatron_rpsd.training.session import end_session, start_session


@contextlib.contextmanager
def _argv(arguments: list[str]):
    before = sys.argv
    sys.argv = ["main", *arguments]
    try:
        yield
    finally:
        sys.argv = before


def train(arguments: list[str]) -> str:
    """Run the entry point as torchrun would; the rank's standard output."""
    output = io.StringIO()
    try:
        with _argv(arguments), contextlib.redirect_stdout(output):
            entry.main()
    except SystemExit as left:  # how Megatron ends a run at --exit-interval
        assert not left.code, left.code
    finally:
        end_session()
    return output.getvalue()


def settled_arguments(arguments: list[str]) -> dict:
    """Arguments as a run would have them, checkpoint's and typed ones settled."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            settled = vars(start_session(arguments)[0])
        return {name: settled[name] for name in ("max_position_embeddings", "rotary_base")}
    finally:
        end_session()


def refused(arguments: list[str]) -> tuple[int | None, str]:
    """Exit code and standard error of a command line that should be refused."""
    errors, code = io.StringIO(), None
    try:
        with _argv(arguments), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            entry.main()
    except SystemExit as left:
        code = left.code
    finally:
        end_session()
    return code, errors.getvalue()
