"""What ranks run for packed documents."""

from __future__ import annotations

from tests.distributed.training_job import refused


def all_refused(lines: list[list[str]]) -> list[tuple[int | None, str]]:
    """Exit code and standard error of every command line, one after the other."""
    return [refused(arguments) for arguments in lines]
