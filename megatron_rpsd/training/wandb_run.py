"""Megatron's wandb logging, begun when all checks are done, and one wandb run for all starts of a run folder."""

from __future__ import annotations

import argparse
import importlib.util
import os
import secrets
import sys
from collections.abc import Callable

from megatron.training import global_vars

from megatron_rpsd.data.files import replace_file
from megatron_rpsd.runs.folder import RunFolder


def settle_wandb(args: argparse.Namespace, starting: bool = True) -> None:
    """Check wandb's flags; `start_wandb` begins it later, so that a refused command line leaves no wandb run.

    Args:
        starting: False: only the command line is looked at.

    Raises:
        ValueError: in one line.
    """
    args.rpsd_wandb_project, args.wandb_project = args.wandb_project or None, ""
    project = args.rpsd_wandb_project
    if project is None:
        return
    if importlib.util.find_spec("wandb") is None:
        if os.environ.get("WANDB_MODE") != "disabled":
            raise ValueError(
                f"--wandb-project {project}: the package wandb is not installed here; install it, leave the flag out, "
                "or set WANDB_MODE=disabled"
            )
        args.rpsd_wandb_project = None
        return
    if not args.wandb_exp_name:
        raise ValueError(f"--wandb-project {project} needs --wandb-exp-name: the run's name in wandb")
    if args.tensorboard_dir is None:
        raise ValueError(
            f"--wandb-project {project} needs --run-dir or --tensorboard-dir: Megatron logs to wandb beside tensorboard"
        )
    if args.wandb_save_dir is None and args.run_dir is None and args.save is None:
        raise ValueError(f"--wandb-project {project} needs --wandb-save-dir, --run-dir or --save for wandb's own files")
    if not starting:
        args.rpsd_wandb_project = None


def start_wandb(args: argparse.Namespace, from_rank_0: Callable) -> None:
    """Begin wandb on the last rank; a resumed run goes on in its wandb run, which the run folder names.

    wandb's own variables, where they are set, come first: WANDB_MODE, WANDB_RUN_ID, WANDB_RESUME.
    """
    if args.rpsd_wandb_project is None:
        return
    args.wandb_project = args.rpsd_wandb_project
    if args.run_dir is not None:
        identity = from_rank_0(lambda: _identity(RunFolder(args.run_dir)))
        args.wandb_save_dir = args.wandb_save_dir or str(args.run_dir)
        os.environ.setdefault("WANDB_RUN_ID", identity)
        os.environ.setdefault("WANDB_RESUME", "allow")
    if args.rank != args.world_size - 1:
        return
    import wandb

    try:
        global_vars._set_wandb_writer(args)
    except wandb.Error as error:  # this rank alone knows: torchrun ends the others when it leaves
        reason = " ".join(str(error).split())
        print(f"error: --wandb-project {args.wandb_project}: {reason}; or set WANDB_MODE=offline", file=sys.stderr)
        raise SystemExit(2) from error


def _identity(run: RunFolder) -> str:
    if not run.wandb_id.is_file():
        replace_file(run.wandb_id, (os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)).encode())
    return run.wandb_id.read_text(encoding="utf-8").strip()
