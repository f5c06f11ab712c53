"""The sampler: uniform, and a function of (seed, sample index) alone."""

import pickle

import numpy as np
import pytest

from megatron_rpsd.positions import StepShape, View, ViewSampler

INDICES = (0, 1, 2, 10**6, 2**40)
DRAWS = 12_000

# The views of INDICES, as first drawn (numpy 2.5). A difference means that a resumed run would see other views.
SHAPE = StepShape(global_batch_size=32, micro_batch_size=2, data_parallel_size=4)
GOLDEN = [
    (
        ViewSampler(seed=1234, perturbation="skip", length=4096),
        [(1110, 2560), (1226, 2827), (3719, 3405), (2789, 1327), (2208, 1406)],
    ),
    (
        ViewSampler(seed=1234, perturbation="skip", length=65536, max_shift=1000),
        [(17765, 625), (19620, 691), (59519, 832), (44631, 324), (35334, 344)],
    ),
    (
        ViewSampler(seed=2**64 - 1, perturbation="skip", length=262144),
        [(120408, 208889), (165156, 26417), (43114, 108549), (100242, 209076), (199943, 39467)],
    ),
    (
        ViewSampler(seed=1234, perturbation="cyclic", length=4096),
        [(1111, -4096), (1226, -4096), (3720, -4096), (2789, -4096), (2208, -4096)],
    ),
    (
        ViewSampler(1234, "skip", 65536, granule=512, split_sampling="stratified", step=SHAPE, split_density=0.5),
        [(28672, 40958), (28672, 45230), (28672, 54465), (43008, 21227), (34816, 22494)],
    ),
]


def chi_square_limit(degrees: int) -> float:
    """Value that chi-square exceeds with probability 0.001, by Wilson and Hilferty (3.09 = normal quantile)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.09 * spread**0.5) ** 3


def assert_uniform(values: np.ndarray, bins: int) -> None:
    """values in 0..bins-1; every bin must occur about equally often. Seeds are fixed, so this cannot flicker."""
    assert values.min() >= 0 and values.max() < bins
    counts = np.bincount(values, minlength=bins)
    expected = len(values) / bins
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(bins - 1)


@pytest.fixture(scope="module")
def skips() -> tuple[np.ndarray, np.ndarray]:
    """Splits and shifts of consecutive samples, L = 12, Y = 10."""
    sampler = ViewSampler(seed=7, perturbation="skip", length=12, max_shift=10)
    views = [sampler.view(i) for i in range(DRAWS)]
    return np.array([view.split for view in views]), np.array([view.shift for view in views])


@pytest.mark.parametrize(("sampler", "views"), GOLDEN)
def test_golden_views(sampler: ViewSampler, views: list[tuple[int, int]]):
    assert [sampler.view(index) for index in INDICES] == [View(split, shift) for split, shift in views]


def test_split_and_shift_are_uniform_and_independent(skips):
    splits, shifts = skips
    assert_uniform(splits, 12)
    assert_uniform(shifts - 1, 10)
    assert_uniform(splits * 10 + shifts - 1, 120)


def test_consecutive_samples_are_independent(skips):
    splits, shifts = skips
    assert_uniform(splits[:-1:2] * 12 + splits[1::2], 144)
    assert_uniform((shifts[:-1:2] - 1) * 10 + shifts[1::2] - 1, 100)


def test_max_shift_is_the_length_by_default():
    sampler = ViewSampler(seed=3, perturbation="skip", length=9)
    assert sampler.max_shift == 9
    assert_uniform(np.array([sampler.view(i).shift for i in range(3000)]) - 1, 9)


def test_cyclic_rotation_is_uniform_without_the_identity():
    sampler = ViewSampler(seed=7, perturbation="cyclic", length=12)
    views = [sampler.view(i) for i in range(DRAWS)]
    assert {view.shift for view in views} == {-12}
    assert_uniform(np.array([12 - view.split for view in views]) - 1, 11)


def test_neither_order_nor_process_nor_earlier_draws_matter():
    sampler = ViewSampler(seed=5, perturbation="skip", length=1000)
    forward = [sampler.view(i) for i in range(50)]
    backward = [sampler.view(i) for i in reversed(range(50))]
    assert backward[::-1] == forward
    elsewhere = pickle.loads(pickle.dumps(sampler))
    np.random.seed(0)
    assert [elsewhere.view(i) for i in range(17, 50)] == forward[17:]


def test_seeds_and_samples_differ():
    def draws(seed: int) -> list[View]:
        sampler = ViewSampler(seed=seed, perturbation="skip", length=2**20)
        return [sampler.view(i) for i in range(200)]

    assert len(set(draws(0))) == 200
    # Seed + 1 must not be the same list one sample later, as with seeds made by adding the index.
    assert not set(draws(0)) & set(draws(1))


@pytest.mark.parametrize("number", [1, 2])
def test_shortest_lengths(number: int):
    assert ViewSampler(seed=0, perturbation="skip", length=2, max_shift=number).view(0).shift <= number
    assert ViewSampler(seed=0, perturbation="cyclic", length=2).view(number) == View(split=1, shift=-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"perturbation": "chunk"}, "--rpsd-perturbation chunk .*skip, cyclic, nope, chunk-permutation"),
        ({"max_shift": 0}, "--rpsd-max-shift 0 "),
        ({"max_shift": -3}, "--rpsd-max-shift -3 "),
        ({"perturbation": "cyclic", "max_shift": 5}, "--rpsd-max-shift 5 .*--seq-length 16"),
        ({"length": 1}, "--seq-length 1 .*at least 2"),
        ({"seed": -1}, "--rpsd-seed -1 "),
        ({"seed": 2**64}, "--rpsd-seed 18446744073709551616 "),
        ({"granule": 0}, "--rpsd-split-granule 0 "),
        ({"granule": 17}, "--rpsd-split-granule 17 .*16"),
        ({"split_sampling": "greedy"}, "--rpsd-split-sampling greedy .*stratified or independent"),
        ({"apply_probability": 0.0}, "--rpsd-apply-probability 0.0 "),
        ({"split_density": 1.0}, "--rpsd-split-density 1.0 "),
    ],
)
def test_bad_arguments_name_their_flag(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ViewSampler(**{"seed": 0, "perturbation": "skip", "length": 16, **arguments})


STEP = StepShape(global_batch_size=24, micro_batch_size=2, data_parallel_size=3)  # 4 micro-steps of 3 x 2 samples


def stratified(**options) -> ViewSampler:
    return ViewSampler(seed=11, perturbation="skip", length=96, split_sampling="stratified", step=STEP, **options)


def test_stratified_splits_are_one_a_micro_step_and_one_a_stratum():
    sampler = stratified()
    orders = set()
    for step in range(50):
        splits = [sampler.view(24 * step + index).split for index in range(24)]
        micro_steps = [splits[6 * k : 6 * k + 6] for k in range(4)]
        assert all(len(set(micro_step)) == 1 for micro_step in micro_steps)
        strata = [micro_step[0] // 24 for micro_step in micro_steps]
        assert sorted(strata) == [0, 1, 2, 3]
        orders.add(tuple(strata))
    assert len(orders) > 10


def test_the_marginals_of_stratified_draws_are_uniform():
    sampler = stratified(max_shift=10)
    views = [sampler.view(6 * micro_step + micro_step % 6) for micro_step in range(DRAWS)]
    splits, shifts = np.array([view.split for view in views]), np.array([view.shift for view in views])
    assert_uniform(splits[0::4], 96)  # within a step strata repel each other: test one draw a step
    assert_uniform(splits[3::4], 96)
    assert_uniform(shifts - 1, 10)


def test_shifts_are_per_sample_and_independent_splits_per_micro_batch():
    sampler = stratified()
    assert len({sampler.view(index).shift for index in range(6)}) > 2
    alone = ViewSampler(seed=11, perturbation="skip", length=96, step=STEP)
    splits = [alone.view(index).split for index in range(24)]
    assert all(splits[k] == splits[k + 1] for k in range(0, 24, 2))
    assert len(set(splits)) > 6


def test_rounding_down_to_a_granule_moves_the_mean_by_half_of_it_less_half_a_token():
    exact, rounded = stratified(), stratified(granule=16)
    pairs = [(exact.view(6 * k).split, rounded.view(6 * k).split) for k in range(2000)]
    assert all(coarse == fine // 16 * 16 for fine, coarse in pairs)
    difference = np.mean([fine - coarse for fine, coarse in pairs])
    assert abs(difference - 7.5) < 4 * np.sqrt((16**2 - 1) / 12 / 2000)
    assert_uniform(np.array([coarse // 16 for _, coarse in pairs[::4]]), 6)


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_a_density_on_short_suffixes_is_unbiased_with_its_weights(density: float):
    sampler = stratified(split_density=density)
    draws = [sampler.draw(6 * k) for k in range(8000)]
    x = (np.array([draw.view.split for draw in draws]) + 0.5) / 96
    weights = np.array([draw.kl_weight for draw in draws])
    assert np.mean(x) > 0.5 + density / 6 - 0.01  # the mean of density 1 - a + 2 a x
    for function in (np.ones_like, lambda x: x, lambda x: (1 - x) ** 2, lambda x: x > 0.7):
        values = weights * function(x)
        uniform = np.mean(function((np.arange(96) + 0.5) / 96))
        assert abs(values.mean() - uniform) < 4 * values.std() / np.sqrt(len(values)) + 1e-3
    linear, attention = sampler.expected_suffix()
    assert abs(np.mean(1 - x) - linear) < 0.01
    assert abs(np.mean(1 - x**2) - attention) < 0.01


def test_applying_the_kl_to_a_share_of_micro_steps_is_unbiased():
    sampler = stratified(apply_probability=0.25)
    micro_steps = [[sampler.draw(6 * k + rank).kl_weight for rank in range(6)] for k in range(4000)]
    assert all(len(set(weights)) == 1 for weights in micro_steps)  # all ranks of a micro-step agree
    weights = np.array([weights[0] for weights in micro_steps])
    assert set(weights) == {0.0, 4.0}
    assert abs(weights.mean() - 1) < 4 * np.sqrt(3 / 4000)
    assert sampler.expected_suffix() == (0.125, pytest.approx(1 / 6))
