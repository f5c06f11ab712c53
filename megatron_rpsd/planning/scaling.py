"""Predicted step time, memory and MFU over numbers of GPUs and sequence lengths, a view pair against one view."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_rpsd.planning.gpus import GPU, Assumptions
from megatron_rpsd.planning.known_models import PlannedModel
from megatron_rpsd.planning.layout_search import Plan, search
from megatron_rpsd.planning.layouts import Workload

GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
LENGTHS = (65536, 131072, 262144, 524288, 1048576)
_GIB = 2**30


@dataclass(frozen=True)
class ScalingRow:
    """One number of GPUs at one length; a plan is None where no layout fits."""

    length: int
    gpus: int
    batch: int
    rpsd: Plan | None
    clm: Plan | None

    @property
    def ratio(self) -> float | None:
        """Step time of RPSD over CLM, each at its own best layout."""
        return self.rpsd.time.total / self.clm.time.total if self.rpsd and self.clm else None


def scaling_rows(
    model: PlannedModel,
    workload: Callable[[int], Workload],
    gpu: GPU,
    assumptions: Assumptions,
    lengths: Sequence[int] = LENGTHS,
    counts: Sequence[int] = GPU_COUNTS,
) -> list[ScalingRow]:
    """The fastest layout that fits, for every length and number of GPUs; `workload` makes a step of a length."""
    rows = []
    for length in lengths:
        work = dataclasses.replace(workload(length), objective="rpsd")
        alone = dataclasses.replace(work, objective="standard")
        for gpus in counts:
            best = [search(model, each, gpus, gpu, assumptions).chosen for each in (work, alone)]
            rows.append(ScalingRow(length, gpus, work.global_batch_size, *best))
    return rows


def scaling_markdown(rows: Sequence[ScalingRow], model: PlannedModel, gpu: GPU, assumptions: Assumptions) -> str:
    """A table of predictions, marked so, with what was assumed above it."""
    said = "\n".join(f"- {line}" for line in assumptions.describe(gpu))
    lines = [
        f"# {model.name} on {gpu.name}: predicted step time, memory and MFU\n",
        "Predictions of `tools/plan_scaling.py`; nothing here was measured. Each row has the fastest layout that fits, "
        "for RPSD (a view pair, shared prefix, mean over splits) and for CLM (one view). MFU counts the operations "
        "that the objective needs, recomputation left out. `-`: no layout fits.\n",
        f"{said}\n",
        "| tokens | GPUs | sequences a step | RPSD layout | GiB | step s | MFU | CLM step s | CLM MFU | RPSD / CLM |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row.length // 1024}K", str(row.gpus), str(row.batch)]
        if row.rpsd is None:
            cells += ["-"] * 4
        else:
            plan = row.rpsd
            cells += [plan.layout.name, f"{plan.memory.total / _GIB:.0f}"]
            cells += [f"{plan.time.total:.1f}", f"{plan.time.mfu:.0%}"]
        cells += ["-", "-"] if row.clm is None else [f"{row.clm.time.total:.1f}", f"{row.clm.time.mfu:.0%}"]
        cells.append("-" if row.ratio is None else f"{row.ratio:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def scaling_series(rows: Sequence[ScalingRow]) -> dict[str, dict[str, dict[int, float]]]:
    """Panels of `report.plan_figures.scaling_curves`: one line a length, over GPUs."""
    quantities: dict[str, Callable[[ScalingRow], float | None]] = {
        "RPSD step time, s": lambda row: row.rpsd and row.rpsd.time.total,
        "memory of the fullest rank, GiB": lambda row: row.rpsd and row.rpsd.memory.total / _GIB,
        "RPSD MFU, %": lambda row: row.rpsd and 100 * row.rpsd.time.mfu,
        "step time, RPSD / CLM": lambda row: row.ratio,
    }
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for label, read in quantities.items():
        panels[label] = {}
        for row in rows:
            series = panels[label].setdefault(f"{row.length // 1024}K tokens", {})
            value = read(row)
            if value is not None:
                series[row.gpus] = value
    return panels
