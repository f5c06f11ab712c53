"""The GPU check's parts that need Megatron, tiny, on one CPU rank: that they run and say what they should."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_rpsd.planning import gpu_training
from tests.distributed import gpu_job, training_job


def test_steps_and_plan(ranks):
    (found,) = ranks.run(1, gpu_job.step_and_plan_rows)
    steps, plan = found
    assert [row.unit for row in steps] == ["s"] * 3 + ["x"] * 2, steps
    assert "FLOP bound 2.000" in steps[3].reference and steps[3].bound == (0.0, pytest.approx(2.2))
    assert steps[4].bound[1] < steps[3].bound[1]
    # Resident memory of a process says nothing of a plan, and no plan knows a CPU's speed: here the rows alone count.
    assert [row.unit for row in plan if "peak memory" in row.what] == ["x"] * 3 and len(plan) == 5
    assert [row.verdict for row in plan if "roofline" in row.what] == ["not run"] * 2


def test_loss(ranks):
    (rows,) = ranks.run(1, gpu_job.loss_rows)
    failed = [row for row in rows if row.verdict in ("bad", "not run") and "beside" not in row.what]
    assert not failed, failed
    assert [row.what.split(":")[0] for row in rows if "peak memory" in row.what][0].startswith("fused loss, 64 + 32")
    assert any(row.what.startswith("megatron+dense-kl") for row in rows)
    assert any(row.what.startswith("bare products") for row in rows)


class InThePool:
    """The commands as functions of ranks, so that no process has to import Megatron."""

    def __init__(self, ranks) -> None:
        self.ranks, self.said = ranks, []

    def __call__(self, kind: str, words: Sequence[str]) -> str:
        self.said.append(kind)
        job = training_job.train if kind == "train" else gpu_job.convert
        return self.ranks.run(1, job, list(words))[0]


def test_training(ranks):
    runner = InThePool(ranks)
    rows = list(gpu_training.training_rows("cpu", gpu_training.TINY_SIZES, runner))
    assert [row.verdict for row in rows] == ["good"] * 7, rows
    assert runner.said == ["convert", *["train"] * 3, *["convert"] * 2]


def test_a_run_that_fails_or_does_nothing_is_found():
    sizes = gpu_training.TINY_SIZES

    def fails(kind: str, words: Sequence[str]) -> str:
        raise ValueError(f"{kind} ended with 1: {words[0]}")

    rows = list(gpu_training.training_rows("cpu", sizes, fails))
    assert [row.verdict for row in rows] == ["not run"] * 4
    # Nothing was imported, so the run starts from the model's own arguments.
    assert [row.reason for row in rows[:2]] == [
        "ValueError: convert ended with 1: import",
        "ValueError: train ended with 1: --num-layers",
    ]
    rows = list(gpu_training.training_rows("cpu", sizes, lambda kind, words: ""))
    verdicts = [row.verdict for row in rows if "differ" not in row.what]
    assert "good" not in verdicts and "bad" in verdicts, rows


@pytest.mark.slow
def test_the_commands_themselves(monkeypatch):
    """As on a GPU, in processes of their own, but on the CPU."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rows = list(gpu_training.training_rows("cpu", gpu_training.TINY_SIZES))
    assert [row.verdict for row in rows] == ["good"] * 7, rows
