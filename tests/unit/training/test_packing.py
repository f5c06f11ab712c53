"""The three switches in a rank's share of a batch, per-document weights, what is said about a pack."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_rpsd.parallel import ViewLayout
from megatron_rpsd.positions import DocumentViews, View, nope_view, skip_view
from megatron_rpsd.training.batch import make_view_batch
from megatron_rpsd.training.packing import Packing, describe_packing, packing_sums, settle_packing

LENGTHS = [(3, 6, 1, 6), (16,)]
L = 16
STARTS = [[0] * 3 + [3] * 6 + [9] + [10] * 6, [0] * L]


def sample() -> dict[str, torch.Tensor]:
    ids = torch.randint(50, (2, L + 1), generator=torch.Generator().manual_seed(1))
    owner = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS])
    mask = torch.ones(2, L)
    mask[0, [2, 4, 8, 9]] = 0
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask, "document_ids": owner}


def moved(view: View, reset: bool, row: int) -> list[int]:
    return [i * view.stride + view.shift * (i >= view.split) - STARTS[row][i] * reset for i in range(L)]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("objective", ["standard", "pose", "rpsd"])
def test_positions_of_both_views_are_reset_or_not(objective, reset):
    views, packing = [skip_view(5, 4, L), skip_view(9, 2, L)], Packing(positions=reset)
    start = 4 if objective == "rpsd" else None
    batch = make_view_batch(sample(), views, objective, ViewLayout(L, start), packing=packing)
    standard = [moved(View.identity(), reset, row) for row in range(2)]
    perturbed = [moved(view, reset, row) for row, view in enumerate(views)]
    pair = [one + other[4:] for one, other in zip(standard, perturbed, strict=True)]
    assert batch.position_ids.tolist() == {"standard": standard, "pose": perturbed, "rpsd": pair}[objective]


def test_a_view_without_rotation_stays_without_it():
    batch = make_view_batch(sample(), [nope_view()] * 2, "pose", ViewLayout(L), packing=Packing(positions=True))
    assert not batch.position_ids.any()


@pytest.mark.parametrize("cp_size", [1, 2])
def test_weights_are_each_documents_own_n_over_m(cp_size):
    whole, splits = sample(), [(1, 2, 0, 3), (9,)]
    views = [
        DocumentViews(tuple(skip_view(*each) for each in zip(chosen, (4,) * 4, lengths, strict=False)), lengths)
        for chosen, lengths in zip(splits, LENGTHS, strict=True)
    ]
    packing = Packing(attention=True, positions=True, perturb_documents=True)
    expected = []
    for row, lengths in enumerate(LENGTHS):
        start, weights = 0, []
        for view, length in zip(views[row].views, lengths, strict=True):
            mask = whole["loss_mask"][row, start : start + length].tolist()
            kept = [keep * (place >= view.split) for place, keep in enumerate(mask)]
            weights += [0.5 * (row + 1) * sum(mask) / max(1, sum(kept)) * keep for keep in kept]
            start += length
        expected.append(weights)
    for rank in range(cp_size):
        layout = ViewLayout(L, 0, cp_size, rank)
        batch = make_view_batch(whole, views, "rpsd", layout, [1.0, 2.0], packing=packing)
        found, held = batch.view_weights(0.5).T, layout.standard_tokens()
        torch.testing.assert_close(found, torch.tensor(expected)[:, held])
        assert batch.documents.lengths(0) == LENGTHS[0]
    assert [torch.tensor(row).count_nonzero() for row in expected] == [1 + 3 + 0 + 3, 7]
    # No second view in this micro-step: nothing to weigh.
    alone = make_view_batch(whole, views, "rpsd", ViewLayout(L), [0.0, 0.0], packing=packing)
    assert alone.view_weights(0.5).shape == (0, 2)


def test_what_is_said_of_a_pack():
    whole = sample()
    documents = Packing(attention=True).documents(whole)
    sums = {name: pair.tolist() for name, pair in packing_sums(documents, whole["loss_mask"]).items()}
    # Borders stand behind tokens 2, 8 and 9 of the first row, all masked; its longest document has 6 of 16 tokens.
    assert sums == {
        "documents per sequence": [5, 2], "long document share": [16, 32], "masked border share": [3, 32],
    }  # fmt: skip
    rows = [{name: value[row] for name, value in whole.items()} for row in range(2)]
    said = describe_packing(Packing(attention=True), rows)
    assert "cut at documents, positions continuous; the first 2 windows hold 2.50 documents" in said
    assert "96.9%, 87.5% and 50.0% of the tokens stand in documents longer than 1, 4 and 8" in said
    assert "9.38% stand at a border, 9.38% there without loss" in said


def settled(**typed) -> tuple[bool, bool, bool]:
    flags = {
        "packing": None, "reset_attention_mask": False, "reset_position_ids": False, "eod_mask_loss": False,
        "dataloader_inter_document_masking": False, "perturb_documents": False, "conversations": False,
    }  # fmt: skip
    args = SimpleNamespace(**{**flags, **typed})
    settle_packing(args)
    assert not args.dataloader_inter_document_masking
    return args.reset_attention_mask, args.reset_position_ids, args.eod_mask_loss


def test_flags_and_what_they_stand_for():
    assert settled() == settled(packing="concatenate") == (False, False, False)
    assert settled(packing="document-mask") == (True, True, True)
    assert settled(reset_attention_mask=True) == (True, False, False)
    assert settled(dataloader_inter_document_masking=True) == (True, True, False)
    assert settled(conversations=True) == (True, True, True)
    assert settled(conversations=True, packing="concatenate") == (False, False, False)
    assert settled(conversations=True, reset_position_ids=True) == (False, True, False)
