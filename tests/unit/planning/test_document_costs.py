"""Counted attention against the dense mask; a whole window is balanced over zigzag ranks, a pack is not."""

from __future__ import annotations

import pytest

from megatron_rpsd.parallel import ViewLayout
from megatron_rpsd.planning.document_costs import attended_pairs, measure_packs, rank_imbalance
from tests.unit.attention.test_segments import BORDERS, LENGTH, pair_mask


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("start", [None, 0, 4])
def test_pairs_are_the_masks_ones_whoever_holds_them(start, cp_size):
    for borders in BORDERS:
        ranks = [attended_pairs(ViewLayout(LENGTH, start, cp_size, rank), borders) for rank in range(cp_size)]
        assert sum(ranks) == pair_mask(start, borders).sum()


def test_zigzag_balances_one_document_and_not_many():
    assert rank_imbalance(4096, 4, 10**9, packs=2) == pytest.approx(1, abs=1e-3)
    assert 1.2 < rank_imbalance(4096, 4, 256) < 4
    assert rank_imbalance(4096, 1, 256, packs=2) == 1


def test_measured_rows():
    found = measure_packs(64, [16, 64], heads=1, repetitions=1)
    assert [row["document_length"] for row in found["packs"]] == [16, 64] and found["packs"][1]["work"] == 1
    # Four documents of 16; the suffix from 32 on reads two of them again.
    assert found["packs"][0]["work"] == pytest.approx(6 * 136 / (2080 + 2080 - 528))
