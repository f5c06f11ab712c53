"""Asynchronous checkpoints that would not be, or could not be written, are refused in one line."""

from __future__ import annotations

import importlib.util
from argparse import Namespace

import pytest

from megatron_rpsd.runs.saving import check_async_save


def flags(**changed) -> Namespace:
    return Namespace(**{"async_save": True, "use_persistent_ckpt_worker": True, "async_strategy": "nvrx", **changed})


def test_what_megatron_would_save_synchronously_is_refused():
    with pytest.raises(ValueError, match="--async-save needs --use-persistent-ckpt-worker"):
        check_async_save(flags(use_persistent_ckpt_worker=False))
    check_async_save(flags(async_save=False, use_persistent_ckpt_worker=False))


def test_a_strategy_whose_package_is_absent_is_refused_with_the_other_one(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="nvidia-resiliency-ext, which is not installed: .* --async-strategy mcore"):
        check_async_save(flags())
    check_async_save(flags(async_strategy="mcore"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_async_save(flags())
