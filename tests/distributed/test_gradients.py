"""Loss and every gradient: one process against transformers in fp64, and every layout against one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import jobs
from tests.distributed.models import reference, samples, split_in_every_chunk

VIEWS = split_in_every_chunk()
TP2, CP2, CP4, PP2 = (
    ["--tensor-model-parallel-size", "2"],
    ["--context-parallel-size", "2"],
    ["--context-parallel-size", "4"],
    ["--pipeline-model-parallel-size", "2"],
)
SP = ["--sequence-parallel"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
SELECTIVE = ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"]
WEIGHT = ["--rpsd-kl-weight", "0.7"]

LAYOUTS = {
    "tp2": (2, TP2),
    "cp2": (2, CP2),
    "cp4": (4, CP4),
    "pp2": (2, PP2),
    "dp2": (2, []),
    "tp2_sp": (2, TP2 + SP),
    "tp2_cp2": (4, TP2 + CP2),
    "tp2_cp2_sp": (4, TP2 + CP2 + SP),
    "pp2_cp2": (4, PP2 + CP2),
    "interleaved": (2, PP2 + ["--num-layers-per-virtual-pipeline-stage", "1"]),
    "dp2_cp2": (4, CP2),
    "recompute_full": (1, FULL),
    "recompute_selective_cp2": (2, CP2 + SELECTIVE),
    "pp2_recompute_full_sp": (4, PP2 + TP2 + SP + FULL),
}


def largest_error(gradients: dict, expected: dict) -> float:
    """Largest relative error of a tensor, in the 2-norm: |g - g'| / |g'|."""
    assert gradients.keys() == expected.keys()
    errors = {
        name: (gradients[name].double() - value.double()).norm().item() / value.double().norm().item()
        for name, value in expected.items()
    }
    return max(errors.values())


@pytest.fixture(scope="module")
def one_process(ranks):
    """Results of one process, computed once per (model, flags)."""
    known = {}

    def run(folder, flags, masked):
        key = (folder, tuple(flags), masked)
        if key not in known:
            known[key] = ranks.run(1, jobs.step, folder, flags, samples(len(VIEWS), masked), VIEWS)[0]
        return known[key]

    return run


@pytest.mark.parametrize("masked", [False, True], ids=["all_tokens", "masked"])
@pytest.mark.parametrize("objective", ["standard", "pose", "rpsd"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_one_process_equals_transformers_and_the_definition(family, objective, masked, one_process, request):
    folder = request.getfixturevalue(f"tiny_{family}")
    weight = WEIGHT if objective == "rpsd" else []
    losses, gradients = one_process(folder, ["--objective", objective, *weight], masked)
    sample = samples(len(VIEWS), masked)
    expected_losses, expected = reference(folder, sample, VIEWS, objective, 0.7)
    assert losses["clm"] == pytest.approx(expected_losses["clm"], rel=1e-5)
    if objective == "rpsd":
        assert expected_losses["kl"] > 0.01  # the views differ, so the comparison means something
        assert losses["kl"] == pytest.approx(expected_losses["kl"], rel=1e-5)
    # fp32 against fp64: an error of a few 1e-6 is what transformers itself shows in fp32.
    assert largest_error(gradients, expected) < 2e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(layout, ranks, one_process, tiny_llama):
    world_size, flags = LAYOUTS[layout]
    objective = ["--objective", "rpsd", *WEIGHT]
    losses, gradients = ranks.run(
        world_size, jobs.step, tiny_llama, objective + flags, samples(len(VIEWS), True), VIEWS
    )[0]
    expected_losses, expected = one_process(tiny_llama, objective, True)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert largest_error(gradients, expected) < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_biases_and_query_key_norms_under_every_parallelism(family, ranks, one_process, request):
    folder = request.getfixturevalue(f"tiny_{family}")
    objective = ["--objective", "rpsd", *WEIGHT]
    losses, gradients = ranks.run(
        8, jobs.step, folder, objective + TP2 + CP2 + PP2 + SP, samples(len(VIEWS), True), VIEWS
    )[0]
    expected_losses, expected = one_process(folder, objective, True)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert largest_error(gradients, expected) < 1e-5


@pytest.mark.parametrize("flags, world_size", [([], 1), (TP2 + CP2, 4), (PP2, 2)], ids=["one", "tp2_cp2", "pp2"])
def test_micro_batches_of_two_and_gradient_accumulation(flags, world_size, ranks, one_process, tiny_llama):
    objective = ["--objective", "rpsd", *WEIGHT]
    losses, gradients = ranks.run(
        world_size, jobs.step, tiny_llama, objective + flags, samples(len(VIEWS), True), VIEWS, 2
    )[0]
    expected_losses, expected = one_process(tiny_llama, objective, True)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert largest_error(gradients, expected) < 1e-5


def test_the_comparison_notices_a_wrong_gradient(one_process, tiny_llama):
    _, gradients = one_process(tiny_llama, ["--objective", "rpsd", *WEIGHT], True)
    wrong = {name: value * (1 + 2e-5) for name, value in gradients.items()}
    assert largest_error(wrong, gradients) > 1e-5
    assert torch.stack([value.norm() for value in gradients.values()]).min() > 0
