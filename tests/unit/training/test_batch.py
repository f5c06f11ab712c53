"""A rank's share of a micro-batch against whole sequences written as Python lists."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_rpsd.parallel import ViewLayout
from megatron_rpsd.positions import View, cyclic_view, skip_view
from megatron_rpsd.training.batch import TWO_VIEWS, ViewBatch, make_view_batch

LENGTH = 24
VIEWS = [skip_view(13, 5, LENGTH), cyclic_view(7, LENGTH), View.identity()]  # splits 13, 17, 0
OBJECTIVES = ("standard", "pose", *TWO_VIEWS)


def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (len(VIEWS), LENGTH + 1), generator=generator)
    mask = torch.randint(2, (len(VIEWS), LENGTH), generator=generator)
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask}


def batches(objective: str, cp_size: int, start: int = 0, views: list[View] = VIEWS) -> list[ViewBatch]:
    suffix_start = start if objective in TWO_VIEWS else None
    whole = sample()
    if views is not VIEWS:
        whole = {name: tensor[: len(views)] for name, tensor in whole.items()}
    return [
        make_view_batch(whole, views, objective, ViewLayout(LENGTH, suffix_start, cp_size, rank))
        for rank in range(cp_size)
    ]


def gathered(ranks: list[ViewBatch], name: str, layout: ViewLayout | None = None) -> list[list]:
    """Tensor `name` of all ranks, rank after rank along the sequence, put into the sequence's order."""
    whole = torch.cat([getattr(batch, name) for batch in ranks], dim=1)
    order = (ranks[0].layout if layout is None else layout).gather_order()
    return (whole if order is None else whole[:, order]).tolist()


def positions_by_definition(view: View) -> list[int]:
    return [i if i < view.split else i + view.shift for i in range(LENGTH)]


@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_ranks_together_hold_the_whole_batch(objective, cp_size):
    whole, ranks = sample(), batches(objective, cp_size)
    both = objective in TWO_VIEWS
    tokens = [row + row if both else row for row in whole["tokens"].tolist()]
    perturbed = [positions_by_definition(view) for view in VIEWS]
    standard = [list(range(LENGTH)) for _ in VIEWS]
    positions = {
        "standard": standard,
        "pose": perturbed,
        **dict.fromkeys(TWO_VIEWS, [one + other for one, other in zip(standard, perturbed, strict=True)]),
    }
    assert gathered(ranks, "tokens") == tokens
    assert gathered(ranks, "position_ids") == positions[objective]
    single = ViewLayout(LENGTH, None, cp_size)
    mask = whole["loss_mask"].tolist()
    suffix_mask = [
        [keep * (i >= view.split) for i, keep in enumerate(row)] for row, view in zip(mask, VIEWS, strict=True)
    ]
    assert gathered(ranks, "labels", single) == whole["labels"].tolist()
    assert gathered(ranks, "loss_mask", single) == mask
    assert gathered(ranks, "suffix_mask", single) == suffix_mask
    for batch in ranks:
        # N and M count the whole sequence on every rank: local counts would weigh ranks differently.
        assert batch.kept.tolist() == [sum(row) for row in mask]
        assert batch.kept_suffix.tolist() == [sum(row) for row in suffix_mask]
        assert batch.splits.tolist() == [view.split for view in VIEWS]
        assert batch.shifts.tolist() == [5, LENGTH, 0]


@pytest.mark.parametrize(("cp_size", "start"), [(1, 1), (1, 13), (2, 4), (2, 12), (3, 12)])
def test_a_shared_prefix_repeats_the_suffix_alone(cp_size, start):
    views = VIEWS[:2]  # splits 13 and 17 stand at or after every start
    ranks = batches("rpsd", cp_size, start, views)
    tokens = sample()["tokens"][:2].tolist()
    assert gathered(ranks, "tokens") == [row + row[start:] for row in tokens]
    expected = [list(range(LENGTH)) + positions_by_definition(view)[start:] for view in views]
    assert gathered(ranks, "position_ids") == expected
    assert all(batch.tokens.shape[1] * cp_size == 2 * LENGTH - start for batch in ranks)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_types_and_shapes(objective):
    batch = batches(objective, 2)[1]
    local = LENGTH // 2 * (2 if objective in TWO_VIEWS else 1)
    for name in ("tokens", "position_ids"):
        assert getattr(batch, name).dtype == torch.int64 and getattr(batch, name).shape == (3, local)
    assert batch.labels.dtype == torch.int64 and batch.labels.shape == (3, LENGTH // 2)
    for name in ("loss_mask", "suffix_mask"):
        assert getattr(batch, name).dtype == torch.float32 and getattr(batch, name).shape == (3, LENGTH // 2)
    for name in ("kept", "kept_suffix"):
        assert getattr(batch, name).dtype == torch.float32 and getattr(batch, name).shape == (3,)


def test_a_split_before_the_suffix_start_is_our_own_mistake():
    with pytest.raises(AssertionError):
        batches("rpsd", 1, 14, VIEWS[:1])


def test_the_sample_is_not_modified():
    whole = sample()
    before = {name: tensor.clone() for name, tensor in whole.items()}
    make_view_batch(whole, VIEWS, "rpsd", ViewLayout(LENGTH, 0))
    assert all(torch.equal(whole[name], before[name]) for name in whole)


def test_moving_a_batch_moves_every_tensor_and_keeps_the_rest():
    batch = batches("rpsd", 2)[0]
    moved = batch.to("meta")
    for name, value in vars(batch).items():
        found = getattr(moved, name)
        if isinstance(value, torch.Tensor):
            assert found.device.type == "meta" and (found.shape, found.dtype) == (value.shape, value.dtype)
        else:
            assert found is value


def test_batches_are_made_without_megatron():
    """None in sys.modules makes an import fail: a data pipeline or a notebook needs torch alone."""
    code = "import sys; sys.modules['megatron'] = None; import megatron_rpsd.training.batch"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
