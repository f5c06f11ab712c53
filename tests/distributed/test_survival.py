"""A run folder: it resumes from the newest whole checkpoint, keeps what it should, and says what befell it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rpsd.checkpoint.convert import import_hf
from megatron_rpsd.runs.checkpoints import complete_iterations, iteration_folder
from megatron_rpsd.runs.checksums import damage
from megatron_rpsd.runs.status import read_status
from tests.distributed import survival_job, training_job
from tests.distributed.corpus import run_arguments, write_corpus

LOGGED = re.compile(r"iteration +(\d+)/.*grad norm: ([\d.naif]+)")


@pytest.fixture(scope="module")
def arguments(ranks, tiny_llama, tmp_path_factory):
    """Arguments of a run of N steps without a folder."""
    root = tmp_path_factory.mktemp("survival")
    ranks.run(1, import_hf, tiny_llama, root / "checkpoint")
    prefix = write_corpus(root / "random")
    return lambda steps: run_arguments(root / "checkpoint", prefix, steps)


def folder(path: Path, every: int = 2) -> list[str]:
    return ["--run-dir", str(path), "--save-interval", str(every)]


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Iteration -> loss and view KL, every bit. A step that was taken twice has to have given the same twice."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    taken = {}
    for name in ("lm loss", "view kl"):
        for event in events.Scalars(name):
            assert taken.setdefault((event.step, name), event.value) == event.value, (event.step, name)
    return {step: (taken[step, "lm loss"], taken[step, "view kl"]) for step, _ in taken}


def scalars(run: Path) -> dict[str, list[float]]:
    """Name -> values, step by step, of a run of which no step was taken twice."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    names = ("lm loss", "view kl", "mean split", "mean shift")
    return {name: [event.value for event in events.Scalars(name)] for name in names}


def norms(outputs: list[str]) -> dict[int, float]:
    """Iteration -> gradient norm, as the last pipeline stage's rank printed it."""
    return {int(step): float(norm) for output in outputs for step, norm in LOGGED.findall(output)}


def test_a_run_stops_when_asked_resumes_past_damage_and_keeps_what_it_should(ranks, arguments, tmp_path):
    ranks.run(2, training_job.train, [*arguments(12), *folder(tmp_path / "whole")])
    whole = losses(tmp_path / "whole")
    assert sorted(whole) == list(range(1, 13))
    run = tmp_path / "run"
    typed = [*arguments(12), *folder(run), "--keep-checkpoints", "2", "--keep-every", "4"]
    ranks.run(2, training_job.train, [*typed, "--exit-interval", "9"])
    assert complete_iterations(run / "checkpoints") == [4, 8, 9] and not (run / "finished.json").exists()
    assert losses(run) == {step: whole[step] for step in range(1, 10)}

    shard = next(iteration_folder(run / "checkpoints", 9).glob("__1_*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (run / "stop").touch()
    _, errors, code = zip(*ranks.run(2, survival_job.run, typed), strict=True)
    assert code == (0, 0)
    assert f"checkpoint of iteration 9 is not used: {shard.name} has" in errors[0]
    assert (run / "checkpoints" / "damaged-iter_0000009").is_dir()
    assert complete_iterations(run / "checkpoints") == [4, 8, 9]  # one step from 8 on, then it left as asked
    (run / "stop").unlink()

    ranks.run(2, training_job.train, typed)
    assert losses(run) == whole
    assert complete_iterations(run / "checkpoints") == [4, 8, 10, 12]
    assert json.loads((run / "finished.json").read_text())["iteration"] == 12
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 3 and starts[0]["versions"]["torch"] and starts[0]["world_size"] == 2
    assert json.loads((run / "arguments.json").read_text())["lr"] == 1e-3
    _, errors, code = ranks.run(1, survival_job.run, typed)[0]
    assert code == 2 and "is finished" in errors and len(errors.splitlines()) == 1


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(ranks, arguments, tmp_path):
    output = ranks.run(2, survival_job.train_on_a_full_disk, [*arguments(6), *folder(tmp_path / "run")], 1)[0]
    assert "no checkpoint of iteration 4 is written" in output and "No space left" in output
    assert complete_iterations(tmp_path / "run" / "checkpoints") == [2, 6]
    assert (tmp_path / "run" / "finished.json").is_file()


def test_asynchronous_checkpoints_get_their_sums_when_they_are_written(ranks, arguments, tmp_path):
    typed = [*arguments(4), *folder(tmp_path / "run"), "--async-save", "--async-strategy", "mcore"]
    happened = ranks.run(2, survival_job.train_asynchronously, [*typed, "--use-persistent-ckpt-worker"])
    each = [("scheduled", False, False), ("written", True, False), ("sealed", True, True)]
    for rank in happened:  # the second one may be scheduled while the first is being written
        assert rank == {"iter_0000002": each, "iter_0000004": each}
    checkpoints = tmp_path / "run" / "checkpoints"
    assert complete_iterations(checkpoints) == [2, 4]
    assert [damage(iteration_folder(checkpoints, iteration)) for iteration in (2, 4)] == [None, None]


ADAM_OF_ANY_LAYOUT = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
LAYOUTS = {
    "dp2": (2, 4, ADAM_OF_ANY_LAYOUT),
    "tp2": (2, 6, [*ADAM_OF_ANY_LAYOUT, "--tensor-model-parallel-size", "2"]),
    "pp2": (2, 99, [*ADAM_OF_ANY_LAYOUT, "--pipeline-model-parallel-size", "2"]),
}
"""In this order, from DP 1 on: ranks, the step to leave at, flags."""


def test_a_run_resumed_at_other_layouts_goes_on_alike_in_one_wandb_run(ranks, arguments, tmp_path):
    one = [*arguments(8), "--use-distributed-optimizer", "--peak-tflops", "0.5"]
    ranks.run(1, training_job.train, [*one, *folder(tmp_path / "whole")])
    run = tmp_path / "run"
    watched = [*folder(run), "--wandb-project", "p", "--wandb-exp-name", "e", "--exit-interval"]
    answers = ranks.run(1, survival_job.train_with_wandb, [*one, *watched, "2"])
    for world_size, last, flags in LAYOUTS.values():
        typed = [*arguments(8), "--peak-tflops", "0.5", *flags, *watched, str(last)]
        answers.append(ranks.run(world_size, survival_job.train_with_wandb, typed)[-1])

    whole, resumed = scalars(tmp_path / "whole"), scalars(run)
    for name in ("mean split", "mean shift"):  # the same samples under the same views
        assert resumed[name] == whole[name], name
    for name in ("lm loss", "view kl"):
        assert resumed[name][:2] == whole[name][:2]
        # fp32 sums over ranks come in another order: 3e-7 was measured after four steps.
        assert resumed[name] == pytest.approx(whole[name], rel=1e-5), name

    begun = [begin for _, begin, _ in answers]
    assert {begin["id"] for begin in begun} == {(run / "wandb_id").read_text()} and begun[-1]["resume"] == "allow"
    told = {}
    for _, _, logged in answers:
        for name, values in logged.items():
            told.setdefault(name, []).extend(values)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("view kl", "mean split", "gflop per token", "tokens per second", "tflops per rank", "mfu", "peak memory")
    for name in names:
        assert told[name] == [(line["iteration"], line[name]) for line in lines if name in line], name
    assert [step for step, _ in told["mfu"]] == [2, 4, 6, 8]  # the first step of a start is not timed
    for line in lines:
        assert 0 < line.get("peak memory", 1) < 64
        if "mfu" in line:
            assert line["tflops per rank"] == pytest.approx(line["mfu"] * 0.5 / 100)
            ranks_then = 1 if line["iteration"] == 2 else 2
            rate = line["gflop per token"] * line["tokens per second"] / 1e3 / ranks_then
            assert line["tflops per rank"] == pytest.approx(rate, rel=1e-5)
    assert re.search(r"iteration +2/.*tokens/s: [\d.e+]+ \| TFLOP/s per rank: [\d.e-]+ \| MFU: [\d.]+%", answers[0][0])

    status = read_status(run)
    assert (status.state, status.iteration, status.checkpoint) == ("finished", 8, 8)
    assert [(start.iteration, start.ranks) for start in status.starts] == [(0, 1), (2, 2), (4, 2), (6, 2)]


@pytest.mark.parametrize("layout", [[], ["--pipeline-model-parallel-size", "2"]], ids=["dp2", "pp2"])
def test_a_loss_that_is_not_finite_is_skipped_or_ends_the_run(layout, ranks, arguments, tmp_path):
    bad = [9, 10]  # both in the third global batch of 4
    typed = [*arguments(5), *layout]
    results = ranks.run(2, survival_job.train_with_bad_samples, [*typed, "--on-nonfinite", "skip"], bad)
    outputs = [output for output, _, _ in results]
    assert all(code is None for _, _, code in results)
    assert "step 3: the loss of samples 9, 10 is not finite; its update is skipped" in outputs[0]
    seen = norms(outputs)
    assert sorted(seen) == [1, 2, 4, 5] and max(seen.values()) < 1e6  # Megatron prints no norm of a skipped step

    results = ranks.run(2, survival_job.train_with_bad_samples, [*typed, *folder(tmp_path / "run", 1)], bad)
    assert [code for _, _, code in results] == [2, 2]
    reason = "step 3: the loss of samples 9, 10 is not finite; the parameters are those of step 2"
    assert f"error: {reason}" in results[0][1]
    assert (tmp_path / "run" / "error.txt").read_text() == reason + "\n"
    assert complete_iterations(tmp_path / "run" / "checkpoints") == [1, 2]


def test_a_rank_that_hangs_ends_the_job_with_every_stack(ranks, arguments, tmp_path):
    with pytest.raises(AssertionError, match="died without an answer"):
        ranks.run(2, survival_job.hang, [*arguments(5), "--step-timeout-minutes", "0.05"], tmp_path)
    waiting, asleep = ((tmp_path / f"{rank}.err").read_text() for rank in (0, 1))
    assert "Timeout (0:00:03)" in waiting and "Timeout (0:00:03)" in asleep
    sleeps = re.compile(r"survival_job.py.* in call$", re.MULTILINE)
    assert sleeps.search(asleep) and not sleeps.search(waiting)  # the stacks say who holds up whom
