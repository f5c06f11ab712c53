"""Documents of a window against Megatron's own masks, and per-document draws against their definition."""

from __future__ import annotations

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_rpsd.positions import (
    Documents,
    DocumentViews,
    ViewSampler,
    cyclic_view,
    document_ids,
    draw_document_views,
    skip_view,
)

EOD = 3
L = 40


def windows() -> torch.Tensor:
    """Rows with EOD first, last, doubled, and without any."""
    tokens = torch.randint(4, 9, (4, L), generator=torch.Generator().manual_seed(0))
    tokens[0, [0, 7, 8, L - 1]] = EOD
    tokens[1, [L - 2]] = EOD
    tokens[2, list(range(0, L, 5))] = EOD
    return tokens


@pytest.mark.parametrize("row", range(4))
def test_documents_are_those_of_megatrons_own_masks(row):
    tokens = windows()
    hidden, loss_mask, position_ids = _get_ltor_masks_and_position_ids(tokens[row], EOD, True, True, True, True)
    ids = document_ids(tokens, EOD)
    documents = Documents.of_ids(ids)
    assert torch.equal(torch.arange(L) - documents.starts()[row], position_ids)
    assert torch.equal((ids[row][:, None] == ids[row]).tril(), ~hidden[0])
    borders = documents.borders[row]
    assert borders[0] == 0 and borders[-1] == L and sum(documents.lengths(row)) == L
    inner = [border - 1 for border in borders[1:-1]]
    assert all(loss_mask[border] == 0 for border in inner)  # --eod-mask-loss masks the border tokens


def test_sums_are_over_a_tokens_document():
    documents = Documents(((0, 2, 5), (0, 5)))
    values = torch.tensor([[1.0, 0, 1, 1, 0], [1, 1, 0, 0, 0]])
    assert documents.sums(values).tolist() == [[1, 1, 2, 2, 2], [2, 2, 2, 2, 2]]


def test_views_of_documents_by_hand():
    views = DocumentViews((skip_view(2, 7, 6), cyclic_view(1, 4)), (6, 4))
    assert views.position_ids(10).tolist() == [0, 1, 9, 10, 11, 12, 6, 7, 8, 5]
    assert views.suffix(10).long().tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 1]
    assert views.split == 2.5 and views.mean_shift(10) == 5.5


@pytest.mark.parametrize("kind", ["skip", "cyclic"])
def test_a_document_draws_by_seed_sample_and_its_own_number(kind):
    sampler = ViewSampler(5, kind, 64)
    views = draw_document_views(sampler, 7, (20, 30, 14)).views
    assert draw_document_views(sampler, 7, (20, 30, 14)).views == views
    assert draw_document_views(sampler, 7, (20, 30)).views == views[:2]  # documents behind it do not matter
    assert draw_document_views(sampler, 7, (9, 30, 25)).views[1] == views[1]  # nor do those before it
    for other in (
        draw_document_views(sampler, 8, (20, 30, 14)),
        draw_document_views(ViewSampler(6, kind, 64), 7, (20, 30, 14)),
    ):
        assert other.views != views
    same = draw_document_views(sampler, 7, (30,) * 16).views
    assert len(set(same)) > 8  # equal documents of a sample draw on their own


def test_splits_and_shifts_are_uniform_within_the_document():
    sampler, length, count = ViewSampler(1, "skip", 64, max_shift=10), 8, 4000
    views = [view for index in range(count // 4) for view in draw_document_views(sampler, index, (length,) * 4).views]
    for values, choices in (([view.split for view in views], range(8)), ([view.shift for view in views], range(1, 11))):
        share = torch.tensor([values.count(choice) / count for choice in choices])
        assert share.sum() == pytest.approx(1)
        # Six standard errors of a share.
        assert (share - 1 / len(choices)).abs().max() < 6 * (1 / len(choices) / count) ** 0.5
    rotations = [view.split for view in draw_document_views(ViewSampler(1, "cyclic", 64), 0, (4,) * 300).views]
    assert set(rotations) == {1, 2, 3}


@pytest.mark.parametrize("kind", ["skip", "cyclic"])
def test_a_document_of_one_token(kind):
    (view,) = draw_document_views(ViewSampler(1, kind, 64), 0, (1,)).views
    assert view.split == 0 and view.position_ids(1).shape == (1,)
