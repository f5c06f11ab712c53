"""The checks by name; a check is a function that asserts."""

from __future__ import annotations

from collections.abc import Callable

import torch

CHECKS: dict[str, Callable[[], None]] = {}
CPU = torch.device("cpu")


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Register `function`, to run once the CPU runtime is installed."""
    assert function.__name__ not in CHECKS
    CHECKS[function.__name__] = function
    return function


def is_on_the_cpu(tensor: torch.Tensor, *shape: int) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device == CPU and tuple(tensor.shape) == shape
