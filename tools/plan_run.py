#!/usr/bin/env python
"""Layouts of a run on N GPUs: memory of a rank, step time by a roofline, the fastest that fits as ready arguments.

python tools/plan_run.py --model qwen3-4b --seq-length 262144 --gpus 32 --gpu h100-80gb --output runs/plan/qwen3.json

Predictions, not measurements. A figure goes beside the JSON as .png. Exits with 2 where nothing fits. Needs no GPU.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from megatron_rpsd.data.files import replace_file, write_json
from megatron_rpsd.planning.known_models import planned_model
from megatron_rpsd.planning.layout_search import nothing_fits, plan_record, search
from megatron_rpsd.planning.plan_options import add_plan_options, machine_from, workload_from
from megatron_rpsd.planning.plan_text import argument_lines, layout_table, memory_lines, refusal_lines, time_lines
from megatron_rpsd.report.plan_figures import PlanBar, layout_bars
from megatron_rpsd.training.errors import fail, one_line_errors, quiet_parser


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_plan_options(parser)
    parser.add_argument("--seq-length", type=int, required=True, help="Tokens of a sequence.")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--rows", type=int, default=10, help="Layouts in table and figure. Default: 10.")
    parser.add_argument("--dry-run", action="store_true", help="Let Megatron build the chosen layout, weights aside.")
    parser.add_argument("--output", type=Path, required=True, help="JSON; the figure goes beside it.")
    return quiet_parser(parser).parse_args()


def dry_run(model, plan, work) -> None:
    """Build every stage's first rank by Megatron on the meta device, and compare."""
    from megatron_rpsd.planning.dry_run import check_plan
    from megatron_rpsd.training.main import choose_device

    choose_device(["--device", "cpu", "--force-cpu-runtime"])
    arguments = [*plan.layout.arguments(), *work.arguments()]
    for rank, planned, built in check_plan(model, plan.layout, arguments):
        print(f"dry run, rank {rank} of {plan.layout.gpus}: {built:,} parameters, planned {planned:,}")
        if planned != built:
            raise ValueError(f"rank {rank} builds {built} parameters, the plan counted {planned}")


def main() -> None:
    args = parse()
    with one_line_errors():
        model, work = planned_model(args.model), workload_from(args, args.seq_length)
        gpu, assumptions = machine_from(args)
        found = search(model, work, args.gpus, gpu, assumptions, args.recompute)
    if found.chosen is None:
        fail(nothing_fits(found, model, work, args.gpus, gpu, assumptions))
    title = f"{model.name}, {work.length} tokens, {args.gpus} x {gpu.name}, {work.objective}, batch " + str(
        work.global_batch_size
    )
    print(f"{title}: predictions, nothing here was measured", *assumptions.describe(gpu), "", sep="\n")
    fitting = sum(plan.fits for plan in found.plans)
    print(f"{fitting} of {len(found.plans)} layouts fit:", *layout_table(found.plans, args.rows), sep="\n")
    print(f"\n{len(found.refused)} refused:", *refusal_lines(found), sep="\n")
    best = found.chosen
    print("", *memory_lines(best), "", *time_lines(best), "", *argument_lines(best, work), sep="\n", flush=True)
    if args.dry_run:
        with one_line_errors():
            dry_run(model, best, work)
    bars = [PlanBar(plan.layout.name, plan.time.parts, plan.memory.items) for plan in found.plans[: args.rows]]
    replace_file(args.output.with_suffix(".png"), layout_bars(bars, gpu.memory_bytes, f"{title} (predicted)"))
    records = [plan_record(plan, work) for plan in found.plans]
    write_json(args.output, {
        "model": {"name": model.name, **dataclasses.asdict(model.dims)}, "workload": dataclasses.asdict(work),
        "gpus": args.gpus, "gpu": dataclasses.asdict(gpu), "assumptions": dataclasses.asdict(assumptions),
        "chosen": records[0], "layouts": records,
        "refused": [{"layout": layout.name.rsplit(" ", 1)[0], "reason": why} for layout, why in found.refused],
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
