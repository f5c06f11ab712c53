"""FP8's health figures: 0 for sound attention, more where it sees the future; and in a run, before its first step."""

from __future__ import annotations

import json

import pytest

from megatron_rpsd.checkpoint.convert import import_hf
from tests.distributed import attention_job, training_job
from tests.distributed.corpus import run_arguments, write_corpus

CP2, TP2 = ["--context-parallel-size", "2"], ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
OVERLAPPED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


@pytest.mark.parametrize(
    "flags, world_size",
    [([], 1), ([*CP2, *TP2], 4), (["--pipeline-model-parallel-size", "2"], 2)],
    ids=["one", "tp2_cp2", "pp2"],
)
def test_health_figures_are_zero_and_show_a_leak(flags, world_size, ranks, tiny_llama):
    found = ranks.run(world_size, attention_job.health, tiny_llama, flags)
    for rank in found:
        sound, leaking = rank["sound"], rank["leaking"]
        assert sound.future_leak == 0 and sound.hidden > 0
        assert abs(sound.view_kl) < 1e-6  # rows of one product may round differently, which shows in second order
        assert leaking.future_leak > 1e-5 * leaking.hidden
        assert (sound, leaking) == (found[0]["sound"], found[0]["leaking"])
        assert rank["fp8"] == ("hybrid", None) and not rank["keys"]


def test_a_run_is_measured_first_and_trains_as_without(ranks, tiny_llama, tmp_path):
    checkpoint = tmp_path / "llama"
    ranks.run(1, import_hf, tiny_llama, checkpoint)
    arguments = [*run_arguments(checkpoint, write_corpus(tmp_path / "corpus"), 2), *OVERLAPPED]
    lines, printed = {}, {}
    for name, job in (("plain", training_job.train), ("measured", attention_job.train_measured)):
        folder = tmp_path / name
        printed[name] = ranks.run(2, job, [*arguments, "--run-dir", str(folder), "--save-interval", "2"])[0]
        lines[name] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {name: [line for line in found if line.get("iteration")] for name, found in lines.items()}
    for plain, measured in zip(steps["plain"], steps["measured"], strict=True):
        assert {key: plain[key] for key in ("lm loss", "grad-norm")} == {
            key: measured[key] for key in ("lm loss", "grad-norm")
        }
    (first,) = (line for line in lines["measured"] if line.get("iteration") == 0)
    assert first["fp8 future leak"] == first["bf16 future leak"] == 0
    assert abs(first["fp8 view kl"]) < 1e-6
    said = [line for line in printed["measured"].splitlines() if "health at" in line]
    assert len(said) == 2 and said[0].startswith("fp8 health at 32 tokens") and "health at" not in printed["plain"]
