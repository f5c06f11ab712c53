"""What a run resumed at another layout keeps, and where it cannot go on.

Data: Megatron's sampler deals out samples by how many were read, so a global batch holds the same ones at any layout.

Views: shifts follow the sample, splits the micro-step (stratified) or the micro-batch (independent), whose sizes are
the batch's. A resumed run keeps the sizes that it drew for at its very first step, so that its splits are those of the
uninterrupted run:

    begun at DP 1, micro-steps   0   1   2   3      a split each
    resumed at DP 2             (0   1) (2   3)     the same splits; two ranks at once may now have different ones

On fewer data-parallel ranks than before this costs nothing, on more of them ranks wait for the longest suffix. The
default granule of splits, which follows TP x CP, stays too. `--redraw-views` draws for the present sizes instead.

Optimizer: torch_dist checkpoints hold Adam's moments by parameter and load anywhere. The distributed optimizer's
default format (dp_reshardable) holds flat buffers, which only another data-parallel size can cut anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron.core.dist_checkpointing import load_content_metadata

from megatron_rpsd.positions import StepShape
from megatron_rpsd.runs.checkpoints import TRACKER, iteration_folder
from megatron_rpsd.training.arms import default_granule, granule_unit, suffix_unit, unit_in_words, views_of
from megatron_rpsd.training.batch import TWO_VIEWS
from megatron_rpsd.training.implied import data_parallel_ranks, global_batch
from megatron_rpsd.training.saved_checkpoint import checkpoint_folder, common_state, in_torch_format
from megatron_rpsd.training.schedules import check_schedule, schedule_of

_FLAT_FORMATS = ("dp_reshardable",)


def add_resume_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flag to the parser's group."""
    group.add_argument(
        "--redraw-views", action="store_true",
        help="On resuming at another layout or micro-batch size draw splits for the present sizes. Default: go on with "
        "the splits of the run's first start.",
    )  # fmt: skip


def saved_layout(load: str, iteration: int | None = None) -> dict | None:
    """What of a checkpoint of --load decides whether and how it is gone on from.

    Args:
        iteration: of the checkpoint; None for the one that Megatron's tracker names.

    Returns:
        Plain values, as they travel between ranks. None where nothing was trained yet, and for --ckpt-format torch,
        which goes on in its own layout alone.
    """
    if iteration is None and (in_torch_format(load) or not (Path(load) / TRACKER).is_file()):
        return None
    folder = checkpoint_folder(load, flag="--load") if iteration is None else iteration_folder(Path(load), iteration)
    state = common_state(folder)
    saved = state["args"]
    if not getattr(saved, "consumed_train_samples", 0):
        return None
    unit = 2 * saved.context_parallel_size * saved.tensor_model_parallel_size
    drawn_for = getattr(saved, "rpsd_drawn_for", None) or (saved.micro_batch_size, saved.data_parallel_size, unit)
    metadata = load_content_metadata(preloaded_state_dict=state) or {}
    return {
        "checkpoint": folder.name,
        "tp_pp": [saved.tensor_model_parallel_size, saved.pipeline_model_parallel_size],
        "global_batch_size": saved.global_batch_size,
        "drawn_for": list(drawn_for),
        "sampling": getattr(saved, "rpsd_split_sampling", "independent"),
        "optimizer_saved": not getattr(saved, "no_save_optim", False),
        "distributed_optimizer": bool(saved.use_distributed_optimizer),
        "optimizer_format": metadata.get("distrib_optim_sharding_type"),
        "schedule": schedule_of(saved),
    }


def settle_resume(
    args: argparse.Namespace, from_rank_0: Callable, warn: Callable[[str], None], iteration: int | None = None
) -> None:
    """Refuse what cannot be resumed, and keep what the run's views were drawn for, in `args.rpsd_drawn_for`.

    Args:
        from_rank_0: runs a function on rank 0 and gives its value to every rank.
        warn: told one line, on every rank.
        iteration: of the checkpoint; None for the one that Megatron's tracker names.

    Raises:
        ValueError: one line with the way out.
    """
    args.rpsd_drawn_for = None
    if args.load is None or args.finetune or args.ckpt_format != "torch_dist":
        return
    saved = from_rank_0(lambda: saved_layout(args.load, iteration))
    if saved is None:
        return
    _check_optimizer(args, saved)
    check_schedule(args, global_batch(args), saved["schedule"], f"{saved['checkpoint']} in --load {args.load}")
    _keep_drawn_sizes(args, saved, warn)


def step_shape(args: argparse.Namespace) -> StepShape:
    """The sizes that views are drawn for: the present ones, or those of the first start of a run that was resumed."""
    if args.rpsd_drawn_for is None:  # checkpoints carry it
        args.rpsd_drawn_for = (args.micro_batch_size, args.data_parallel_size, granule_unit(args))
    return StepShape(args.global_batch_size, *args.rpsd_drawn_for[:2])


def _check_optimizer(args: argparse.Namespace, saved: dict) -> None:
    if args.no_load_optim or not saved["optimizer_saved"]:
        return
    then, now = saved["tp_pp"], [args.tensor_model_parallel_size, args.pipeline_model_parallel_size]
    source = f"--load {args.load}: {saved['checkpoint']}"
    if saved["distributed_optimizer"] != args.use_distributed_optimizer:
        had, has = ("with", "without") if saved["distributed_optimizer"] else ("without", "with")
        raise ValueError(
            f"{source} was written {had} --use-distributed-optimizer, this run is {has} it: resume {had} it, or give "
            "--no-load-optim, which starts Adam's moments anew"
        )
    if then != now and saved["distributed_optimizer"] and saved["optimizer_format"] in _FLAT_FORMATS:
        raise ValueError(
            f"{source} was written at TP x PP = {then[0]} x {then[1]} with the distributed optimizer's format "
            f"{saved['optimizer_format']}, of which only the data-parallel size may change; this run is at "
            f"{now[0]} x {now[1]}: resume once at {then[0]} x {then[1]} with --dist-ckpt-optim-fully-reshardable and "
            "let it write a checkpoint, then change the layout; or give --no-load-optim, which starts Adam's moments "
            "anew"
        )


def _keep_drawn_sizes(args: argparse.Namespace, saved: dict, warn: Callable[[str], None]) -> None:
    micro, replicas, unit = saved["drawn_for"]
    present = (args.micro_batch_size, data_parallel_ranks(args))
    two_views = views_of(args) in TWO_VIEWS
    drawn = two_views or args.objective == "pose" or args.length_mix
    kept, as_now = (micro, replicas, unit), (*present, granule_unit(args))
    if args.redraw_views or not drawn or global_batch(args) != saved["global_batch_size"] or kept == as_now:
        return
    stratified = (args.rpsd_split_sampling or saved["sampling"]) == "stratified"
    group = micro * replicas if stratified else micro
    one_split = args.length_mix or (two_views and args.rpsd_execution != "full")
    if one_split and group % present[0]:
        raise ValueError(
            f"--micro-batch-size {present[0]}: this run draws one split for {group} sample(s) at a time, and a "
            f"micro-batch needs a single one; choose a divisor of {group}, or give --redraw-views"
        )
    args.rpsd_drawn_for = kept
    _check_granule(args)
    if stratified and present[0] * present[1] > group:
        warn(
            f"resumed with {present[1]} data-parallel ranks: splits stay those of the first start, one for "
            f"{group} sample(s), so ranks of a micro-step may wait for a longer suffix; --redraw-views draws others"
        )


def _check_granule(args: argparse.Namespace) -> None:
    """Under context or sequence parallelism a suffix must be dealt out evenly; the kept granule may be too fine."""
    if args.rpsd_split_granule is not None or args.seq_length is None:  # looked at with all other arguments
        return
    needed = suffix_unit(args)
    mixed = args.length_mix or args.rope_phases
    granule = args.rpsd_drawn_for[2] if mixed else default_granule(args, args.seq_length)
    if granule % needed:
        raise ValueError(
            f"--load {args.load}: this run began with splits in multiples of {granule} tokens, and at this layout a "
            f"suffix must divide by {unit_in_words(args)} = {needed}; give --redraw-views, or "
            "another layout"
        )
