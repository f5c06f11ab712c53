"""Kills and damaged checkpoints of a run on two ranks: it ends with the figures of an untouched one.

Two and two in the suite, twenty and thirty among the long counts.
"""

from __future__ import annotations

import itertools
import random
import shutil
import time
from pathlib import Path

import pytest

from megatron_rpsd.runs.checkpoints import iteration_folder
from megatron_rpsd.runs.checksums import CHECKSUMS
from tests.distributed.corpus import run_arguments
from tests.soak.attempts import (
    any_time,
    attempt,
    behind_a_save,
    figures,
    in_a_save,
    newest_whole,
    same_tensors,
)
from tests.unit.runs.test_checkpoints import flip, remove, truncate

STEPS, EVERY = 8, 2


@pytest.fixture(scope="module")
def arguments(workspace):
    """The command line of a run in a folder."""

    def typed(run: Path) -> list[str]:
        sound = run_arguments(workspace / "checkpoint", workspace / "data", STEPS)
        return [*sound, "--run-dir", str(run), "--save-interval", str(EVERY), "--use-distributed-optimizer"]

    return typed


@pytest.fixture(scope="module")
def untouched(arguments, tmp_path_factory) -> tuple[Path, float]:
    """A run that nobody disturbed, and the seconds that it took."""
    run = tmp_path_factory.mktemp("untouched") / "run"
    started = time.monotonic()
    ended = attempt(arguments(run), run)
    assert ended.codes == (0, 0), ended.errors
    assert sorted(figures(run)) == list(range(1, STEPS + 1))
    return run, time.monotonic() - started


def killed_run(run: Path, typed: list[str], kills: int, seconds: float, dice: random.Random) -> tuple[int, int]:
    """Start a run again and again, killing a rank of the first attempts; kills, and those that hit a save."""
    done = saves = 0
    while True:
        which = dice.randrange(1, 3)
        moments = {
            "any time": any_time(seconds, dice),
            "in a save": in_a_save(run, which, 0.15, dice),
            "behind a save": behind_a_save(run, which),
        }
        moment = moments[dice.choice(("any time", "in a save", "in a save", "in a save", "behind a save"))]
        before = newest_whole(run)
        ended = attempt(typed, run, moment if done < kills else None, victim=dice.randrange(2))
        if ended.loaded:
            assert ended.loaded == before, f"started from iteration {ended.loaded}, the newest whole one is {before}"
        if not ended.killed:
            assert ended.codes == (0, 0), f"exit codes {ended.codes}: {ended.errors}"
            assert ended.loaded == before and (run / "finished.json").is_file()
            return done, saves
        done, saves = done + 1, saves + bool(ended.unfinished)
        assert not list((run / "checkpoints").glob("damaged-*")), "a whole checkpoint was damaged by a kill"
        if (run / "finished.json").is_file():  # the kill came behind the run's end
            return done, saves


@pytest.mark.parametrize("kills_wanted, saves_wanted", [(2, 1), pytest.param(20, 5, marks=pytest.mark.slow)])
def test_kills_leave_every_figure_as_it_was(
    kills_wanted, saves_wanted, arguments, untouched, tmp_path, record_property
):
    whole, seconds = untouched
    dice, tried, held, saves, faults = random.Random(20), 0, 0, 0, []
    for number in itertools.count():
        if tried >= kills_wanted and (saves >= saves_wanted or faults):
            break
        run, kills = tmp_path / f"run{number}", dice.choice((2, 3))
        try:
            done, hit = killed_run(run, arguments(run), kills, seconds, dice)
            assert figures(run) == figures(whole)
            assert same_tensors(run, whole, STEPS) >= 8
        except AssertionError as fault:
            done, hit = kills, 0  # a run that went wrong holds none of its kills
            faults.append(f"{run.name}: {fault}")
        else:
            held += done
        print(f"{run.name}: {done} kills, {hit} of them in a save; {faults[-1:]}", flush=True)
        tried, saves = tried + done, saves + hit
    record_property("tried", tried)
    record_property("held", held)
    record_property("saves", saves)
    assert not faults, "\n".join(faults)
    assert saves >= saves_wanted


@pytest.fixture(scope="module")
def stopped(arguments, tmp_path_factory) -> Path:
    """A run that left behind its fifth step: checkpoints of iterations 2, 4 and 5."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    ended = attempt([*arguments(run), "--exit-interval", "5"], run)
    assert ended.codes == (0, 0) and newest_whole(run) == 5, ended.errors
    return run


def damaged_run(stopped: Path, run: Path, typed: list[str], number: int, whole: Path) -> str:
    """Damage one file of the newest checkpoint, and go on; which file, and how: `number` counts through all of both."""
    shutil.copytree(stopped, run)
    dice = random.Random(number)
    folder = iteration_folder(run / "checkpoints", 5)
    files = sorted(path.name for path in folder.iterdir())
    name, harm = files[number % len(files)], (truncate, flip, remove)[number // len(files) % 3]
    harm(folder / name, dice)
    ended = attempt(typed, run)
    assert ended.codes == (0, 0), ended.errors
    assert "checkpoint of iteration 5 is not used: " in ended.errors and ended.loaded == 4, ended.errors
    if name != CHECKSUMS:
        assert name in ended.errors, ended.errors
    assert figures(run) == figures(whole)
    return f"{harm.__name__} {name}"


@pytest.mark.parametrize("cases", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_found_before_training(cases, arguments, stopped, untouched, tmp_path, record_property):
    held, faults = 0, []
    for number in range(cases):
        run = tmp_path / f"run{number}"
        try:
            print(f"{number}: {damaged_run(stopped, run, arguments(run), 11 * number, untouched[0])}", flush=True)
            held += 1
        except AssertionError as fault:
            faults.append(f"case {number}: {fault}")
        shutil.rmtree(run)
    record_property("tried", cases)
    record_property("held", held)
    assert not faults, "\n".join(faults)
