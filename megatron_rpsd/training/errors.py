"""Bad input ends a command with one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Print one line on stderr (once per job: rank 0 only) and exit with code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a ValueError, which is what a user can set wrong, into one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        fail(str(error))


def quiet_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make `parser` report errors in one line; Megatron's usage alone is a thousand lines."""
    parser.error = fail
    return parser
