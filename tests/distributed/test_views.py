"""A perturbed view changes the output, the identity changes nothing; a view's place in the layout does not matter."""

from __future__ import annotations

import pytest
import torch

from megatron_rpsd.positions import View, cyclic_view
from tests.distributed import jobs
from tests.distributed.models import LENGTH, samples

SAMPLE = samples(4, masked=False)
IDENTITY = [View.identity()] * 4
SKIP = [View(split=LENGTH // 2, shift=5)] * 4


def run(ranks, folder, objective, views, flags=(), world_size=1, **keywords):
    arguments = ["--objective", objective, *flags]
    micro_batch, start = keywords.get("micro_batch", 1), keywords.get("suffix_start", 0)
    return ranks.run(world_size, jobs.step, folder, arguments, SAMPLE, views, micro_batch, start)[0]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_perturbed_view_changes_the_output(family, ranks, request):
    folder = request.getfixturevalue(f"tiny_{family}")
    standard, _ = run(ranks, folder, "standard", IDENTITY)
    for views in (SKIP, [cyclic_view(LENGTH // 2, LENGTH)] * 4):
        perturbed, _ = run(ranks, folder, "pose", views)
        assert abs(perturbed["clm"] - standard["clm"]) > 1e-3


def test_the_identity_changes_nothing_bitwise(ranks, tiny_llama):
    expected_losses, expected = run(ranks, tiny_llama, "standard", IDENTITY)
    losses, gradients = run(ranks, tiny_llama, "pose", IDENTITY)
    assert losses == expected_losses
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())


@pytest.mark.parametrize("flags, world_size", [((), 1), (("--context-parallel-size", "2"), 2)], ids=["one", "cp2"])
def test_the_kl_of_equal_views_and_its_gradient_vanish(flags, world_size, ranks, tiny_llama):
    expected_losses, expected = run(ranks, tiny_llama, "standard", IDENTITY, flags, world_size)
    losses, gradients = run(ranks, tiny_llama, "rpsd", IDENTITY, flags, world_size)
    # Both readings stand in one matrix product, whose rows may round differently: the KL is 0 to second order of that.
    assert abs(losses["kl"]) < 1e-6
    assert losses["clm"] == pytest.approx(expected_losses["clm"], rel=1e-6)
    for name, value in expected.items():
        assert (gradients[name] - value).norm() < 1e-5 * value.norm()


TP2, CP2, PP2 = (
    ["--tensor-model-parallel-size", "2"],
    ["--context-parallel-size", "2"],
    ["--pipeline-model-parallel-size", "2"],
)
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
SELECTIVE = ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"]
SHARED_PREFIX_LAYOUTS = {
    "one": (1, []),
    "tp2_sp": (2, TP2 + ["--sequence-parallel"]),
    "cp2_selective": (2, CP2 + SELECTIVE),
    "tp2_cp2": (4, TP2 + CP2),
    "pp2_recompute": (2, PP2 + FULL),
    "interleaved": (2, PP2 + ["--num-layers-per-virtual-pipeline-stage", "1"]),
}


def views_at(kind: str, split: int) -> list[View]:
    if kind == "cyclic":
        return [cyclic_view(LENGTH - split, LENGTH)] * 4
    return [View(split, shift) for shift in (1, 9, 17, 32)]


@pytest.fixture(scope="module")
def whole_second_view(ranks, tiny_qwen3):
    """Loss and gradients of one process that runs a whole second view."""
    known = {}

    def results(kind, split):
        if (kind, split) not in known:
            known[kind, split] = run(ranks, tiny_qwen3, "rpsd", views_at(kind, split))
        return known[kind, split]

    return results


# One granule, the middle, the last granule; split 0 is a whole second view by construction.
@pytest.mark.parametrize("kind, split", [("skip", 4), ("skip", 16), ("skip", 28), ("cyclic", 4), ("cyclic", 28)])
@pytest.mark.parametrize("layout", SHARED_PREFIX_LAYOUTS)
def test_sharing_the_prefix_equals_a_whole_second_view(layout, kind, split, ranks, whole_second_view, tiny_qwen3):
    world_size, flags = SHARED_PREFIX_LAYOUTS[layout]
    expected_losses, expected = whole_second_view(kind, split)
    losses, gradients = run(
        ranks, tiny_qwen3, "rpsd", views_at(kind, split), flags, world_size, suffix_start=split, micro_batch=2
    )
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, value in expected.items():
        assert (gradients[name] - value).norm() < 1e-5 * value.norm(), name


def test_sharing_the_prefix_in_bf16_stays_within_twice_the_rounding_of_the_whole_second_view(
    ranks, whole_second_view, tiny_qwen3
):
    _, exact = whole_second_view("skip", 16)
    views, flags = views_at("skip", 16), ["--bf16"]
    _, whole = run(ranks, tiny_qwen3, "rpsd", views, flags)
    _, shared = run(ranks, tiny_qwen3, "rpsd", views, flags, suffix_start=16)
    for name, value in exact.items():
        rounding = (whole[name].float() - value).norm()
        assert (shared[name].float() - value).norm() < 2 * rounding + 1e-3 * value.norm(), name
