"""The words RULER draws from: by hash, and the pairs against a list that is really built."""

from __future__ import annotations

import hashlib

import pytest

from megatron_rpsd.ruler import words


def test_pairs_equal_the_sorted_list() -> None:
    adjectives = ["well", "well-to", "well-to-do", "we", "red", "red", "Red", "we-", "a"]
    nouns = ["to", "do", "to-do", "zoo", "ATM", "do", "ox"]
    expected = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    pairs = words.WordPairs(adjectives, nouns)
    assert [pairs[index] for index in range(len(pairs))] == expected
    for outside in (-1, len(expected)):
        with pytest.raises(IndexError):
            pairs[outside]


def test_the_pool() -> None:
    pairs = words.word_pairs()
    assert (len(pairs), pairs[0], pairs[len(pairs) - 1]) == (6_171_620, "Early-ATM", "zonked-zucchini")
    assert len(words.all_words()) == 8166


@pytest.mark.slow
def test_the_pools_hash() -> None:
    pairs, digest = words.word_pairs(), hashlib.sha256()
    for index in range(len(pairs)):
        digest.update(f"{chr(10) if index else ''}{pairs[index]}".encode())
    assert digest.hexdigest() == "e5e6a09ed20903cb4abfcde8b89d1a40d4133a6fcff97001c690c21d97af3007"


def test_other_words_are_refused(monkeypatch) -> None:
    words.word_lists.cache_clear()
    monkeypatch.setattr(words, "WORDS_SHA256", "0")
    with pytest.raises(ValueError, match="wonderwords==3.0.1"):
        words.word_lists()
    words.word_lists.cache_clear()
