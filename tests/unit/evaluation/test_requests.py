"""What a user can ask a probe for, and the one line that says what is wrong with it."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rpsd.checkpoint.layouts import ModelDimensions
from megatron_rpsd.evaluation.probe import ParallelLayout, check_layout
from megatron_rpsd.evaluation.requests import check_heads, read_tokens, view_of
from megatron_rpsd.positions import View


def message_of(function, *arguments) -> str:
    with pytest.raises(ValueError) as refused:
        function(*arguments)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_tokens_are_read_as_int64(dtype, tmp_path):
    np.save(tmp_path / "t.npy", np.array([5, 0, 9, 9], dtype))
    tokens = read_tokens(tmp_path / "t.npy", 10)
    assert tokens.dtype == np.int64 and tokens.tolist() == [5, 0, 9, 9]


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((2, 5), np.int64), "int64 (2, 5)"),
        (np.zeros(5, np.float32), "float32 (5,)"),
        (np.zeros(5, bool), "bool (5,)"),
        (np.zeros(2, np.int64), "int64 (2,)"),
        (np.zeros((), np.int64), "int64 ()"),
    ],
)
def test_tokens_of_another_shape_or_type_are_refused(array, found, tmp_path):
    np.save(tmp_path / "t.npy", array)
    message = message_of(read_tokens, tmp_path / "t.npy", 10)
    assert message == f"--tokens {tmp_path / 't.npy'} holds {found}; it must be integer [L + 1] with L >= 2"


@pytest.mark.parametrize("bad", [10, 4096, -1])
def test_a_token_outside_of_the_vocabulary_is_named(bad, tmp_path):
    np.save(tmp_path / "t.npy", np.array([5, 9, bad, 3]))
    message = message_of(read_tokens, tmp_path / "t.npy", 10)
    assert message.endswith(f"holds id {bad}, outside of the model's vocabulary of 10")


def test_no_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.npy", tmp_path):
        assert message_of(read_tokens, path, 10) == f"--tokens {path} is not a file"


def write_npz(path) -> None:
    with open(path, "wb") as file:
        np.savez(file, tokens=np.arange(5))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("1 2 3\n"),
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"),
        lambda path: np.save(path, np.array([{"a": 1}, None, 3], dtype=object)),
        lambda path: path.write_bytes(b""),
        write_npz,
    ],
    ids=["text", "truncated", "pickled objects", "empty", "archive"],
)
def test_a_file_that_is_no_array_is_refused(write, tmp_path):
    path = tmp_path / "t.npy"
    write(path)
    assert message_of(read_tokens, path, 10).startswith(f"--tokens {path} is no .npy array: ")


def test_views_are_the_methods_own():
    assert view_of("skip", 3, 7, 10) == View(3, 7)
    assert view_of("skip", 0, 0, 10) == View(0, 0)
    # r_i = (i + u) mod L reads i up to L - u and then starts again: u = 7 splits ten tokens at 3.
    for shift in (None, 10, -10):
        assert view_of("cyclic", 3, shift, 10) == View(3, -10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("skip", 10, 1, 10), "--split 10: it must lie in 0..9, the sequence has 10 tokens"),
        (("cyclic", -1, None, 10), "--split -1: it must lie in 0..9, the sequence has 10 tokens"),
        (("skip", 3, None, 10), "--shift None: a skip view needs a shift of at least 0"),
        (("skip", 3, -2, 10), "--shift -2: a skip view needs a shift of at least 0"),
        (("cyclic", 3, 4, 10), "--shift 4: a cyclic view always shifts by the length 10; leave it out"),
    ],
)
def test_a_view_outside_of_the_sequence_is_refused(arguments, message):
    assert message_of(view_of, *arguments) == message


def test_positions_beyond_fp32_are_refused_with_the_sum():
    assert f"10 + --rpsd-max-shift {2**24} = {2**24 + 10}" in message_of(view_of, "skip", 3, 2**24, 10)
    assert view_of("skip", 3, 2**24 - 11, 10).shift == 2**24 - 11


def dimensions() -> ModelDimensions:
    return ModelDimensions(
        num_layers=6, hidden_size=96, ffn_hidden_size=128, num_attention_heads=12, num_query_groups=4, head_dim=8,
        vocab_size=100, tied=True, qk_norm=False, qkv_bias=False,
    )  # fmt: skip


@pytest.mark.parametrize(("tensor", "context", "pipeline"), [(1, 1, 1), (2, 5, 3), (4, 1, 6)])
def test_degrees_that_divide_the_model_pass(tensor, context, pipeline):
    check_heads(dimensions(), ParallelLayout(tensor, context, pipeline))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            ParallelLayout(tensor=5),
            "--tensor-model-parallel-size 5 does not divide the model's 12 attention heads: 12 / 5 = 2.40",
        ),
        (
            ParallelLayout(tensor=3),
            "--tensor-model-parallel-size 3 does not divide the model's 4 key-value heads: 4 / 3 = 1.33",
        ),
        (
            ParallelLayout(pipeline=4),
            "--pipeline-model-parallel-size 4 does not divide the model's 6 layers: 6 / 4 = 1.50",
        ),
        (ParallelLayout(tensor=0), "--tensor-model-parallel-size 0: a parallel degree is at least 1"),
        (ParallelLayout(context=-2), "--context-parallel-size -2: a parallel degree is at least 1"),
        (ParallelLayout(pipeline=0), "--pipeline-model-parallel-size 0: a parallel degree is at least 1"),
    ],
)
def test_degrees_that_do_not_divide_the_model_are_refused(layout, message):
    assert message_of(check_heads, dimensions(), layout) == message


@pytest.mark.parametrize(
    ("length", "split", "layout", "execution"),
    [
        (7, 3, ParallelLayout(), "full"),
        (7, 3, ParallelLayout(), "shared-prefix"),
        (7, 3, ParallelLayout(tensor=2), "shared-prefix"),  # without sequence parallelism TP cuts no tokens
        (16, 5, ParallelLayout(context=2), "full"),
        (16, 4, ParallelLayout(context=2), "shared-prefix"),
        (16, 8, ParallelLayout(tensor=2, context=2, sequence_parallel=True), "shared-prefix"),
        (16, 15, ParallelLayout(pipeline=8), "shared-prefix"),
    ],
)
def test_lengths_that_divide_pass(length, split, layout, execution):
    check_layout(length, split, layout, execution)


@pytest.mark.parametrize(
    ("length", "split", "layout", "execution", "message"),
    [
        (
            10, 0, ParallelLayout(context=2), "full",
            "--tokens holds 10 + 1 ids: the length 10 does not divide by 2 x CP = 4",
        ),
        (
            12, 0, ParallelLayout(tensor=2, context=2, sequence_parallel=True), "full",
            "--tokens holds 12 + 1 ids: the length 12 does not divide by 2 x CP x TP = 8",
        ),
        (
            16, 5, ParallelLayout(context=2), "shared-prefix",
            "--split 5 with --execution shared-prefix: the suffix of 16 - 5 = 11 tokens does not divide by "
            "2 x CP = 4; choose another split, or --execution full",
        ),
        (
            16, 12, ParallelLayout(tensor=2, context=2, sequence_parallel=True), "shared-prefix",
            "--split 12 with --execution shared-prefix: the suffix of 16 - 12 = 4 tokens does not divide by "
            "2 x CP x TP = 8; choose another split, or --execution full",
        ),
        (
            10, 0, ParallelLayout(tensor=4, sequence_parallel=True), "full",
            "--tokens holds 10 + 1 ids: the length 10 does not divide by TP = 4",
        ),
    ],
)  # fmt: skip
def test_lengths_that_do_not_divide_are_refused_with_the_arithmetic(length, split, layout, execution, message):
    assert message_of(check_layout, length, split, layout, execution) == message


def test_a_layouts_size_and_flags():
    layout = ParallelLayout(tensor=2, context=3, pipeline=4, sequence_parallel=True)
    assert layout.world_size == 24
    assert " ".join(layout.arguments()) == (
        "--tensor-model-parallel-size 2 --context-parallel-size 3 --pipeline-model-parallel-size 4 --sequence-parallel"
    )
    assert "--sequence-parallel" not in ParallelLayout(tensor=2).arguments()
