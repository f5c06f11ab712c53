"""All layouts of a run on a number of GPUs, with memory and time; which fit, and what would help if none does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rpsd.planning.gpus import DEFAULTS, GPU, GPUS, Assumptions
from megatron_rpsd.planning.known_models import PlannedModel
from megatron_rpsd.planning.layouts import RECOMPUTATIONS, Layout, Workload, every_layout, refusal
from megatron_rpsd.planning.memory import Memory, peak_memory
from megatron_rpsd.planning.roofline import StepTime, step_time

_GIB = 2**30
_TOKENS_A_STEP = 2**22  # ProLong's 64K stage, arXiv 2410.02660


@dataclass(frozen=True)
class Plan:
    """A layout with what it takes."""

    layout: Layout
    memory: Memory
    time: StepTime
    capacity: int

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's peak is within the GPU's memory."""
        return self.memory.total <= self.capacity


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        plans: of all layouts that may run, those that fit first, the fastest first.
        refused: (layout, reason) of all others, without regard to recomputation.
    """

    plans: tuple[Plan, ...]
    refused: tuple[tuple[Layout, str], ...]

    @property
    def chosen(self) -> Plan | None:
        """The fastest that fits."""
        return self.plans[0] if self.plans and self.plans[0].fits else None


def default_global_batch_size(length: int) -> int:
    """Sequences of a step of 4M tokens (ProLong, arXiv 2410.02660), at least one."""
    return max(1, _TOKENS_A_STEP // length)


def search(
    model: PlannedModel, work: Workload, gpus: int, gpu: GPU, assumptions: Assumptions = DEFAULTS,
    recomputations: Sequence[str] = RECOMPUTATIONS,
) -> Search:  # fmt: skip
    """Every layout of `gpus` GPUs.

    Raises:
        ValueError: a number below 1.
    """
    for flag, value in (
        ("--gpus", gpus), ("--seq-length", work.length), ("--global-batch-size", work.global_batch_size)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{flag} {value} must be at least 1")
    plans, refused = [], []
    for layout in every_layout(gpus):
        reason = refusal(layout, model.dims, work)
        if reason is not None:
            refused.append((layout, reason))
            continue
        for recompute in recomputations:
            candidate = dataclasses.replace(layout, recompute=recompute)
            memory = peak_memory(model.dims, candidate, work, gpu, assumptions)
            time = step_time(model, candidate, work, gpu, assumptions)
            plans.append(Plan(candidate, memory, time, gpu.memory_bytes))
    plans.sort(key=lambda plan: (not plan.fits, plan.time.total if plan.fits else plan.memory.total))
    return Search(tuple(plans), tuple(refused))


def nothing_fits(
    found: Search, model: PlannedModel, work: Workload, gpus: int, gpu: GPU, assumptions: Assumptions
) -> str:
    """One line: the smallest shortfall or the reason of refusal, and which changes, tried one by one, would help."""
    run = f"{model.name} at {work.length} tokens on {gpus} x {gpu.name}"
    if not found.plans:
        problem = f"no layout of {run} may run; the {len(found.refused)} are refused, first {found.refused[0][0].name}"
        problem = problem.removesuffix(" none") + f": {found.refused[0][1]}"
    else:
        nearest = found.plans[0]
        short = (nearest.memory.total - nearest.capacity) / _GIB
        largest = max(nearest.memory.items, key=nearest.memory.items.get)
        problem = (
            f"nothing fits {run}: the nearest, {nearest.layout.name}, needs {nearest.memory.total / _GIB:.1f} GiB of "
            f"{nearest.capacity / _GIB:.1f}, {short:.1f} too many (most: {largest}, "
            f"{nearest.memory.items[largest] / _GIB:.1f})"
        )
    helpful = list(_what_helps(model, work, gpus, gpu, assumptions))
    if not helpful:
        helpful = ["a shorter --seq-length"] if found.plans else ["another --gpus, such as a multiple of 8"]
    return f"{problem}; what would help: {', or '.join(helpful)}"


def _what_helps(model: PlannedModel, work: Workload, gpus: int, gpu: GPU, assumptions: Assumptions):
    """Changes after which a layout fits."""

    def fits(work: Workload = work, gpus: int = gpus, gpu: GPU = gpu) -> bool:
        return search(model, work, gpus, gpu, assumptions, ("full",)).chosen is not None

    if work.optimizer_dtype == "fp32" and fits(dataclasses.replace(work, optimizer_dtype="bf16")):
        yield "--optimizer-states bf16"
    for batch in (2 * gpus, 4 * gpus, 8 * gpus):
        whole = -(-work.global_batch_size // batch) * batch
        if work.global_batch_size % gpus and fits(dataclasses.replace(work, global_batch_size=whole)):
            yield f"--global-batch-size {whole}"
            break
    for other in GPUS.values():
        if other.memory_bytes > gpu.memory_bytes and fits(gpu=other):
            yield f"--gpu {other.name}"
            break
    for more in (2, 4, 8, 16, 32):
        if fits(gpus=more * gpus):
            yield f"--gpus {more * gpus}"
            break
    if work.longce and fits(dataclasses.replace(work, longce=False)):
        yield "no --longce (pipelines are possible then)"


def plan_record(plan: Plan, work: Workload) -> dict:
    """A plan as JSON: degrees, flags, bytes, seconds."""
    layout, memory, time = plan.layout, plan.memory, plan.time
    return {
        "tensor_model_parallel_size": layout.tp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "data_parallel_size": layout.dp,
        "recompute": layout.recompute,
        "fits": plan.fits,
        "arguments": [*layout.arguments(), *work.arguments()],
        "memory_bytes": {
            "total": memory.total, "capacity": plan.capacity, "parameters": memory.parameters, "stage": memory.stage,
            "suffix_start": memory.suffix_start, "moment": memory.moment, "items": memory.items,
        },
        "step_seconds": {"total": time.total, "parts": time.parts, "micro_batches": time.micro_batches},
        "model_flops": time.model_flops,
        "link_bytes": time.link_bytes,
        "mfu": time.mfu,
        "tokens_per_s_per_gpu": time.tokens_per_gpu,
    }  # fmt: skip
