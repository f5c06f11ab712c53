"""Whole runs through Megatron's loop: resume repeats, every layout trains the same, what a run logs and refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rpsd.checkpoint.convert import different_tensors, export_hf, import_hf
from tests.distributed import training_job
from tests.distributed.corpus import run_arguments, write_corpus
from tests.distributed.models import LENGTH

TP2, CP2, PP2 = (
    ["--tensor-model-parallel-size", "2"],
    ["--context-parallel-size", "2"],
    ["--pipeline-model-parallel-size", "2"],
)
DISTRIBUTED_OPTIMIZER = ["--use-distributed-optimizer"]


@pytest.fixture(scope="module")
def checkpoint(ranks, tiny_llama, tmp_path_factory) -> Path:
    """The tiny Llama as a torch_dist checkpoint."""
    output = tmp_path_factory.mktemp("checkpoints") / "llama"
    ranks.run(1, import_hf, tiny_llama, output)
    return output


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "random")


def scalars(folder: Path, name: str) -> list[float]:
    """What a run wrote to tensorboard, step by step: fp32, every bit."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def train(ranks, world_size: int, folder: Path, arguments: list[str]) -> dict[str, list[float]]:
    ranks.run(world_size, training_job.train, [*arguments, "--tensorboard-dir", str(folder)])
    return {name: scalars(folder, name) for name in ("lm loss", "view kl", "mean split", "mean shift", "grad-norm")}


@pytest.mark.parametrize(
    "world_size, flags",
    [(2, DISTRIBUTED_OPTIMIZER), (4, TP2 + PP2), (2, CP2 + ["--bf16"])],
    ids=["dp2_distributed_optimizer", "tp2_pp2", "cp2_bf16"],
)
def test_ten_steps_equal_five_and_five_resumed_bitwise(world_size, flags, ranks, checkpoint, prefix, tmp_path):
    arguments = [*run_arguments(checkpoint, prefix, 10), *flags]
    whole = train(ranks, world_size, tmp_path / "whole", arguments)
    saved = ["--save", str(tmp_path / "run"), "--save-interval", "5", "--load", str(tmp_path / "run")]
    first = train(ranks, world_size, tmp_path / "first", [*arguments, *saved, "--exit-interval", "5"])
    second = train(ranks, world_size, tmp_path / "second", [*arguments, *saved])
    for name, expected in whole.items():
        assert len(first[name]) == len(second[name]) == 5
        assert first[name] + second[name] == expected, name
    assert len(set(whole["mean shift"])) > 5  # views differ from step to step


# Stratified splits belong to a micro-step, so they follow the data-parallel size; independent ones follow the sample.
SAME_SPLITS = ["--rpsd-split-sampling", "independent", "--rpsd-split-granule", "8"]


@pytest.fixture(scope="module")
def one_process_run(ranks, checkpoint, prefix, tmp_path_factory):
    return train(ranks, 1, tmp_path_factory.mktemp("one"), [*run_arguments(checkpoint, prefix, 6), *SAME_SPLITS])


@pytest.mark.parametrize(
    "world_size, flags",
    [
        (2, DISTRIBUTED_OPTIMIZER + ["--overlap-grad-reduce", "--overlap-param-gather"]),
        (4, TP2 + ["--sequence-parallel"] + CP2),
        (4, PP2 + DISTRIBUTED_OPTIMIZER),
        (2, PP2 + ["--num-layers-per-virtual-pipeline-stage", "1"]),
    ],
    ids=["dp2", "tp2_sp_cp2", "pp2_dp2", "interleaved"],
)
def test_every_layout_trains_the_same_run(world_size, flags, ranks, checkpoint, prefix, one_process_run, tmp_path):
    arguments = [*run_arguments(checkpoint, prefix, 6), *SAME_SPLITS, *flags]
    run = train(ranks, world_size, tmp_path, arguments)
    assert run["mean split"] == one_process_run["mean split"]  # the views come from the seed, not from the layout
    assert run["mean shift"] == one_process_run["mean shift"]
    for name in ("lm loss", "view kl", "grad-norm"):
        # Adam divides by the square root of tiny second moments, which magnifies the rounding of reordered sums.
        assert run[name] == pytest.approx(one_process_run[name], rel=1e-3), name


def test_bf16_follows_fp32(ranks, checkpoint, prefix, one_process_run, tmp_path):
    run = train(ranks, 1, tmp_path, [*run_arguments(checkpoint, prefix, 6), *SAME_SPLITS, "--bf16"])
    # bf16 keeps 8 bits: a loss near 5 nats moves by a few hundredths.
    assert run["lm loss"] == pytest.approx(one_process_run["lm loss"], rel=2e-2)


@pytest.mark.parametrize("objective", ["standard", "pose", "rpsd", "hard-label"])
def test_every_objective_logs_what_it_optimises(objective, ranks, checkpoint, prefix):
    perturbation = [] if objective == "standard" else ["--rpsd-perturbation", "cyclic"]
    arguments = [*run_arguments(checkpoint, prefix, 2), "--objective", objective, *perturbation]
    output = ranks.run(1, training_job.train, arguments)[0]
    line = next(line for line in output.splitlines() if re.search(r"iteration +2/ +2", line))
    logged = {part.split(":")[0].strip() for part in line.split("|")}
    assert "lm loss" in logged
    assert ("view kl" in logged) == (objective == "rpsd")
    assert ("mean split" in logged and "mean shift" in logged) == (objective != "standard")


def test_an_adapted_model_exports_at_the_window_it_was_trained_at(ranks, checkpoint, prefix, tiny_llama, tmp_path):
    import json

    longer = [*run_arguments(checkpoint, prefix, 2), "--rotary-base", "500000", "--max-position-embeddings", "128"]
    run = [*longer, "--save", str(tmp_path / "run"), "--save-interval", "2"]
    run = [*run, "--override-opt_param-scheduler"]
    ranks.run(2, training_job.train, [*run, *TP2])
    ranks.run(1, export_hf, tmp_path / "run", tiny_llama, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000
    assert ranks.run(1, different_tensors, tmp_path / "hf", tmp_path / "run")[0][1] == []
    compared, different = ranks.run(1, different_tensors, tiny_llama, tmp_path / "run")[0]
    assert compared == len(different)  # every tensor was trained


def good(checkpoint: Path, prefix: Path) -> list[str]:
    return run_arguments(checkpoint, prefix, 2)


REFUSED = {
    "length": (["--seq-length", "30", *CP2], 2, ["--seq-length 30", "2 x CP = 4", "28", "32"]),
    "length_sp": (["--seq-length", "36", *CP2, *TP2, "--sequence-parallel"], 4, ["--seq-length 36", "2 x CP x TP = 8"]),
    "kv_heads": (["--tensor-model-parallel-size", "4"], 4, ["--tensor-model-parallel-size 4", "--num-query-groups 2"]),
    "heads": (["--tensor-model-parallel-size", "3"], 3, ["--tensor-model-parallel-size 3", "--num-attention-heads 4"]),
    "perturbation": (["--rpsd-perturbation", "twist"], 1, ["--rpsd-perturbation", "twist", "skip"]),
    "weight": (["--rpsd-kl-weight", "-1"], 1, ["--rpsd-kl-weight -1", "at least 0"]),
    "shift": (["--rpsd-max-shift", "0"], 1, ["--rpsd-max-shift 0", "at least 1"]),
    "shift_beyond_rope": (["--rpsd-max-shift", "16777216"], 1, ["--rpsd-max-shift", "16777216", str(2**24)]),
    "world": ([*TP2, *CP2], 3, ["world size", "2 x 2 x 1 = 4", "3"]),
    "no_data": (["--data-path", "/nowhere/corpus"], 1, ["/nowhere/corpus"]),
    "dropout": (["--attention-dropout", "0.1", "--hidden-dropout", "0.1"], 1, ["dropout"]),
    "warmup": (["--lr-warmup-iters", "2"], 1, ["--lr-warmup-iters 2", "2 steps"]),
    "granule": (["--rpsd-split-granule", "6", *CP2], 2, ["--rpsd-split-granule 6", "multiple of 4"]),
    "other_arm": (["--objective", "pose", "--rpsd-kl-weight", "1"], 2, ["--rpsd-kl-weight 1.0", "--objective pose"]),
    "no_split": (
        ["--rpsd-perturbation", "nope", "--rpsd-split-range", "0", "1"],
        1,
        ["--rpsd-split-range 0 1", "nope"],
    ),
    "no_split_fits": (
        ["--rpsd-split-range", "0.3", "0.45", "--rpsd-split-granule", "16"],
        1,
        ["--rpsd-split-range 0.3 0.45", "9.6 <= s < 14.4", "--rpsd-split-granule 16"],
    ),
    "rope": (["--rope-parameters", '{"rope_type": "yarn", "factor": 4}'], 1, ["--rope-parameters {", "original_max"]),
    "unknown_flag": (["--rpsd-shift", "4"], 1, ["--rpsd-shift"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(case, ranks, checkpoint, prefix):
    flags, world_size, parts = REFUSED[case]
    arguments = [*good(checkpoint, prefix), *flags]
    if case == "dropout":  # the checkpoint's own dropout wins under --use-checkpoint-args
        arguments = [word for word in arguments if word != "--use-checkpoint-args"]
        arguments += ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--vocab-size", "97"]
        arguments += ["--max-position-embeddings", str(LENGTH), "--position-embedding-type", "rope"]
    answers = ranks.run(world_size, training_job.refused, arguments)
    assert [code for code, _ in answers] == [2] * world_size
    lines = answers[0][1].splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), answers[0][1]
    for part in parts:
        assert part in lines[0]
    assert all(text == "" for _, text in answers[1:])  # one line a job, not one a rank


def test_data_of_another_vocabulary_is_refused(ranks, checkpoint, tmp_path):
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_rpsd.data.manifest import read_manifest

    prefix = write_corpus(tmp_path / "large")
    assert read_manifest(prefix) is None
    builder = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=numpy.int32)
    builder.add_document(torch.full((2000,), 500), [2000])
    builder.finalize(str(prefix) + ".idx")
    code, text = ranks.run(1, training_job.refused, good(checkpoint, prefix))[0]
    assert code == 2 and len(text.splitlines()) == 1
    assert "500" in text and "97" in text


def test_a_resumed_run_keeps_the_window_and_base_that_were_typed_once(ranks, checkpoint, prefix, tmp_path):
    arguments = run_arguments(checkpoint, prefix, 2)
    saved = ["--save", str(tmp_path / "run"), "--save-interval", "1", "--load", str(tmp_path / "run")]
    typed = ["--max-position-embeddings", "256", "--rotary-base", "20000"]
    ranks.run(1, training_job.train, [*arguments, *saved, *typed, "--exit-interval", "1"])
    (settled,) = ranks.run(1, training_job.settled_arguments, [*arguments, *saved])
    assert (settled["max_position_embeddings"], settled["rotary_base"]) == (256, 20000)
