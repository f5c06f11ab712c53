"""Malformed configurations end in one clear line that names flag and value, with exit code 2, and leave nothing."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.distributed.corpus import run_arguments
from tests.soak.forked import command
from tests.soak.malformed import Malformed, draw
from tests.soak.malformed_tools import TOOLS
from tests.soak.malformed_training import TRAINING
from tests.soak.workspace import listing


def refusal(one: Malformed, number: int, workspace: Path, root: Path) -> str | None:
    """Run a configuration on a copy of the folder; what its refusal lacks, or None."""
    here = root / f"case{number}"
    shutil.copytree(workspace, here)
    if one.prepare is not None:
        one.prepare(here, random.Random(number))
    before = listing(here)
    ended = command(one.program, one.typed(here, run_arguments(here / "checkpoint", here / "data", 2)), root, one.ranks)
    changed = sorted(set(listing(here).items()) ^ set(before.items()))
    fault = one.fault(here, ended.code, ended.errors)
    if fault is None and changed:
        fault = f"it left {', '.join(sorted({name for name, _ in changed}))}"
    shutil.rmtree(here)
    return fault


def refused(configurations: list[Malformed], workspace: Path, root: Path) -> list[str]:
    """What went otherwise, one text for each configuration that was not refused as it should be."""
    faults = []
    for number, one in enumerate(configurations):
        started = time.monotonic()
        fault = refusal(one, number, workspace, root)
        verdict = "held" if fault is None else "FAILED"
        print(f"{number:3d} {time.monotonic() - started:5.1f} s {verdict} {one} {fault or ''}", flush=True)
        if fault is not None:
            faults.append(f"{one}: {fault}")
    return faults


def test_a_few_malformed_configurations_are_refused_in_one_line(workspace, tmp_path):
    drawn = list(draw(1, {family: 1 for family in (*TRAINING, *TOOLS)}))
    assert not (faults := refused(random.Random(1).sample(drawn, 25), workspace, tmp_path)), "\n".join(faults)


@pytest.mark.slow
def test_two_hundred_malformed_configurations_are_refused_in_one_line(workspace, tmp_path, record_property):
    drawn = list(draw(2, {**TRAINING, **TOOLS}))
    assert len(drawn) == 200
    faults = refused(drawn, workspace, tmp_path)
    record_property("tried", len(drawn))
    record_property("held", len(drawn) - len(faults))
    assert not faults, "\n".join(faults)
