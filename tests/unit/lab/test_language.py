"""The retrieval language: where evidence stands, how often keys are asked for, how dense needles are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from examples.lab.language import (
    ADAPTATION,
    BOS,
    DECILES,
    KEYS,
    NOISE,
    PRETRAINING,
    QUERY,
    VALUES,
    VOCABULARY,
    body_length,
    decile_bounds,
    make_base_exam,
    make_exam,
    needle_document,
    repetition_document,
)


def kinds(tokens: np.ndarray) -> str:
    """One letter a token: b BOS, q query mark, k key, v value, n noise; an independent reading of the vocabulary."""
    edges = {0: "b", 1: "q"}
    return "".join(edges.get(int(t)) or ("k" if t < 130 else "v" if t < 194 else "n") for t in tokens)


def read(tokens: np.ndarray) -> tuple[list[int], list[int]]:
    """Positions of the keys of needles, and of queries; refuses what is not a sentence of the language."""
    needles, queries, letters, place = [], [], kinds(tokens), 1
    assert letters[0] == "b"
    while place < len(letters):
        if letters[place : place + 3] == "qkv":
            queries.append(place + 1)
            place += 3
        elif letters[place : place + 2] == "kv":
            needles.append(place)
            place += 2
        else:
            assert letters[place] == "n", (place, letters)
            place += 1
    return needles, queries


def documents(count: int, length: int, rates, furthest=None):
    rng = np.random.default_rng(5)
    return [needle_document(rng, length, rates, furthest) for _ in range(count)]


def test_the_vocabulary_is_226_ids_without_a_gap() -> None:
    ids = [BOS, QUERY, *KEYS, *VALUES, *NOISE]
    assert ids == list(range(VOCABULARY)) and VOCABULARY == 226
    assert (len(KEYS), len(VALUES), len(NOISE)) == (128, 64, 32)


@pytest.mark.parametrize("length, rates, furthest", [(64, PRETRAINING, None), (512, ADAPTATION, 64)])
def test_every_query_asks_once_for_a_needle_before_it(length, rates, furthest) -> None:
    for tokens, asks in documents(60, length, rates, furthest):
        needles, queries = read(tokens)
        assert len(tokens) == length
        assert [ask.position for ask in asks] == queries
        assert max(Counter(int(tokens[place]) for place in queries).values(), default=0) <= 1
        assert max(Counter(int(tokens[place]) for place in needles).values(), default=0) <= 1
        for ask in asks:
            assert ask.evidence in needles and ask.evidence < ask.position - 1
            assert tokens[ask.evidence] == tokens[ask.position]
            assert tokens[ask.evidence + 1] == tokens[ask.position + 1]


def test_biased_evidence_is_near_and_unbiased_is_not() -> None:
    near = [ask.distance for _, asks in documents(60, 512, ADAPTATION, 64) for ask in asks]
    assert max(near) <= 64 and max(near) > 55 and len(near) > 60 * 10
    assert max(ask.distance for _, asks in documents(60, 512, ADAPTATION) for ask in asks) > 300


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_an_exam_has_one_query_for_every_decile(length) -> None:
    exam = make_exam(np.random.default_rng(2), length, 20)
    body = body_length(length)
    assert body == length - 30 and exam.tokens.shape == (20, length)
    for tokens, positions, evidence, answers in zip(
        exam.tokens, exam.positions, exam.evidence, exam.answers, strict=True
    ):
        needles, queries = read(tokens)
        assert sorted(positions) == queries == list(range(body + 1, length, 3))
        for decile in range(DECILES):
            start, stop = decile_bounds(length, decile)
            assert start <= evidence[decile] < evidence[decile] + 1 < stop  # the whole needle is in its decile
            asked = tokens[positions[decile]]
            assert [place for place in needles if tokens[place] == asked] == [evidence[decile]]
            assert answers[decile] == tokens[evidence[decile] + 1]
    order = np.argsort(exam.positions, axis=1)
    assert len({tuple(row) for row in order}) > 10  # depths are asked for in an order of their own


def test_decile_bounds_cover_the_body_without_overlap() -> None:
    for length in (131, 512, 2048):
        bounds = [decile_bounds(length, decile) for decile in range(DECILES)]
        assert bounds[0][0] == 1 and bounds[-1][1] == body_length(length)
        assert all(before[1] == after[0] for before, after in zip(bounds, bounds[1:], strict=False))


def test_needles_are_as_dense_at_every_length_as_in_training() -> None:
    # A needle in 8 % of the slots, two tokens long: 0.08 / 1.08 needles a token.
    expected = ADAPTATION.needle / (1 + ADAPTATION.needle)
    for length, count in ((512, 200), (1024, 100), (2048, 50)):
        exam = make_exam(np.random.default_rng(3), length, count)
        density = np.mean([len(read(tokens)[0]) for tokens in exam.tokens]) / body_length(length)
        assert density == pytest.approx(expected, rel=0.04), length


def test_evidence_is_uniform_within_a_decile() -> None:
    exam = make_exam(np.random.default_rng(4), 512, 400)
    start, stop = decile_bounds(512, 4)
    inside = (exam.evidence[:, 4] - start) / (stop - 2 - start)
    assert inside.min() == 0 and inside.max() == 1 and inside.mean() == pytest.approx(0.5, abs=0.06)


def test_repetition_documents_repeat() -> None:
    rng = np.random.default_rng(6)
    for _ in range(30):
        tokens = repetition_document(rng, 64)
        assert len(tokens) == 64 and tokens[0] == BOS and tokens[1:].min() > BOS
        assert any((tokens[1 + period :] == tokens[1:-period]).all() for period in range(16, 33))


def test_the_base_exam_takes_the_last_queries() -> None:
    exam = make_base_exam(np.random.default_rng(7), 64, 30)
    assert exam.tokens.shape == (30, 64) and exam.positions.shape == (30, 3)
    for tokens, positions in zip(exam.tokens, exam.positions, strict=True):
        assert read(tokens)[1][-3:] == list(positions)


def test_the_same_seed_gives_the_same_documents() -> None:
    first, second = (make_exam(np.random.default_rng(8), 512, 3) for _ in range(2))
    assert (first.tokens == second.tokens).all()
    assert (make_exam(np.random.default_rng(9), 512, 3).tokens != first.tokens).any()
