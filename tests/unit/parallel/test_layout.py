"""The view pair's layout as arithmetic: who holds which token. Moving them is a distributed test."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from megatron_rpsd.parallel import ViewLayout, layout, zigzag_chunks

# (L, t, CP) with L and L - t divisible by 2 CP.
PAIRS = [
    (length, start, cp)
    for cp in (1, 2, 3, 4)
    for length in sorted({2 * cp, 4 * cp, 12 * cp, 24})
    for start in range(0, length, 1 if cp == 1 else 2 * cp)
    if length % (2 * cp) == 0
]
SINGLES = [(length, None, cp) for length, _, cp in dict.fromkeys((length, 0, cp) for length, _, cp in PAIRS)]


def ranks(length: int, start: int | None, cp: int) -> list[ViewLayout]:
    return [ViewLayout(length, start, cp, rank) for rank in range(cp)]


def zigzag_by_torch(tokens: torch.Tensor, cp: int, rank: int) -> list[int]:
    """Chunks r and 2 CP - 1 - r of a sequence, cut by torch."""
    chunks = tokens.chunk(2 * cp)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]]).tolist()


@pytest.mark.parametrize(("length", "start", "cp"), PAIRS + SINGLES)
def test_every_rank_holds_its_two_chunks_of_each_part(length, start, cp):
    for rank, held in enumerate(ranks(length, start, cp)):
        standard = zigzag_by_torch(torch.arange(length), cp, rank) if cp > 1 else list(range(length))
        suffix = [] if start is None else list(range(start, length))
        if suffix and cp > 1:
            suffix = zigzag_by_torch(torch.tensor(suffix), cp, rank)
        assert held.standard_tokens().tolist() == standard
        assert held.suffix_tokens().tolist() == suffix
        on_the_pair_axis = standard + [token - start + length for token in suffix]
        assert held.local_indices().tolist() == on_the_pair_axis
        assert held.local_indices().dtype == torch.int64
        assert (held.local_standard, held.local_suffix) == (len(standard), len(suffix))


@pytest.mark.parametrize(("length", "start", "cp"), PAIRS + SINGLES)
def test_ranks_partition_the_pair_axis_and_gather_order_restores_it(length, start, cp):
    held = [rank.local_indices() for rank in ranks(length, start, cp)]
    pair_length = 2 * length - start if start is not None else length
    concatenated = torch.cat(held)
    assert sorted(concatenated.tolist()) == list(range(pair_length))
    assert len({len(tokens) for tokens in held}) == 1
    for seen_from in ranks(length, start, cp):
        assert seen_from.pair_length == pair_length
        order = seen_from.gather_order()
        if cp == 1:
            assert order is None
        else:
            assert order.dtype == torch.int64
            assert concatenated[order].tolist() == list(range(pair_length))


@pytest.mark.parametrize(("length", "start", "cp"), PAIRS + SINGLES)
def test_causal_work_is_equal_on_all_ranks_in_each_view(length, start, cp):
    """Token i attends to i + 1 keys in either view: counted as query-key pairs of a rank."""
    for part in ("standard_tokens", "suffix_tokens"):
        work = [int((getattr(rank, part)() + 1).sum()) for rank in ranks(length, start, cp)]
        assert len(set(work)) == 1, f"{part}: {work}"


@pytest.mark.parametrize(("length", "start", "cp"), PAIRS)
def test_chunks_are_sorted_not_empty_and_not_mergeable(length, start, cp):
    for rank in ranks(length, start, cp):
        for chunks in (rank.standard_chunks, rank.suffix_chunks):
            assert all(first < last for first, last in chunks)
            assert all(one[1] < other[0] for one, other in itertools.pairwise(chunks))


def test_the_drawn_example_is_what_the_code_does():
    """The rows of the module's docstring, their letters read as chunks."""
    letters = {}
    for line in layout.__doc__.splitlines():
        if row := re.match(r" +(pair axis|rank \d) +((?:[A-Da-d] )+)", line + " "):
            letters[row[1]] = row[2].split()
    assert "".join(letters["pair axis"]) == "AAAABBBBCCCCDDDDaabbccdd"
    for rank in (0, 1):
        held = ViewLayout(16, 8, 2, rank).local_indices()
        assert [letters["pair axis"][i] for i in held] == letters[f"rank {rank}"]
        assert len(held) == 12


def test_chunks_of_one_rank_and_of_neighbours_are_merged():
    assert zigzag_chunks(3, 10, 1, 0) == ((3, 10),)  # one rank takes any number of tokens
    assert zigzag_chunks(0, 16, 2, 0) == ((0, 4), (12, 16))
    assert zigzag_chunks(0, 16, 2, 1) == ((4, 12),)
    assert zigzag_chunks(8, 8, 2, 0) == zigzag_chunks(8, 8, 1, 0) == ()


def test_a_single_view_has_no_suffix():
    view = ViewLayout(8, None, 2, 1)
    assert (view.suffix_length, view.local_suffix, view.suffix_chunks) == (0, 0, ())
    assert view.suffix_tokens().shape == (0,) and view.suffix_tokens().dtype == torch.int64


def test_another_ranks_layout_is_the_same_but_for_the_rank():
    assert ViewLayout(16, 8, 2, 0).on_rank(1) == ViewLayout(16, 8, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, None, 2), "sequence length 10 does not divide by 2 x CP = 4"),
        ((16, 2, 4), "suffix length 14 does not divide by 2 x CP = 8"),
        ((18, 8, 3), "suffix length 10 does not divide by 2 x CP = 6"),
        ((16, 16), "suffix start 16 lies outside of the sequence of 16 tokens"),
        ((16, -1), "suffix start -1 lies outside of the sequence of 16 tokens"),
    ],
)
def test_lengths_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(ValueError) as refused:
        ViewLayout(*arguments)
    assert str(refused.value) == message


def test_a_sequence_that_does_not_divide_into_chunks_is_refused():
    with pytest.raises(ValueError, match=r"^6 tokens do not divide into 2 x CP = 4 zigzag chunks$"):
        zigzag_chunks(2, 8, 2, 0)
