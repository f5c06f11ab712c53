"""Many windows under many views: a probe in each of a few processes, windows handed out one at a time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from megatron_rpsd.evaluation.probe import ParallelLayout, ProbeResult
from megatron_rpsd.positions import View

# One model in each worker process, loaded with the first window that it gets.
_loaded: dict = {}


def probe_windows(
    hf: str, windows: np.ndarray, views: Sequence[View], processes: int, execution: str = "shared-prefix"
) -> Iterator[list[ProbeResult]]:
    """Losses of every window under every view, in the order of the windows, each as soon as it is there.

    Every process holds the whole model; they divide the windows, so results do not depend on their number.
    OMP_NUM_THREADS in the environment gives the threads of each.

    Args:
        windows: int [N, L + 1]; the model reads the first L tokens, labels are the last L.
        views: the perturbed views.
        execution: shared-prefix (the suffix alone, each split below L) or full (a whole second view).

    Yields:
        for each window one result per view.
    """
    # spawn: the CPU runtime changes a process for good, and this one shall stay as it is.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_probe_window, *zip(*((hf, window, views, execution) for window in windows), strict=True))


def _probe_window(hf: str, window: np.ndarray, views: Sequence[View], execution: str) -> list[ProbeResult]:
    from megatron_rpsd.evaluation.probe import Probe
    from megatron_rpsd.training.main import choose_device

    if hf not in _loaded:
        choose_device(["--device", "cpu"])
        _loaded[hf] = Probe(hf, len(window) - 1, ParallelLayout())
    return [_loaded[hf](window, view, execution) for view in views]
