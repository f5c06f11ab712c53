"""`--run-dir`: one folder for all that a run writes, from which it resumes by itself, and what guards it meanwhile."""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rpsd.data.files import replace_file, write_json
from megatron_rpsd.runs.checkpoints import complete_iterations, trust_newest
from megatron_rpsd.runs.events import record_end, record_event
from megatron_rpsd.runs.folder import RunFolder
from megatron_rpsd.runs.metrics import flush_metrics, write_metrics
from megatron_rpsd.runs.saving import Keeping, check_async_save, guard_saving
from megatron_rpsd.runs.steps import POLICIES, SampleWatch, StepGuard, guard_steps
from megatron_rpsd.runs.stopping import leave_when_asked
from megatron_rpsd.runs.throughput import Meter, known_peak, log_throughput
from megatron_rpsd.training.resuming import add_resume_arguments, settle_resume
from megatron_rpsd.training.wandb_run import settle_wandb, start_wandb

_PACKAGES = ("megatron-core", "torch", "transformers", "transformer-engine", "numpy", "megatron-rpsd")
_VERIFYING = datetime.timedelta(hours=2)
_kept_alive: list = []
_asked = itertools.count()


def add_run_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of a run that survives."""
    group.add_argument(
        "--run-dir", type=Path, default=None, metavar="DIR",
        help="Folder of the run: checkpoints (--save and --load), tensorboard, metrics, arguments and versions. A run "
        "started again resumes from the newest checkpoint that is whole; `touch DIR/stop` saves one and ends it.",
    )  # fmt: skip
    group.add_argument(
        "--keep-checkpoints", type=int, default=None, metavar="K", help="Keep the K newest checkpoints (--run-dir)."
    )
    group.add_argument(
        "--keep-every", type=int, default=None, metavar="N",
        help="With --keep-checkpoints: keep those whose iteration is a multiple of N, too.",
    )  # fmt: skip
    group.add_argument(
        "--on-nonfinite", choices=POLICIES, default="stop",
        help="A step whose loss or gradient is not finite: end the run before the optimizer (default), or skip the "
        "update. Either way its samples are named.",
    )  # fmt: skip
    group.add_argument(
        "--max-nonfinite-steps", type=int, default=5, metavar="N", help="Skipped steps in a row that a run survives."
    )
    group.add_argument(
        "--step-timeout-minutes", type=float, default=None, metavar="M",
        help="A rank that waits so long, from one step's begin to the next one's, writes its stacks and ends the job.",
    )  # fmt: skip
    group.add_argument(
        "--peak-tflops", type=float, default=None, metavar="X",
        help="Dense TFLOP/s of one device, against which MFU is logged. Default: by the GPU's name, where it is known.",
    )  # fmt: skip
    add_resume_arguments(group)


def settle_run_folder(args: argparse.Namespace, starting: bool = True) -> None:
    """Check the flags, and let --run-dir name Megatron's folders. Damaged checkpoints are set aside by rank 0.

    Args:
        starting: False: only the command line is looked at. No checkpoint is read, which takes minutes for hundreds of
            gigabytes, and none is set aside: a run may be writing it.

    Raises:
        ValueError: in one line.
    """
    for flag, value in (("--keep-checkpoints", args.keep_checkpoints), ("--keep-every", args.keep_every)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value} must be at least 1")
    if args.keep_every is not None and args.keep_checkpoints is None:
        raise ValueError(f"--keep-every {args.keep_every} needs --keep-checkpoints: without it all are kept anyway")
    if args.max_nonfinite_steps < 1:
        raise ValueError(f"--max-nonfinite-steps {args.max_nonfinite_steps} must be at least 1")
    if args.step_timeout_minutes is not None and not 0 < args.step_timeout_minutes < 1e6:  # seconds must fit a clock
        raise ValueError(f"--step-timeout-minutes {args.step_timeout_minutes:g} must be a positive number below 1e6")
    if args.peak_tflops is not None and not 0 < args.peak_tflops < float("inf"):
        raise ValueError(f"--peak-tflops {args.peak_tflops:g} must be a positive number of TFLOP/s")
    check_async_save(args)
    args.check_for_nan_in_loss_and_grad = False  # Megatron's raises on one rank, the others wait; ours is agreed on
    if args.run_dir is None:
        if args.keep_checkpoints is not None:
            raise ValueError("--keep-checkpoints needs --run-dir: only there it is known which checkpoints are whole")
        args.rpsd_resumed_from = None
        settle_resume(args, from_rank_0, _warn)
        settle_wandb(args, starting)
        return
    run = RunFolder(args.run_dir)
    for flag, given in (("--save", args.save), ("--load", args.load), ("--tensorboard-dir", args.tensorboard_dir)):
        if given is not None:
            raise ValueError(f"{flag} {given}: --run-dir {args.run_dir} names it already; leave one of them out")
    if args.run_dir.exists() and not args.run_dir.is_dir():
        raise ValueError(f"--run-dir {args.run_dir} is a file; name a folder")
    if run.finished.is_file():
        raise ValueError(f"--run-dir {args.run_dir}: {run.finished.name} says that this run is finished; name another")
    if starting:
        newest = from_rank_0(lambda: trust_newest(run.checkpoints, functools.partial(_set_aside, run)))
    else:
        newest = max(complete_iterations(run.checkpoints), default=None)
    args.save, args.tensorboard_dir = str(run.checkpoints), str(run.tensorboard)
    args.load = args.save if newest is not None else None
    args.exit_signal_handler = True
    args.rpsd_resumed_from = newest or 0
    settle_resume(args, from_rank_0, _warn, newest)
    settle_wandb(args, starting)


def _set_aside(run: RunFolder, text: str) -> None:
    _warn(text)
    record_event(run.events, "set aside", text)


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)


def from_rank_0(compute: Callable):
    """What `compute` gives on rank 0, on every rank, before the process group exists; its ValueError reaches all."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    answer = [None, None]
    if rank == 0:
        try:
            answer = [compute(), None]
        except ValueError as error:
            answer = [None, str(error)]
    if world_size > 1 and dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    elif world_size > 1 and "MASTER_ADDR" in os.environ:  # without it this is a check of the command line, alone
        store, *_ = next(dist.rendezvous("env://"))
        _kept_alive.append(store)  # where rank 0 serves it, the process group will use the same server
        store = dist.PrefixStore(f"megatron_rpsd/from_rank_0/{next(_asked)}", store)
        if rank == 0:
            store.set("answer", json.dumps(answer))
        else:
            store.wait(["answer"], _VERIFYING)
            answer = json.loads(store.get("answer"))
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def guarded(args: argparse.Namespace, forward_step: Callable) -> Callable:
    """Install the run's guards in Megatron's loop; returns the forward step to train with.

    Without --run-dir the loop is watched, too; only checkpoints and requests to stop belong to the folder.
    """
    watch = SampleWatch(forward_step)
    timeout = None if args.step_timeout_minutes is None else 60 * args.step_timeout_minutes
    tell = _teller(args)
    guard_steps(StepGuard(watch, args.on_nonfinite, args.max_nonfinite_steps, tell), timeout)
    start_wandb(args, from_rank_0)
    log_throughput(Meter(args.world_size, _peak(args)))
    if args.run_dir is not None:
        run = RunFolder(args.run_dir)
        guard_saving(Path(args.save), Keeping(args.keep_checkpoints, args.keep_every), tell=tell)
        leave_when_asked(run.stop, tell)
        if args.rank == 0:
            record_start(args)
            record_end(run.events)
        if args.rank == args.world_size - 1:  # where Megatron has its tensorboard writer
            write_metrics(run.metrics)
    return watch


def _teller(args: argparse.Namespace) -> Callable[[str, str], None]:
    """Where a run has a folder, rank 0 records there what befalls it."""
    if args.run_dir is None or args.rank:
        return lambda kind, text: None
    return functools.partial(record_event, RunFolder(args.run_dir).events)


def _peak(args: argparse.Namespace) -> float | None:
    """TFLOP/s of a rank's device, by flag or name; where neither says it, that is said once."""
    if args.peak_tflops is not None:
        return args.peak_tflops
    name, peak = "the CPU", None
    if args.device != "cpu":
        name = torch.cuda.get_device_name(args.local_rank)  # Megatron has not chosen the device yet
        peak = known_peak(name)
    if peak is None and args.rank == 0:
        print(f"no MFU is logged: the peak of {name} is not known; --peak-tflops X gives it", flush=True)
    return peak


def record_start(args: argparse.Namespace) -> None:
    """Write the resolved arguments, and add where, with what and by which command this start was made."""
    run = RunFolder(args.run_dir)
    replace_file(run.arguments, (json.dumps(vars(args), indent=1, sort_keys=True, default=str) + "\n").encode())
    start = {
        "time": time.time(),
        "iteration": args.rpsd_resumed_from,
        "command": sys.argv,
        "host": platform.node(),
        "world_size": args.world_size,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "git": _git_state(),
        "slurm": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SLURM_")},
    }
    with run.origins.open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict | None:
    """Commit and number of changed files of the working tree that this package lies in; None outside of git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode or changed.returncode:
        return None
    return {"commit": commit.stdout.strip(), "changed_files": len(changed.stdout.splitlines())}


def mark_finished(args: argparse.Namespace) -> None:
    """Say that nothing is left to do; and no alarm rings any more."""
    faulthandler.cancel_dump_traceback_later()
    flush_metrics()
    if args.run_dir is not None and args.rank == 0:
        write_json(RunFolder(args.run_dir).finished, {"iteration": args.train_iters, "time": time.time()})
