"""The table of arms, equal-time steps, and what the command lines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.lab.arms import ARMS, MAIN_ARMS, arm_arguments, base_arguments, equal_time_steps, needed_arms
from examples.lab.settings import Settings


def test_equal_time_steps() -> None:
    phase = Settings().adapt
    assert (phase.steps, phase.log_interval) == (300, 10)
    # 300 steps of 80 ms are 24 s: 480 steps of 50 ms.
    assert equal_time_steps(phase, 0.080, 0.050, 3) == 480
    assert equal_time_steps(phase, 0.080, 0.0501, 3) == 470  # what does not fit whole is not taken
    assert equal_time_steps(phase, 0.040, 0.050, 3) == 300
    assert equal_time_steps(phase, 0.5, 0.050, 3) == 900


def test_every_arm_is_measured_by_arms_before_it() -> None:
    seen: set[str] = set()
    for name, arm in ARMS.items():
        assert {arm.time_of, arm.same_as} - {None} <= seen, name
        assert (arm.time_of is None) == (arm.same_as is None)
        if arm.same_as:
            assert arm.flags == ARMS[arm.same_as].flags
        seen.add(name)
    assert set(MAIN_ARMS) <= seen


def test_an_equal_time_arm_brings_those_that_it_is_measured_by() -> None:
    assert needed_arms(("pose-equal-time",)) == ("pose", "rpsd-skip", "pose-equal-time")
    assert needed_arms(("rpsd-skip", "standard")) == ("standard", "rpsd-skip")


def test_arms_differ_in_their_flags_alone(tmp_path: Path) -> None:
    settings = Settings()
    base, data = tmp_path / "base", tmp_path / "data"
    lines = {
        name: arm_arguments(arm, settings.adapt, 300, 1, base, data, tmp_path / "save") for name, arm in ARMS.items()
    }
    common = lines["standard"][: -len(ARMS["standard"].flags)]
    for name, line in lines.items():
        assert line == [*common, *ARMS[name].flags]
    assert common[common.index("--rotary-base") + 1] == "500000"
    first = base_arguments(settings.base, 1, data, base)
    assert first[first.index("--rotary-base") + 1] == "10000" and first[first.index("--seq-length") + 1] == "64"
    for flag in ("--seed", "--weight-decay", "--adam-beta2", "--clip-grad"):
        assert first[first.index(flag) + 1] == common[common.index(flag) + 1]


@pytest.mark.parametrize("seed", [0, 7])
def test_seeds_reach_the_command_line(seed: int, tmp_path: Path) -> None:
    line = base_arguments(Settings().base, seed, tmp_path, tmp_path)
    assert line[line.index("--seed") + 1] == str(seed + 1)  # Megatron refuses a seed of 0
