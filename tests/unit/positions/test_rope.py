"""RoPE against transformers' own classes and, where they have no say, against fp64."""

import dataclasses
import pickle

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_rpsd.positions import (
    RopeConfig,
    View,
    check_positions,
    cyclic_definition,
    cyclic_view,
    inverse_frequencies,
    rope_tables,
    rotate,
    skip_view,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

# name -> (head_dim, base, scaling); max_position_embeddings is 131072 throughout.
CASES = {
    "none": (64, 500_000.0, None),
    "default": (128, 10_000.0, {"rope_type": "default", "rope_theta": 10_000.0}),
    "legacy-linear": (64, 100_000.0, {"type": "linear", "factor": 2.5}),
    "linear": (80, 8e6, {"rope_type": "linear", "factor": 4}),
    "llama3": (128, 500_000.0, LLAMA3),
    "llama3-other-factors": (64, 1.28e8, {**LLAMA3, "factor": 32.0, "low_freq_factor": 2, "high_freq_factor": 9.5}),
    "yarn": (128, 5e6, YARN),
    "yarn-betas": (64, 1e6, {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}),
    "yarn-null-betas": (64, 1e6, {**YARN, "beta_fast": None, "beta_slow": None}),
    "yarn-attention-factor": (64, 1e6, {**YARN, "attention_factor": 1.25}),
    "yarn-mscale": (64, 1e4, {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7}),
    "yarn-ratio": (64, 1e6, {**YARN, "factor": None, "original_max_position_embeddings": 40_960}),
    "yarn-step": (64, 1e6, {**YARN, "beta_fast": 8.0, "beta_slow": 8.0, "truncate": False}),
    "yarn-factor-1": (64, 1e6, {**YARN, "factor": 1.0}),
}
TRAINED_LENGTH = 131_072


def ours(name: str) -> RopeConfig:
    head_dim, base, scaling = CASES[name]
    return RopeConfig(head_dim, base, scaling, max_position_embeddings=TRAINED_LENGTH)


def theirs(name: str) -> LlamaRotaryEmbedding:
    head_dim, base, scaling = CASES[name]
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            max_position_embeddings=TRAINED_LENGTH,
            rope_parameters={"rope_theta": base, **(scaling or {"rope_type": "default"})},
        )
    )


def far_positions() -> torch.Tensor:
    """int64 [4, s]: standard, skip and cyclic views of 300,000 tokens and their 600,000 neighbours, every 997th."""
    length = 300_000
    views = [View.identity(), skip_view(123_456, 300_000, length), cyclic_view(77_777, length)]
    rows = [view.position_ids(length)[::997] for view in views]
    return torch.stack([*rows, torch.arange(600_000, 600_000 - rows[0].numel(), -1)])


def exact_tables(position_ids: torch.Tensor, head_dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 tables of the unscaled base-10,000 frequencies."""
    inv_freq = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return rope_tables(position_ids[None], inv_freq, 1.0)


def scores(position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q . k of all pairs of len(position_ids) unit vectors with d = 16, in the given dtype."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(position_ids), 1, 1, 16)
    q, k = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    if dtype == torch.float64:
        cos, sin = exact_tables(position_ids)
    else:
        cos, sin = rope_tables(position_ids[None], *inverse_frequencies(RopeConfig(16, 10_000.0)))
    q, k = (rotate(x / x.norm(dim=-1, keepdim=True), cos, sin)[:, 0, 0] for x in (q, k))
    return q @ k.T


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_transformers_bitwise(name: str):
    inv_freq, attention_scaling = inverse_frequencies(ours(name))
    reference = theirs(name)
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, reference.inv_freq)
    assert attention_scaling == reference.attention_scaling


@pytest.mark.parametrize("name", CASES)
def test_tables_equal_transformers_beyond_the_trained_length(name: str):
    position_ids = far_positions()
    assert position_ids.max() > 4 * TRAINED_LENGTH and position_ids.min() < 0
    cos, sin = rope_tables(position_ids, *inverse_frequencies(ours(name)))
    expected_cos, expected_sin = theirs(name)(torch.zeros((), dtype=torch.float32), position_ids)
    half = cos.shape[-1]
    assert cos.dtype == sin.dtype == torch.float32
    assert expected_cos.shape[-1] == 2 * half
    for columns in (slice(0, half), slice(half, None)):
        torch.testing.assert_close(cos, expected_cos[..., columns], rtol=0, atol=1e-6)
        torch.testing.assert_close(sin, expected_sin[..., columns], rtol=0, atol=1e-6)


def test_tables_are_as_exact_as_one_fp32_rounding_of_the_angle_allows():
    position_ids = torch.cat((far_positions().flatten(), torch.tensor([1_000_000, -1_000_000])))[None]
    inv_freq, _ = inverse_frequencies(RopeConfig(64, 500_000.0))
    cos, sin = rope_tables(position_ids, inv_freq, 1.0)
    angles = position_ids[..., None].double() * inv_freq.double()
    # 2**-24 of the angle for the product, and a few units in the last place for the function itself.
    bound = angles.abs() * 2**-24 + 2**-22
    assert ((cos - angles.cos()).abs() <= bound).all()
    assert ((sin - angles.sin()).abs() <= bound).all()


def test_negative_positions_mirror_positive_ones():
    position_ids = torch.tensor([[1, 500, 65_535, 600_000]])
    table = inverse_frequencies(ours("yarn"))
    cos, sin = rope_tables(position_ids, *table)
    mirrored_cos, mirrored_sin = rope_tables(-position_ids, *table)
    assert torch.equal(mirrored_cos, cos)
    assert torch.equal(mirrored_sin, -sin)


def test_rotation_equals_transformers():
    s, b, heads, d = 9, 2, 3, 64
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(s, b, heads, d, generator=generator) for _ in range(2))
    position_ids = torch.stack((skip_view(4, 100_000, s).position_ids(s), cyclic_view(2, s).position_ids(s)))
    cos, sin = rope_tables(position_ids, *inverse_frequencies(ours("yarn-betas")))
    expected = apply_rotary_pos_emb(
        q.permute(1, 2, 0, 3),
        k.permute(1, 2, 0, 3),
        torch.cat((cos, cos), dim=-1),
        torch.cat((sin, sin), dim=-1),
    )
    before = q.clone()
    for x, reference in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotate(x, cos, sin).permute(1, 2, 0, 3), reference, rtol=0, atol=1e-6)
    assert torch.equal(q, before)


@pytest.mark.parametrize(
    ("dtype", "constant", "tolerance"), [(torch.float32, 500, 1e-4), (torch.float64, 500_000, 1e-9)]
)
def test_a_constant_added_to_all_positions_changes_no_score(dtype: torch.dtype, constant: int, tolerance: float):
    position_ids = skip_view(11, 40, 32).position_ids(32)
    plain = scores(position_ids, dtype)
    torch.testing.assert_close(scores(position_ids + constant, dtype), plain, rtol=0, atol=tolerance)
    assert (scores(View.identity().position_ids(32), dtype) - plain).abs().max() > 0.1  # a view is visible


@pytest.mark.parametrize("rotation", [0, 1, 13, 31])
def test_the_cyclic_view_scores_as_its_definition(rotation: int):
    view, definition = cyclic_view(rotation, 32).position_ids(32), cyclic_definition(rotation, 32)
    torch.testing.assert_close(scores(view, torch.float64), scores(definition, torch.float64), rtol=0, atol=1e-12)


def test_bf16_is_rotated_in_fp32():
    s, d = 256, 64
    x = torch.randn(s, 1, 4, d, generator=torch.Generator().manual_seed(2)).bfloat16()
    position_ids = skip_view(100, 60_000, s).position_ids(s)[None]
    cos, sin = rope_tables(position_ids, *inverse_frequencies(RopeConfig(d, 500_000.0)))
    exact = rotate(x.double(), cos, sin)
    rotated = rotate(x, cos, sin)
    assert rotated.dtype == torch.bfloat16 and exact.dtype == torch.float64

    wide_cos, wide_sin = (torch.cat((t, t), -1).transpose(0, 1).unsqueeze(2).bfloat16() for t in (cos, sin))
    in_bf16 = x * wide_cos + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * wide_sin
    error, error_in_bf16 = (rotated - exact).abs(), (in_bf16 - exact).abs()
    # One rounding to 8 significant bits costs at most 2**-8 of the value. The fp32 part is far below the slack.
    one_rounding = exact.abs() * 2**-8 + 1e-6
    assert (error <= one_rounding).all()
    assert (error_in_bf16 > one_rounding).any(), "bf16 arithmetic keeps the bound as well: the test shows nothing"
    assert error.mean() < error_in_bf16.mean()


def test_gradient_and_what_autograd_keeps():
    position_ids = torch.stack((skip_view(1, 5, 3).position_ids(3), cyclic_view(1, 3).position_ids(3)))
    inv_freq, scaling = inverse_frequencies(RopeConfig(4, 100.0, {**YARN, "factor": 2.0}))
    cos, sin = rope_tables(position_ids, inv_freq.double(), scaling)
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))

    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rotate(x, cos, sin)
    assert saved and max(saved) <= cos.untyped_storage().nbytes() < x.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 7}, "--kv-channels 7"),
        ({"base": 1.0}, "--rotary-base 1.0"),
        ({"scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"scaling": {"factor": 2.0}}, "rope_type is None"),
        ({"scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs high_freq_factor, low_freq_factor, original_max"),
        ({"scaling": {"rope_type": "yarn", "factor": 4.0}}, "needs original_max_position_embeddings"),
        ({"scaling": {"rope_type": "default", "factor": 4.0}}, "has no key factor"),
        ({"scaling": {**YARN, "beta_quick": 4.0}}, "has no key beta_quick"),
        ({"scaling": {**YARN, "factor": "4"}}, "factor '4'"),
        ({"scaling": {**YARN, "factor": 0.5}}, "factor 0.5 .*at least 1"),
        ({"scaling": {**YARN, "factor": None}}, "factor is null"),
        ({"scaling": {**YARN, "truncate": None}}, "truncate None"),
        ({"scaling": {**YARN, "beta_fast": 0.5}}, "beta_fast 0.5 .*beta_slow 1"),
        ({"scaling": {**YARN, "attention_factor": -1.0}}, "attention_factor -1.0"),
        ({"scaling": {**LLAMA3, "factor": None}}, "factor None"),
        ({"scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor 1.0 .*low_freq_factor 1.0"),
        ({"scaling": {**LLAMA3, "rope_theta": 10_000.0}}, "rope_theta 10000.0 .*--rotary-base 500000.0"),
        ({"scaling": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ],
)
def test_bad_configuration_names_its_key(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**{"head_dim": 64, "base": 500_000.0, **arguments})


def test_a_configuration_is_its_own_copy_and_travels():
    scaling = dict(LLAMA3)
    config = RopeConfig(64, 500_000.0, scaling)
    scaling["factor"] = 99.0
    assert config.scaling["factor"] == 8.0
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, dataclasses.replace(config, base=8e6), dataclasses.replace(config)}) == 2


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, None),
        ({"rope_type": "default", "rope_theta": 5e5}, None),
        (LLAMA3, LLAMA3),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}, {"rope_type": "linear", "factor": 2.0}),
        ({**YARN, "factor": None}, {**YARN, "factor": 2 * 65536 / YARN["original_max_position_embeddings"]}),
    ],
)
def test_the_exported_scaling_is_complete_and_gives_the_same_frequencies(scaling, expected):
    config = RopeConfig(64, 5e5, scaling, max_position_embeddings=2 * 65536)
    exported = config.exported_scaling()
    assert exported == expected
    again = RopeConfig(64, 5e5, exported, max_position_embeddings=17)  # another length does not change its meaning
    for one, other in zip(inverse_frequencies(config), inverse_frequencies(again), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_positions_stay_exact_in_fp32():
    check_positions(2**23, 2**23 - 1)
    check_positions(262_144, 262_144)
    with pytest.raises(ValueError, match=r"--seq-length 8388608 \+ --rpsd-max-shift 8388608 = 16777216 .* 16777216"):
        check_positions(2**23, 2**23)
    # The limit is the true one: the integer after 2**24 has no fp32 of its own.
    assert torch.tensor(2**24 + 1).float() == torch.tensor(2**24).float()
