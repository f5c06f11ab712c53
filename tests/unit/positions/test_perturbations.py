"""Views against the paper's definitions, written out by hand or literally."""

import itertools
import re

import pytest
import torch

from megatron_rpsd.positions import (
    RopeConfig,
    View,
    batch_position_ids,
    chunk_permutation_view,
    cyclic_definition,
    cyclic_view,
    inverse_frequencies,
    nope_view,
    perturbations,
    pose_view,
    rope_tables,
    rotate,
    skip_view,
)


def differences(position_ids: torch.Tensor) -> torch.Tensor:
    """Position of every token relative to every other one: all that RoPE shows the model."""
    return position_ids[:, None] - position_ids[None, :]


def docstring_rows() -> dict[str, list[int]]:
    """The drawn example: the integers at the end of each row, those of a wrapped row under its own label."""
    rows: dict[str, list[int]] = {}
    label = ""
    for line in perturbations.__doc__.splitlines():
        if match := re.match(r" {4}(standard|skip|as a View|cyclic|NoPE|permuted|PoSE)", line):
            label = match[1] + ("/cyclic" if match[1] == "as a View" and "cyclic" in rows else "")
        numbers = re.search(r"((?:\s+-?\d+){12})$", line)
        if numbers and label:
            rows[label] = [int(number) for number in numbers[1].split()]
    return rows


def test_the_drawn_example_is_what_the_code_does():
    assert docstring_rows() == {
        "standard": View.identity().position_ids(12).tolist(),
        "skip": [i if i < 5 else i + 4 for i in range(12)],
        "as a View": skip_view(5, 4, 12).position_ids(12).tolist(),
        "cyclic": cyclic_definition(3, 12).tolist(),
        "as a View/cyclic": cyclic_view(3, 12).position_ids(12).tolist(),
        "NoPE": nope_view().position_ids(12).tolist(),
        "permuted": chunk_permutation_view([2, 0, 1], 12).position_ids(12).tolist(),
        "PoSE": pose_view([5, 4, 3], [0, 2, 7]).position_ids(12).tolist(),
    }


def test_positions_are_int64_and_the_identity_is_the_range():
    for view in (View.identity(), View(split=3, shift=0)):
        position_ids = view.position_ids(7)
        assert position_ids.dtype == torch.int64
        assert position_ids.tolist() == list(range(7))
        assert view.is_identity
    assert not View(split=3, shift=1).is_identity


@pytest.mark.parametrize("split", [0, 1, 4, 8])
@pytest.mark.parametrize("shift", [0, 1, 9, 1000])
def test_skip_follows_its_definition(split: int, shift: int):
    expected = [i if i < split else i + shift for i in range(9)]
    assert skip_view(split, shift, 9).position_ids(9).tolist() == expected


@pytest.mark.parametrize("length", [1, 2, 12, 17])
def test_cyclic_equals_its_definition_relative_to_the_prefix(length: int):
    for rotation in range(length):
        paper = cyclic_definition(rotation, length)
        assert paper.tolist() == [(i + rotation) % length for i in range(length)]
        position_ids = cyclic_view(rotation, length).position_ids(length)
        assert torch.equal(differences(position_ids), differences(paper))
        assert position_ids[0] == 0 and position_ids.min() >= -length


def test_cyclic_is_a_split_and_shift():
    assert cyclic_view(3, 12) == View(split=9, shift=-12)
    assert cyclic_view(11, 12) == View(split=1, shift=-12)
    assert cyclic_view(0, 12) == View.identity()


def test_a_batch_has_one_view_a_row():
    position_ids = batch_position_ids([View.identity(), skip_view(2, 10, 4), cyclic_view(1, 4)], 4)
    assert position_ids.dtype == torch.int64
    assert position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 12, 13], [0, 1, 2, -1]]


@pytest.mark.parametrize(("length", "chunks"), [(12, 3), (13, 3), (17, 8), (8, 8), (5, 1)])
def test_chunk_permutation_follows_its_definition(length: int, chunks: int):
    """Every index is dealt to its chunk one by one, then chunks are laid out in the new order."""
    sizes = [length // chunks + (1 if chunk < length % chunks else 0) for chunk in range(chunks)]
    owner = [chunk for chunk in range(chunks) for _ in range(sizes[chunk])]
    assert max(sizes) - min(sizes) <= 1 and len(owner) == length
    for order in itertools.islice(itertools.permutations(range(chunks)), 0, 5000, 7):
        paper = [index for chunk in order for index in range(length) if owner[index] == chunk]
        view = chunk_permutation_view(order, length)
        assert view.position_ids(length).tolist() == paper
        assert sorted(paper) == list(range(length))
        assert view.split == 0 and view.is_identity == (paper == list(range(length)))
        moved = sum(abs(position - index) for index, position in enumerate(paper)) / length
        assert view.mean_shift(length) == pytest.approx(moved)


def test_nope_has_one_position_and_no_rotation():
    view = nope_view()
    assert view.position_ids(7).tolist() == [0] * 7
    assert view.split == 0 and not view.is_identity
    assert view.mean_shift(7) == 3.0  # tokens stand 0..6 from their own index
    inv_freq, scaling = inverse_frequencies(RopeConfig(head_dim=8, base=10_000.0))
    cos, sin = rope_tables(view.position_ids(5)[None], inv_freq, scaling)
    x = torch.randn(5, 1, 2, 8)
    assert torch.equal(rotate(x, cos, sin), x)


@pytest.mark.parametrize(
    ("lengths", "skips"), [([3, 4], [0, 5]), ([1, 1], [0, 0]), ([2, 1, 4, 3], [0, 0, 6, 6]), ([1, 2, 3], [0, 1, 2])]
)
def test_pose_follows_its_definition(lengths: list[int], skips: list[int]):
    expected, token = [], 0
    for size, skip in zip(lengths, skips, strict=True):
        for _ in range(size):
            expected.append(token + skip)
            token += 1
    view = pose_view(lengths, skips)
    assert view.position_ids(token).tolist() == expected
    assert view.split == lengths[0] and view.is_identity == (max(skips) == 0)
    moved = [position - index for index, position in enumerate(expected)][lengths[0] :]
    assert view.mean_shift(token) == pytest.approx(sum(moved) / len(moved))


def test_the_mean_shift_of_a_split_and_shift_is_its_size():
    for view, expected in ((skip_view(3, 7, 9), 7.0), (cyclic_view(4, 9), 9.0), (View.identity(), 0.0)):
        assert view.mean_shift(9) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: View(-1, 4), "split=-1"),
        (lambda: View(12, 4).position_ids(12), "split=12 .*length=12"),
        (lambda: batch_position_ids([View(12, 4)], 12), "split=12 .*length=12"),
        (lambda: skip_view(12, 4, 12), "split=12 .*length=12"),
        (lambda: skip_view(-1, 4, 12), "split=-1"),
        (lambda: skip_view(5, -1, 12), "shift=-1"),
        (lambda: cyclic_view(12, 12), "rotation=12 .*length=12"),
        (lambda: cyclic_view(-1, 12), "rotation=-1"),
        (lambda: cyclic_definition(12, 12), "rotation=12 .*length=12"),
        (lambda: View(3, 1, ((3, 2),)), r"\[3\] must ascend .*split=3"),
        (lambda: View(3, 1, ((5, 2), (4, 2))), r"\[5, 4\] must ascend"),
        (lambda: View(0, 0, stride=2), "stride=2"),
        (lambda: View(3, 1, ((5, 2),)).position_ids(5), "token 5 .*length=5"),
        (lambda: chunk_permutation_view([1, 0, 2], 2), "3 chunks .*length=2"),
    ],
)
def test_a_view_outside_the_sequence_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
