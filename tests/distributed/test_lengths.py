"""Mixed lengths through the real model: a mixed step is the sum of its parts, and a resumed mix repeats itself."""

from __future__ import annotations

import pytest
import torch

from megatron_rpsd.checkpoint.convert import import_hf
from megatron_rpsd.positions import LengthSchedule, StepShape, View, ViewSampler, cut_rows, parse_share, scaled_step
from tests.distributed import jobs, training_job
from tests.distributed.corpus import run_arguments, write_corpus
from tests.distributed.models import LENGTH, reference, samples
from tests.distributed.test_gradients import CP2, PP2, TP2, largest_error
from tests.distributed.test_training import DISTRIBUTED_OPTIMIZER, scalars

SHORT, SEED, WEIGHT = 8, 11, 0.7
MIX = ["0.5:32", "0.5:8"]
FLAGS = [
    "--objective", "rpsd", "--rpsd-kl-weight", str(WEIGHT), "--rpsd-seed", str(SEED), "--rpsd-split-granule", "4",
    "--global-batch-size", "4",
]  # fmt: skip
STEP = StepShape(global_batch_size=4)
LAYOUTS = {"cp2": (2, CP2), "pp2": (2, PP2), "interleaved": (2, PP2 + ["--num-layers-per-virtual-pipeline-stage", "1"])}


def mixed_parts(granules: dict[int, int]) -> dict[int, tuple[dict, list[View]]]:
    """Length -> the sequences and views that four micro-steps of the mix read, by the schedule and the samplers."""
    sample = {**samples(4, masked=True), "sample_index": torch.arange(4)}
    schedule = LengthSchedule(SEED, LENGTH, tuple(map(parse_share, MIX)), step=STEP)
    parts = {}
    for length in schedule.lengths:
        chosen = [index for index in range(4) if schedule.at(index) == length]
        assert len(chosen) == 2  # half of four micro-steps each
        step = scaled_step(STEP, LENGTH // length)
        sampler = ViewSampler(SEED, "skip", length, granule=granules[length], split_sampling="stratified", step=step)
        rows = cut_rows({name: value[chosen] for name, value in sample.items()}, length)
        parts[length] = rows, [sampler.view(int(index)) for index in rows.pop("sample_index")]
    assert any(view.split for _, views in parts.values() for view in views)
    return parts


def weighed(results: list[tuple[dict, dict]], kept: list[float]) -> dict[str, torch.Tensor]:
    """Gradients of the mean over all kept tokens out of those of each part's mean."""
    names = results[0][1]
    return {
        name: sum(count * part[1][name].double() for part, count in zip(results, kept, strict=True)) / sum(kept)
        for name in names
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixed_step_is_the_sum_of_its_parts_given_as_batches(layout, ranks, tiny_qwen3):
    world_size, flags = LAYOUTS[layout]
    parts = mixed_parts({32: 4, 8: 4 if layout == "cp2" else 2})  # the granule is at most a length's own default
    sample = {**samples(4, masked=True), "sample_index": torch.arange(4)}
    given = [*FLAGS, *flags]
    by_hand = [
        ranks.run(world_size, jobs.step, tiny_qwen3, given, rows, views, LENGTH // length)[0]
        for length, (rows, views) in parts.items()
    ]
    expected = weighed(by_hand, [rows["loss_mask"].sum().item() for rows, _ in parts.values()])
    for execution, tolerance in (("full", 1e-6), ("shared-prefix", 1e-5)):
        mixed = [*given, "--length-mix", *MIX, "--rpsd-execution", execution]
        _, gradients = ranks.run(world_size, jobs.step, tiny_qwen3, mixed, sample, None)[0]
        assert largest_error(gradients, expected) < tolerance, execution
    _, whole = ranks.run(world_size, jobs.step, tiny_qwen3, given, sample, None)[0]
    assert largest_error(whole, expected) > 0.05  # what the mix changes is no rounding error


def test_a_mixed_step_equals_transformers(ranks, tiny_llama):
    parts = mixed_parts({32: 4, 8: 4})
    sample = {**samples(4, masked=True), "sample_index": torch.arange(4)}
    flags = [*FLAGS, *CP2, *TP2, "--length-mix", *MIX, "--rpsd-split-granule", "4"]
    losses, gradients = ranks.run(4, jobs.step, tiny_llama, flags, sample, None)[0]
    results = [reference(tiny_llama, rows, views, "rpsd", WEIGHT) for rows, views in parts.values()]
    kept = [rows["loss_mask"].sum().item() for rows, _ in parts.values()]
    clm = sum(count * part[0]["clm"] for part, count in zip(results, kept, strict=True)) / sum(kept)
    assert losses["clm"] == pytest.approx(clm, rel=1e-5)
    assert largest_error(gradients, weighed(results, kept)) < 2e-5


@pytest.fixture(scope="module")
def mixed_run(ranks, tiny_llama, tmp_path_factory):
    """Arguments of a run of 10 steps with a mix."""
    folder = tmp_path_factory.mktemp("lengths")
    ranks.run(1, import_hf, tiny_llama, folder / "checkpoint")
    return [*run_arguments(folder / "checkpoint", write_corpus(folder / "random"), 10), "--length-mix", *MIX]


NAMES = ("lm loss", "view kl", "mean split", "mean shift", "mean length", "grad-norm")


def train(ranks, world_size, folder, arguments) -> dict[str, list[float]]:
    ranks.run(world_size, training_job.train, [*arguments, "--tensorboard-dir", str(folder)])
    return {name: scalars(folder, name) for name in NAMES}


def test_a_resumed_mix_repeats_the_uninterrupted_one(ranks, mixed_run, tmp_path):
    arguments = [*mixed_run, *DISTRIBUTED_OPTIMIZER]
    whole = train(ranks, 2, tmp_path / "whole", arguments)
    saved = ["--save", str(tmp_path / "run"), "--save-interval", "5", "--load", str(tmp_path / "run")]
    first = train(ranks, 2, tmp_path / "first", [*arguments, *saved, "--exit-interval", "5"])
    second = train(ranks, 2, tmp_path / "second", [*arguments, *saved])
    for name, expected in whole.items():
        assert len(first[name]) == len(second[name]) == 5
        assert first[name] + second[name] == expected, name
    # 4 samples on 2 ranks are 2 micro-steps: a half each in every step, so the mean is that of the mix.
    assert whole["mean length"] == [(LENGTH + SHORT) / 2] * 10


def test_a_mix_trains_through_a_pipeline_and_longce_knows_short_sequences(ranks, mixed_run, tmp_path):
    steps = ["--train-iters", "2"]
    run = train(ranks, 2, tmp_path / "pp", [*mixed_run, *steps, *PP2])
    assert run["mean length"] == [(LENGTH + SHORT) / 2] * 2 and min(run["view kl"]) > 0
    longce = ["--longce", "--longce-context", "10", "--longce-stride", "6", "--longce-max-weight", "0.5"]
    only_short = [*mixed_run[: mixed_run.index("--length-mix")], *steps, "--length-mix", "1:8", "--tensorboard-dir"]
    ranks.run(1, training_job.train, [*only_short, str(tmp_path / "short"), *longce])
    assert scalars(tmp_path / "short", "longce weight") == [1, 1]  # every sequence is shorter than a window's context
    assert scalars(tmp_path / "short", "mean length") == [8, 8]


def test_evaluation_reads_whole_windows(ranks, mixed_run, tmp_path):
    still = ["--train-iters", "2", "--lr", "0", "--min-lr", "0", "--split", "60,40,0", "--eval-iters", "1"]
    found = []
    for name, arguments in (("mix", mixed_run), ("whole", mixed_run[: mixed_run.index("--length-mix")])):
        log = ["--tensorboard-dir", str(tmp_path / name)]
        ranks.run(1, training_job.train, [*arguments, *still, "--eval-interval", "1", *log])
        found.append(scalars(tmp_path / name, "lm loss validation"))
    assert found[0] and found[0] == found[1]
