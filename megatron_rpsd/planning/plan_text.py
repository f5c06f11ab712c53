"""A search's result for the terminal: the best layouts as a table, the chosen one as flags."""

from __future__ import annotations

import shlex
import textwrap
from collections import Counter

from megatron_rpsd.planning.gpus import GPUS_PER_NODE
from megatron_rpsd.planning.layout_search import Plan, Search
from megatron_rpsd.planning.layouts import Workload

_GIB = 2**30


def layout_table(plans: tuple[Plan, ...], rows: int) -> list[str]:
    """Lines of a table of the first `rows` plans."""
    lines = [
        f"{'TP':>3} {'CP':>4} {'PP':>3} {'DP':>4}  {'recompute':<10} {'GiB':>7} {'fits':>5} {'step s':>8} {'MFU':>6} "
        f"{'tokens/s/GPU':>13} {'exposed links':>14}"
    ]
    for plan in plans[:rows]:
        layout, time = plan.layout, plan.time
        links = sum(time.parts[name] for name in ("TP", "CP", "PP", "gradients and weights over DP"))
        lines.append(
            f"{layout.tp:3d} {layout.cp:4d} {layout.pp:3d} {layout.dp:4d}  {layout.recompute:<10} "
            f"{plan.memory.total / _GIB:7.1f} {'yes' if plan.fits else 'no':>5} {time.total:8.1f} {time.mfu:6.1%} "
            f"{time.tokens_per_gpu:13.0f} {links / time.total:14.1%}"
        )
    return lines


def refusal_lines(found: Search, rows: int = 6) -> list[str]:
    """The commonest reasons of refusal, with how many layouts each took."""
    counts = Counter(reason for _, reason in found.refused)
    lines = [f"  {count} x {reason}" for reason, count in counts.most_common(rows)]
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(rows))
    return [*lines, *([f"  {rest} for other reasons (in the JSON)"] if rest else [])]


def memory_lines(plan: Plan) -> list[str]:
    """The fullest rank's memory, item by item."""
    memory = plan.memory
    split = "one view" if memory.suffix_start is None else f"split {memory.suffix_start}"
    lines = [f"memory of the fullest rank (stage {memory.stage}, {split}, at the {memory.moment}), GiB:"]
    lines += [f"  {size / _GIB:7.2f}  {name}" for name, size in memory.items.items() if size]
    return [*lines, f"  {memory.total / _GIB:7.2f}  of {plan.capacity / _GIB:.1f}"]


def time_lines(plan: Plan) -> list[str]:
    """The step's time, cause by cause, with the operations and bytes behind it."""
    time = plan.time
    lines = [f"step time ({time.micro_batches} micro-batches a rank, mean split), s:"]
    lines += [f"  {seconds:7.2f}  {name}" for name, seconds in time.parts.items() if seconds >= 0.005]
    sent = ", ".join(f"{size / 1e9:.0f} GB over {link}" for link, size in time.link_bytes.items())
    return [
        *lines,
        f"  {time.total:7.2f}  for {time.model_flops / 1e15:.0f} PFLOP that the objective needs; a rank sends {sent}",
    ]


def argument_lines(plan: Plan, work: Workload) -> list[str]:
    """The chosen layout as flags of `megatron_rpsd.training.main`, a line a topic, as an args file takes them."""
    nodes = -(-plan.layout.gpus // GPUS_PER_NODE)
    degrees, rest = shlex.join(plan.layout.arguments()).split(" --use-distributed-optimizer")
    lines = [degrees, f"--use-distributed-optimizer{rest}", shlex.join(work.arguments())]
    return [
        f"# {plan.layout.gpus} GPUs ({nodes} node{'s' * (nodes > 1)}): predicted {plan.time.total:.0f} s a step, "
        f"{plan.memory.total / _GIB:.0f} GiB",
        *(part for line in lines for part in textwrap.wrap(line, 118, break_on_hyphens=False)),
    ]
