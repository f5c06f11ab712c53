"""wandb's flags before it begins: absent, disabled, incomplete; and one identity for all starts of a run."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import types

import pytest

from megatron_rpsd.training import wandb_run
from megatron_rpsd.training.wandb_run import settle_wandb, start_wandb


@pytest.fixture(autouse=True)
def own_variables(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # so that what a test leaves there is taken back
        monkeypatch.delenv(name)


def given(tmp_path, **changed) -> argparse.Namespace:
    values = {
        "wandb_project": "long", "wandb_exp_name": "first", "wandb_save_dir": None, "run_dir": tmp_path,
        "save": str(tmp_path / "checkpoints"), "tensorboard_dir": str(tmp_path / "tensorboard"), "rank": 0,
        "world_size": 1,
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changed})


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def present(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_an_absent_wandb_is_one_line_unless_it_is_disabled(absent, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--wandb-project long: the package wandb is not installed") as refused:
        settle_wandb(given(tmp_path))
    assert "\n" not in str(refused.value) and "WANDB_MODE=disabled" in str(refused.value)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    args = given(tmp_path)
    settle_wandb(args)
    assert args.rpsd_wandb_project is None and not args.wandb_project
    settle_wandb(given(tmp_path, wandb_project=""))  # not asked for


def test_incomplete_flags_are_refused(present, tmp_path):
    with pytest.raises(ValueError, match="needs --wandb-exp-name"):
        settle_wandb(given(tmp_path, wandb_exp_name=""))
    with pytest.raises(ValueError, match="needs --run-dir or --tensorboard-dir"):
        settle_wandb(given(tmp_path, tensorboard_dir=None))
    with pytest.raises(ValueError, match="needs --wandb-save-dir"):
        settle_wandb(given(tmp_path, run_dir=None, save=None))


def test_nothing_begins_before_all_checks_are_done_or_on_a_look_alone(present, tmp_path):
    args = given(tmp_path)
    settle_wandb(args)
    assert not args.wandb_project  # which is what Megatron begins wandb by
    settle_wandb(args := given(tmp_path), starting=False)
    assert args.rpsd_wandb_project is None


def test_every_start_goes_on_in_the_same_wandb_run(present, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Error=OSError))
    monkeypatch.setattr(
        wandb_run.global_vars, "_set_wandb_writer",
        lambda args: begun.append((args.wandb_project, args.wandb_save_dir, os.environ["WANDB_RUN_ID"])),
    )  # fmt: skip
    for _ in range(2):
        settle_wandb(args := given(tmp_path))
        start_wandb(args, lambda compute: compute())
        assert os.environ["WANDB_RESUME"] == "allow"
        monkeypatch.delenv("WANDB_RUN_ID")
    assert begun == [("long", str(tmp_path), (tmp_path / "wandb_id").read_text())] * 2
    settle_wandb(args := given(tmp_path, rank=0, world_size=2))
    start_wandb(args, lambda compute: compute())
    assert len(begun) == 2  # the last rank alone writes
