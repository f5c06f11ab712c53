"""What ranks of the pool run for distillation: whole runs with the teacher watched, caches, many refusals at once."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_rpsd.training import cache_writing
from megatron_rpsd.training.teacher import LiveTeacher
from megatron_rpsd.training.teacher_cache import MANIFEST
from tests.distributed import training_job


def _random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]


def watched(arguments: list[str]) -> dict:
    """A run through the training entry, and what became of its teacher."""
    seen = {}
    start = LiveTeacher.start

    def watched_start(teacher: LiveTeacher) -> None:
        before = [state.clone() for state in _random_states()]
        start(teacher)
        pairs = zip(before, _random_states(), strict=True)
        seen["random_state_kept"] = all(torch.equal(old, new) for old, new in pairs)
        seen["model"] = teacher.model
        seen["loaded"] = {name: value.clone() for name, value in teacher.model.named_parameters()}

    LiveTeacher.start = watched_start
    output = training_job.train(arguments)
    LiveTeacher.start = start
    now = dict(seen["model"].named_parameters())
    return {
        "output": output,
        "random_state_kept": seen["random_state_kept"],
        "changed": [name for name, value in seen["loaded"].items() if not torch.equal(value, now[name])],
        "with_gradient": [
            name
            for name, value in now.items()
            if value.requires_grad or value.grad is not None or hasattr(value, "main_grad")
        ],
        "dtypes": {value.dtype for value in now.values()},
        "training": seen["model"].training,
        "shapes": {name: tuple(value.shape) for name, value in now.items()},
    }


def write_cache(output: Path, arguments: list[str], per_file: int) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return cache_writing.cache_teacher(output, arguments, per_file)


def refusals(cases: dict[str, list[str]]) -> dict[str, tuple[int | None, str]]:
    """Exit code and standard error of many command lines, one after the other."""
    return {name: training_job.refused(arguments) for name, arguments in cases.items()}


def changed_manifest(cache: Path, copy: Path, **changes) -> Path:
    """A cache that says other things of itself."""
    copy.mkdir()
    held = json.loads((cache / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**held, **changes}))
    for tar in cache.glob("*.tar"):
        (copy / tar.name).write_bytes(tar.read_bytes())
    return copy
