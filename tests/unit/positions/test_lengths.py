"""Mixed lengths: shares met, one length for all ranks of a micro-step, and rows that are the windows' own tokens."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch

from megatron_rpsd.positions import (
    LengthSchedule,
    MixedLengths,
    StepShape,
    ViewSampler,
    cut_rows,
    parse_share,
    scaled_step,
)

L = 64
STEP = StepShape(global_batch_size=96, micro_batch_size=3, data_parallel_size=4)  # 8 micro-steps of 12 samples


def schedule(*shares: str, seed: int = 5, **options) -> LengthSchedule:
    return LengthSchedule(seed, L, tuple(map(parse_share, shares)), **options)


def by_micro_step(drawn: LengthSchedule, steps: int) -> list[list[int]]:
    """Lengths of the micro-steps of each global step; all samples of one must agree."""
    found = []
    for start in range(0, steps * STEP.global_batch_size, STEP.global_batch_size):
        lengths = []
        for first in range(start, start + STEP.global_batch_size, 12):
            (length,) = {drawn.at(index) for index in range(first, first + 12)}
            lengths.append(length)
        found.append(lengths)
    return found


def test_shares_that_divide_a_step_are_met_in_every_step_in_changing_order():
    steps = by_micro_step(schedule("0.5:64", "0.375:16", "0.125:8", step=STEP), 20)
    assert all(Counter(lengths) == {64: 4, 16: 3, 8: 1} for lengths in steps)
    assert len({tuple(lengths) for lengths in steps}) > 15


def test_shares_that_do_not_divide_a_step_are_met_on_the_average():
    steps = by_micro_step(schedule("0.3:64", "0.7:8", step=STEP), 400)
    counts = [lengths.count(64) for lengths in steps]
    assert set(counts) == {2, 3}  # 8 x 0.3 = 2.4
    # 400 draws of 2 + Bernoulli(0.4): standard error 0.0245
    assert sum(counts) / 400 == pytest.approx(2.4, abs=0.1)


def test_independent_lengths_belong_to_a_micro_batch():
    drawn = schedule("0.5:64", "0.5:8", step=STEP, sampling="independent")
    batches = [{drawn.at(index) for index in range(first, first + 3)} for first in range(0, 6000, 3)]
    assert all(len(lengths) == 1 for lengths in batches)
    assert sum(lengths == {64} for lengths in batches) / 2000 == pytest.approx(0.5, abs=0.05)
    assert any(batches[first] != batches[first + 1] for first in range(0, 40, 4))  # ranks of a micro-step differ


def test_a_length_depends_on_seed_and_index_alone():
    one, again = (schedule("0.5:64", "0.5:8", step=STEP) for _ in range(2))
    backwards = {index: again.at(index) for index in reversed(range(0, 2000, 7))}
    assert all(one.at(index) == length for index, length in backwards.items())
    other = schedule("0.5:64", "0.5:8", step=STEP, seed=6)
    assert any(one.at(index) != other.at(index) for index in backwards)


def test_lengths_do_not_follow_splits():
    """Both are stratified over the same micro-steps; a shared order would give short sequences the early splits."""
    splits = ViewSampler(5, "skip", L, split_sampling="stratified", step=STEP)
    drawn = schedule("0.5:64", "0.5:8", step=STEP)
    places = {64: [], 8: []}
    for index in range(0, 300 * STEP.global_batch_size, 12):
        places[drawn.at(index)].append(splits.view(index).split / L)
    for values in places.values():  # 1,200 uniform draws: standard error 0.0083
        assert sum(values) / len(values) == pytest.approx(0.5 - 0.5 / L, abs=0.03)


def test_rows_are_the_windows_tokens_in_order_with_indices_of_their_own():
    tokens = torch.arange(3 * 8).view(3, 8)
    sample = {"tokens": tokens, "loss_mask": tokens % 2 == 0, "sample_index": torch.tensor([7, 8, 9])}
    rows = cut_rows(sample, 2)
    assert rows["tokens"].tolist() == [[2 * row, 2 * row + 1] for row in range(12)]
    assert torch.equal(rows["loss_mask"].flatten(), sample["loss_mask"].flatten())
    assert rows["sample_index"].tolist() == list(range(28, 40))
    whole = cut_rows(sample, 8)
    assert torch.equal(whole["tokens"], tokens) and torch.equal(whole["sample_index"], sample["sample_index"])


def test_a_micro_batch_of_short_sequences_has_one_split_and_many_shifts():
    drawn = schedule("0.5:64", "0.5:8", step=STEP)
    samplers = {
        length: ViewSampler(5, "skip", length, split_sampling="stratified", step=scaled_step(STEP, L // length))
        for length in drawn.lengths
    }
    mix = MixedLengths(drawn, samplers)
    seen = set()
    for first in range(0, STEP.global_batch_size, 12):
        ranks = []
        for rank in range(4):
            index = torch.arange(first + 3 * rank, first + 3 * rank + 3)
            rows, sampler = mix.read({"tokens": torch.zeros(3, L), "sample_index": index})
            assert rows["tokens"].shape == (3 * L // sampler.length, sampler.length)
            views = [sampler.view(int(row)) for row in rows["sample_index"]]
            assert {view.split for view in views} == {views[0].split} and max(view.split for view in views) < L
            ranks.append((sampler.length, views[0].split))
            if sampler.length == 8:
                assert len({view.shift for view in views}) > 3 and all(1 <= view.shift <= 8 for view in views)
        assert len(set(ranks)) == 1
        seen.add(ranks[0][0])
    assert seen == {64, 8}


def test_mean_length():
    assert schedule("0.25:64", "0.75:16").mean_length == 28


def test_shares_are_read_as_typed():
    assert parse_share("0.1:8") == (Fraction(1, 10), 8) and parse_share("1/3:16") == (Fraction(1, 3), 16)
    assert schedule(*["0.1:64", "0.2:32", "0.3:16", "0.4:8"]).lengths == (64, 32, 16, 8)  # floats would miss 1
    for text in ("8", "half:8", "0.5:x", "0.5:", "1/0:8", ""):
        with pytest.raises(ValueError, match="write SHARE:LENGTH"):
            parse_share(text)


@pytest.mark.parametrize(
    ("shares", "unit", "message"),
    [
        (["0.5:64", "0.4:8"], 1, r"--length-mix 0.5:64 0.4:8: the shares sum to 0.9, not 1"),
        (["0.5:128", "0.5:8"], 1, r"128 is longer than --seq-length 64"),
        (["0.5:64", "0.5:24"], 1, r"24 must be at least 2 and divide --seq-length 64"),
        (["0.5:64", "0.5:1"], 1, r"1 must be at least 2"),
        (["0.5:64", "0.5:4"], 8, r"4 must divide by 2 x CP \(x TP under sequence parallelism\) = 8"),
        (["0.5:8", "0.5:8"], 1, r"a length is named twice"),
        (["1:8", "0:64"], 1, r"the share 0 of length 64 must be positive"),
        (["1.5:8", "-0.5:64"], 1, r"the share -0.5 of length 64 must be positive"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(shares, unit, message):
    with pytest.raises(ValueError, match=message) as refused:
        schedule(*shares, unit=unit)
    assert "\n" not in str(refused.value) and str(refused.value).startswith("--length-mix ")
