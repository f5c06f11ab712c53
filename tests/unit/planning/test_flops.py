"""Operation counts against a model's real weights and against brute force."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rpsd.planning import ModelShape, step_flops, step_ratio_bound
from megatron_rpsd.planning.split_waiting import expected_step_time

SHAPE = ModelShape(3, 64, 96, 4, 2, 16, 97)


def test_weights_equal_those_of_a_real_model():
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    matrices = [weight for name, weight in LlamaForCausalLM(config).named_parameters() if weight.dim() == 2]
    assert SHAPE.weights_per_token == sum(weight.numel() for weight in matrices)


@pytest.mark.parametrize("start", [None, 0, 5, 11])
def test_pairs_are_counted_one_by_one(start):
    length = 12
    standard = [(query, key) for query in range(length) for key in range(query + 1)]
    suffix = [] if start is None else [pair for pair in standard if pair[0] >= start]
    tokens = length + (0 if start is None else length - start)
    forward = 2 * SHAPE.weights_per_token * tokens + SHAPE.flops_per_pair * len(standard + suffix)
    assert step_flops(SHAPE, length, start) == 3 * forward


def test_the_bound_runs_from_two_to_one():
    assert step_ratio_bound(SHAPE, 64, 0) == 2
    bounds = [step_ratio_bound(SHAPE, 64, split) for split in range(64)]
    assert bounds == sorted(bounds, reverse=True) and 1 < bounds[-1] < 1.1


def test_waiting_for_the_longest_suffix():
    alone, many = (expected_step_time(size, 1, 0.0, steps=400) for size in (1, 64))
    assert alone.independent == pytest.approx(1.5, abs=0.05)  # E[2 - x]
    assert many.independent == pytest.approx(1 + 64 / 65, abs=0.01)  # 2 - E[min of 64 uniforms]
    assert many.stratified == pytest.approx(1.5, abs=0.05)
    attention = expected_step_time(1, 8, 1.0, steps=100)
    assert attention.stratified == pytest.approx(5 / 3, abs=0.02)  # 2 - E[x^2]


def test_the_variance_of_weighed_draws_equals_a_simulation():
    import numpy as np

    from megatron_rpsd.planning.split_variance import variance_ratio
    from megatron_rpsd.positions import ViewSampler

    strata, length = 16, 4096
    gradients = np.linspace(3.0, 0.5, strata)  # one-dimensional gradients, larger for longer suffixes
    ratio = variance_ratio(gradients**2, gradients.mean() ** 2, probability=0.5, density=0.6)
    sampler = ViewSampler(3, "skip", length, apply_probability=0.5, split_density=0.6)
    draws = [sampler.draw(index) for index in range(40_000)]
    drawn = np.array([draw.kl_weight * gradients[draw.view.split * strata // length] for draw in draws])
    assert drawn.mean() == pytest.approx(gradients.mean(), rel=0.02)
    assert drawn.var() / gradients.var() == pytest.approx(ratio, rel=0.03)
