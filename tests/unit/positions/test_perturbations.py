"""Views against the paper's definitions, written out by hand or literally."""

import re

import pytest
import torch

from megatron_rpsd.positions import View, batch_position_ids, cyclic_definition, cyclic_view, perturbations, skip_view


def differences(position_ids: torch.Tensor) -> torch.Tensor:
    """Position of every token relative to every other one: all that RoPE shows the model."""
    return position_ids[:, None] - position_ids[None, :]


def docstring_rows() -> dict[str, list[int]]:
    """The drawn example: the integers at the end of each row, those of a wrapped row under its own label."""
    rows: dict[str, list[int]] = {}
    label = ""
    for line in perturbations.__doc__.splitlines():
        if match := re.match(r" {4}(standard|skip|as a View|cyclic)", line):
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
    ],
)
def test_a_view_outside_the_sequence_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
