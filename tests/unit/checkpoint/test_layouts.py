import pytest
import torch

from megatron_rpsd.checkpoint.layouts import (
    Column,
    GatedMlp,
    ModelDimensions,
    Qkv,
    Replicated,
    Row,
    Vocabulary,
    bitwise_equal,
)

DIMS = ModelDimensions(
    num_layers=1,
    hidden_size=5,
    ffn_hidden_size=12,
    num_attention_heads=12,
    num_query_groups=6,
    head_dim=2,
    vocab_size=97,
    tied=False,
    qk_norm=False,
    qkv_bias=True,
)


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    """Every element is different, so that any wrong move shows."""
    size = torch.Size(shape).numel()
    return torch.arange(start, start + size, dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize("tail", [(5,), ()], ids=["weight", "bias"])
def test_qkv_rows_follow_the_groups_one_by_one(tail):
    n, g, d = DIMS.num_attention_heads, DIMS.num_query_groups, DIMS.head_dim
    query, key, value = numbered(n * d, *tail), numbered(g * d, *tail, start=1000), numbered(g * d, *tail, start=2000)
    rows = []
    for group in range(g):
        for head in range(group * n // g, (group + 1) * n // g):
            rows += [query[head * d + row] for row in range(d)]
        rows += [key[group * d + row] for row in range(d)]
        rows += [value[group * d + row] for row in range(d)]
    full = Qkv().to_megatron([query, key, value], DIMS)
    assert torch.equal(full, torch.stack(rows))
    for restored, original in zip(Qkv().to_hf(full, DIMS), (query, key, value), strict=True):
        assert torch.equal(restored, original)


@pytest.mark.parametrize("tp_size", [1, 2, 3, 6])
def test_qkv_rank_holds_its_own_groups_whole(tp_size):
    n, g, d = DIMS.num_attention_heads, DIMS.num_query_groups, DIMS.head_dim
    query, key, value = numbered(n * d, 5), numbered(g * d, 5, start=1000), numbered(g * d, 5, start=2000)
    full = Qkv().to_megatron([query, key, value], DIMS)
    for rank in range(tp_size):
        # A rank sees a smaller model: its heads and groups are consecutive ones.
        mine = slice(rank * n // tp_size * d, (rank + 1) * n // tp_size * d)
        groups = slice(rank * g // tp_size * d, (rank + 1) * g // tp_size * d)
        stacked = []
        for group in range(g // tp_size):
            q_rows = query[mine].split(n // g * d)[group]
            stacked += [q_rows, key[groups].split(d)[group], value[groups].split(d)[group]]
        assert torch.equal(Qkv().split(full, tp_size, rank, DIMS), torch.cat(stacked))


def test_qkv_with_more_ranks_than_groups_is_cut_evenly():
    full = numbered(DIMS.num_query_groups * DIMS.rows_per_group, 5)
    locals = [Qkv().split(full, 12, rank, DIMS) for rank in range(12)]
    assert [local.shape[0] for local in locals] == [4] * 12
    assert torch.equal(torch.cat(locals), full)


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_gated_mlp_rank_holds_gate_then_up(tp_size):
    gate, up = numbered(12, 5), numbered(12, 5, start=1000)
    full = GatedMlp().to_megatron([gate, up], DIMS)
    assert torch.equal(full[:12], gate) and torch.equal(full[12:], up)
    size = 12 // tp_size
    for rank in range(tp_size):
        expected = torch.cat([gate[rank * size : (rank + 1) * size], up[rank * size : (rank + 1) * size]])
        assert torch.equal(GatedMlp().split(full, tp_size, rank, DIMS), expected)


def test_row_cuts_columns_and_column_cuts_rows():
    full = numbered(4, 24)
    assert torch.equal(Row("num_attention_heads").split(full, 3, 1, DIMS), full[:, 8:16])
    full = numbered(24, 4)
    assert torch.equal(Column("num_attention_heads").split(full, 3, 2, DIMS), full[16:])


def test_vocabulary_padding_is_zero_last_and_dropped_again():
    full = numbered(97, 5, start=1)
    locals = [Vocabulary().split(full, 3, rank, DIMS, padded_vocab_size=192) for rank in range(3)]
    assert [local.shape for local in locals] == [(64, 5)] * 3
    assert torch.equal(torch.cat(locals)[:97], full)
    assert torch.cat(locals)[97:].count_nonzero() == 0
    locals[2] += 5.0  # training moves padding rows; they must not matter
    locals[1][33:] -= 1.0
    assert torch.equal(Vocabulary().merge(locals, DIMS), full)


CASES = [
    (Replicated(), [(5,)]),
    (Column("num_attention_heads"), [(24, 5)]),
    (Row("ffn_hidden_size"), [(5, 12)]),
    (Vocabulary(), [(97, 5)]),
    (Qkv(), [(24, 5), (12, 5), (12, 5)]),
    (Qkv(), [(24,), (12,), (12,)]),
    (GatedMlp(), [(12, 5), (12, 5)]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 6])
@pytest.mark.parametrize(("layout", "shapes"), CASES, ids=lambda value: type(value).__name__)
def test_round_trip_is_bitwise_and_contiguous(layout, shapes, tp_size, dtype):
    generator = torch.Generator().manual_seed(1)
    hf = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    hf[0].view(-1)[:3] = torch.tensor([float("nan"), -0.0, float("-inf")], dtype=dtype)
    full = layout.to_megatron(hf, DIMS)
    locals = [layout.split(full, tp_size, rank, DIMS, padded_vocab_size=102) for rank in range(tp_size)]
    merged = layout.merge(locals, DIMS)
    back = layout.to_hf(merged, DIMS)
    assert bitwise_equal(merged, full)
    for restored, original in zip(back, hf, strict=True):
        assert bitwise_equal(restored, original)
    stages = [hf, [full], locals, [merged], back]
    assert all(tensor.is_contiguous() for stage in stages for tensor in stage)


@pytest.mark.parametrize(("layout", "shapes"), CASES, ids=lambda value: type(value).__name__)
def test_layouts_are_linear(layout, shapes):
    """A gradient takes the same way as its parameter: converting a combination equals combining the conversions."""
    left = [numbered(*shape) for shape in shapes]
    right = [numbered(*shape, start=5000).flip(0) for shape in shapes]

    def local(hf):
        return layout.split(layout.to_megatron(hf, DIMS), 3, 1, DIMS, padded_vocab_size=102)

    combined = local([2 * a - b for a, b in zip(left, right, strict=True)])
    assert torch.equal(combined, 2 * local(left) - local(right))


@pytest.mark.parametrize(
    ("layout", "shape", "tp_size", "words"),
    [
        (Qkv(), (48, 5), 5, ["num_attention_heads=12", "12 % 5 = 2"]),
        (Qkv(), (48, 5), 4, ["num_query_groups=6", "6 % 4 = 2", "4 % 6 = 4"]),
        (Row("num_attention_heads"), (5, 24), 8, ["num_attention_heads=12", "12 % 8 = 4"]),
        (GatedMlp(), (24, 5), 8, ["ffn_hidden_size=12", "12 % 8 = 4"]),
        (Vocabulary(), (97, 5), 2, ["vocabulary=97", "97 % 2 = 1"]),
    ],
)
def test_uneven_split_names_the_flag_and_the_arithmetic(layout, shape, tp_size, words):
    with pytest.raises(ValueError) as caught:
        layout.split(numbered(*shape), tp_size, 0, DIMS)
    for word in [f"--tensor-model-parallel-size {tp_size}", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vocabulary_refuses_a_padding_too_small_and_missing_rows():
    with pytest.raises(ValueError, match="padded vocabulary 96 < vocab_size 97"):
        Vocabulary().split(numbered(97, 5), 2, 0, DIMS, padded_vocab_size=96)
    with pytest.raises(ValueError, match="96 rows, fewer than vocab_size=97"):
        Vocabulary().merge([numbered(48, 5), numbered(48, 5)], DIMS)


def test_replicas_that_drifted_apart_are_refused():
    first = numbered(5)
    second = first.clone()
    second[3] = torch.nextafter(second[3], torch.tensor(9.0))
    with pytest.raises(ValueError, match="differs between ranks 0 and 2"):
        Replicated().merge([first, first.clone(), second], DIMS)


def test_shape_that_contradicts_the_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"num_key_value_heads \* head_dim = 6 \* 2"):
        Qkv().to_megatron([numbered(24, 5), numbered(24, 5), numbered(12, 5)], DIMS)
    with pytest.raises(ValueError, match="intermediate_size=12"):
        GatedMlp().to_megatron([numbered(12, 5), numbered(11, 5)], DIMS)
    with pytest.raises(ValueError, match="vocab_size=97"):
        Vocabulary().to_megatron([numbered(98, 5)], DIMS)
