"""What the sampler draws for the further arms: ablation views, PoSE's chunks, and splits from a range."""

import itertools
import math
import pickle

import numpy as np
import pytest

from megatron_rpsd.positions import POSE_CHUNKS, StepShape, View, ViewSampler, chunk_permutation_view, nope_view
from tests.unit.positions.test_sampler import assert_uniform

INDICES = (0, 1, 2**40)


def pieces(view: View) -> list[tuple[int, int]]:
    return [(view.split, view.shift), *view.jumps]


# As first drawn (numpy 2.5). A difference means that a resumed run would see other views.
GOLDEN = [
    (
        ViewSampler(1234, "chunk-permutation", 4096, permutation_chunks=4),
        [
            [(0, 0), (1024, 1024), (2048, -1024), (3072, 0)],
            [(0, 3072), (1024, 1024), (2048, -1024), (3072, -3072)],
            [(0, 1024), (1024, 1024), (2048, -2048), (3072, 0)],
        ],
    ),
    (ViewSampler(1234, POSE_CHUNKS, 4096), [[(313, 3717)], [(175, 1193)], [(1670, 593)]]),
    (
        ViewSampler(1234, POSE_CHUNKS, 65536, pose_chunks=4, target_length=262144),
        [
            [(10010, 178392), (10142, 194740), (50140, 195750)],
            [(5574, 57283), (33918, 118422), (56706, 135024)],
            [(12098, 28502), (37865, 172201), (53411, 194307)],
        ],
    ),
    (
        ViewSampler(1234, "skip", 4096, split_range=(0.25, 0.75), granule=64),
        [[(1536, 2560)], [(1600, 2827)], [(2112, 1406)]],
    ),
]


@pytest.mark.parametrize(("sampler", "expected"), GOLDEN)
def test_golden_views(sampler: ViewSampler, expected: list):
    assert [pieces(sampler.view(index)) for index in INDICES] == expected


@pytest.mark.parametrize("step", [StepShape(), StepShape(24, 2, 3)], ids=["alone", "dp3"])
@pytest.mark.parametrize("kind", ["chunk-permutation", POSE_CHUNKS])
def test_a_view_is_the_sample_s_own_on_every_rank_and_after_a_resume(kind: str, step: StepShape):
    def sampler(sampling: str) -> ViewSampler:
        return ViewSampler(5, kind, 64, pose_chunks=3, split_sampling=sampling, step=step)

    expected = [ViewSampler(5, kind, 64, pose_chunks=3).view(index) for index in range(40)]
    assert len(set(expected)) > 35
    for sampling in ("stratified", "independent"):
        backward = [sampler(sampling).view(index) for index in reversed(range(40))]
        assert backward[::-1] == expected  # neither layout nor order matter
        resumed = pickle.loads(pickle.dumps(sampler(sampling)))
        assert [resumed.view(index) for index in range(17, 40)] == expected[17:]


def test_nope_is_always_the_same_view_and_costs_a_whole_one():
    sampler = ViewSampler(3, "nope", 64, apply_probability=0.5)
    draws = [sampler.draw(index) for index in range(400)]
    assert {(draw.view, draw.kl_weight) for draw in draws} == {(nope_view(), 2.0), (View.identity(), 0.0)}
    assert 150 < sum(draw.kl_weight > 0 for draw in draws) < 250
    assert sampler.expected_suffix() == (0.5, 0.5)


def test_every_order_of_the_chunks_but_the_identity_is_as_likely():
    sampler = ViewSampler(7, "chunk-permutation", 21, permutation_chunks=4)
    views = [chunk_permutation_view(order, 21) for order in itertools.permutations(range(4))]
    number = {view: index - 1 for index, view in enumerate(views)}  # the first one is the identity: -1
    assert_uniform(np.array([number[sampler.view(index)] for index in range(9000)]), 23)


def test_two_chunks_are_swapped():
    sampler = ViewSampler(7, "chunk-permutation", 5, permutation_chunks=2)
    assert {tuple(sampler.view(index).position_ids(5).tolist()) for index in range(20)} == {(3, 4, 0, 1, 2)}


def test_two_chunk_pose_is_the_original():
    """First chunk U{1..(L+1)//2}, second chunk's skip U{0..L_t - L}, independent (arXiv 2309.10400)."""
    sampler = ViewSampler(7, POSE_CHUNKS, 11, target_length=20)
    views = [sampler.view(index) for index in range(9000)]
    assert all(not view.jumps and view.stride == 1 for view in views)
    first, skip = np.array([view.split for view in views]) - 1, np.array([view.shift for view in views])
    assert_uniform(first, 6)
    assert_uniform(skip, 10)
    assert_uniform(first * 10 + skip, 60)


def test_many_chunk_pose_cuts_evenly_and_never_falls():
    sampler = ViewSampler(7, POSE_CHUNKS, 8, pose_chunks=3, target_length=12)
    views = [sampler.view(index) for index in range(9000)]
    cuts = list(itertools.combinations(range(1, 8), 2))  # every way to cut 8 tokens into 3 chunks
    assert_uniform(np.array([cuts.index(tuple(token for token, _ in pieces(view))) for view in views]), len(cuts))
    skips = [[shift for _, shift in pieces(view)] for view in views]
    assert all(0 <= one <= two <= 4 for one, two in skips)
    assert_uniform(np.array([one for one, _ in skips]), 5)
    for least in range(5):  # u_2 ~ U{u_1..L_t - L}
        later = np.array([two for one, two in skips if one == least]) - least
        if least < 4:
            assert_uniform(later, 5 - least)
    for view in views[:200]:
        positions = view.position_ids(8)
        assert positions[0] == 0 and positions.max() < 12 and (positions.diff() >= 1).all()


def test_the_default_target_length_is_the_skip_view_s_range():
    chunks = [ViewSampler(1, POSE_CHUNKS, 6).view(index).position_ids(6).max().item() for index in range(500)]
    skips = [ViewSampler(1, "skip", 6).view(index).position_ids(6).max().item() for index in range(500)]
    assert max(chunks) == max(skips) == 2 * 6 - 1


@pytest.mark.parametrize("sampling", ["stratified", "independent"])
def test_splits_stay_in_their_range_and_are_uniform_in_it(sampling: str):
    sampler = ViewSampler(
        9, "skip", 100, split_sampling=sampling, step=StepShape(4, 1, 1), split_range=(0.1, 0.35), granule=5
    )
    splits = np.array([sampler.view(index).split for index in range(8000)])
    assert set(splits) == {10, 15, 20, 25, 30}
    assert_uniform(splits[::4] // 5 - 2, 5)
    assert all(draw.kl_weight == 1 for draw in map(sampler.draw, range(50)))
    if sampling == "stratified":  # the strata cut the range, not the sequence: 10..16, 16..22, 22..28, 28..34
        places = np.sort(splits.reshape(-1, 4), axis=1)
        assert (places.min(axis=0) == [10, 15, 20, 25]).all() and (places.max(axis=0) == [15, 20, 25, 30]).all()


def test_a_range_whose_lower_end_is_no_multiple_starts_at_the_next_one():
    sampler = ViewSampler(9, "skip", 100, split_range=(0.33, 0.97), granule=16)
    splits = {sampler.view(index).split for index in range(2000)}
    assert splits == {48, 64, 80, 96}  # 33 is rounded up: rounding a split down never leaves the range


def test_bounds_are_the_typed_decimals():
    """0.07 x 100 is 7.000000000000001 in binary: its ceiling would be 8."""
    assert math.ceil(0.07 * 100) == 8
    sampler = ViewSampler(9, "skip", 100, split_range=(0.07, 0.09))
    assert {sampler.view(index).split for index in range(200)} == {7, 8}


def test_the_whole_range_is_the_default():
    plain, whole = ViewSampler(9, "skip", 100), ViewSampler(9, "skip", 100, split_range=(0, 1))
    assert [plain.draw(index) for index in range(200)] == [whole.draw(index) for index in range(200)]


def test_a_density_in_a_range_is_unbiased_for_the_range():
    sampler = ViewSampler(9, "skip", 100, split_range=(0.2, 0.6), split_density=0.8)
    draws = [sampler.draw(index) for index in range(8000)]
    splits, weights = np.array([draw.view.split for draw in draws]), np.array([draw.kl_weight for draw in draws])
    assert splits.min() >= 20 and splits.max() < 60 and splits.mean() > 42
    for function in (np.ones_like, lambda s: s / 100, lambda s: s > 50):
        values = weights * function(splits)
        uniform = np.mean(function(np.arange(20, 60)))
        assert abs(values.mean() - uniform) < 4 * values.std() / np.sqrt(len(values)) + 2e-3
    linear, attention = sampler.expected_suffix()
    x = (splits + 0.5) / 100
    assert abs(np.mean(1 - x) - linear) < 0.01
    assert abs(np.mean(1 - x**2) - attention) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split_range": (0.5, 0.5)}, "--rpsd-split-range 0.5 0.5.*LOW < HIGH"),
        ({"split_range": (-0.1, 0.5)}, "--rpsd-split-range -0.1 0.5"),
        ({"split_range": (0.5, 1.1)}, "--rpsd-split-range 0.5 1.1"),
        ({"split_range": (float("nan"), 1.0)}, "--rpsd-split-range nan 1"),
        ({"split_range": (0.3, 0.45), "granule": 8}, r"4.8 <= s < 7.2.*no multiple of --rpsd-split-granule 8.*is 8\)"),
        ({"split_range": (0.0, 0.5), "perturbation": "cyclic"}, "--rpsd-split-range 0 0.5: cyclic"),
        ({"split_range": (0.0, 0.5), "perturbation": "nope"}, "--rpsd-split-range 0 0.5: nope"),
        ({"perturbation": "nope", "max_shift": 5}, "--rpsd-max-shift 5 .*nope"),
        ({"perturbation": "chunk-permutation", "permutation_chunks": 1}, "--rpsd-permutation-chunks 1 .*2..--seq-"),
        ({"perturbation": "chunk-permutation", "permutation_chunks": 17}, "--rpsd-permutation-chunks 17 .*16"),
        ({"perturbation": POSE_CHUNKS, "pose_chunks": 1}, "--pose-chunks 1 "),
        ({"perturbation": POSE_CHUNKS, "pose_chunks": 17}, "--pose-chunks 17 .*16"),
        ({"perturbation": POSE_CHUNKS, "target_length": 16}, "--pose-target-length 16 .*--seq-length 16.*= 0"),
    ],
)
def test_bad_arguments_name_their_flag(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ViewSampler(**{"seed": 0, "perturbation": "skip", "length": 16, **arguments})
