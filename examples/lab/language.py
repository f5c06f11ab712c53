"""The retrieval language: noise, needles that bind a value to a key, and queries that ask for it.

    BOS n n k7 v3 n n n k2 v9 n Q k7 v3 n ...
                                  ^ the answer: predicted at the query's key, found at the needle

A slot holds a query (three tokens), a needle (two) or noise (one). A key is asked at most once in a document. Keys of a
document's needles differ while there are unused ones; where a document holds more needles than there are keys, keys
that nobody asks for come again, as distractors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BOS, QUERY = 0, 1
KEYS, VALUES, NOISE = range(2, 130), range(130, 194), range(194, 226)
VOCABULARY = 226
NEEDLE_TOKENS, QUERY_TOKENS = 2, 3
DECILES = 10


@dataclass(frozen=True)
class Rates:
    """Probability of a needle and of a query in a slot; the rest is noise."""

    needle: float
    query: float


PRETRAINING = Rates(needle=0.12, query=0.15)
ADAPTATION = Rates(needle=0.08, query=0.05)


@dataclass(frozen=True)
class Ask:
    """A query in a document: where its key stands (the token that predicts the answer), and the needle's key."""

    position: int
    evidence: int

    @property
    def distance(self) -> int:
        """Tokens from the evidence's key to the query's."""
        return self.position - self.evidence


class _Keys:
    """Keys for the needles of a document: unused ones in random order, then again those that nobody asks for."""

    def __init__(self, rng: np.random.Generator, reserved: frozenset[int] = frozenset()) -> None:
        self.rng = rng
        self.free = [int(key) for key in rng.permutation(np.array(KEYS)) if int(key) not in reserved]
        self.repeatable = list(self.free) if reserved else []

    def next(self) -> int | None:
        if not self.free:
            if not self.repeatable:
                return None
            self.free = [int(key) for key in self.rng.permutation(self.repeatable)]
        return self.free.pop()


def needle_document(
    rng: np.random.Generator, length: int, rates: Rates, furthest: int | None = None
) -> tuple[np.ndarray, list[Ask]]:
    """A document of needles and queries.

    Args:
        length: tokens, BOS included.
        furthest: the most tokens between a query's key and the key of its evidence; None: no limit.

    Returns:
        token ids int64 [length]; its queries in order.
    """
    keys, tokens, asks = _Keys(rng), [BOS], []
    open_needles: list[int] = []  # positions of the keys that nobody asked for yet
    kinds, noise = rng.random(length), rng.integers(NOISE.start, NOISE.stop, length)
    values, picks = rng.integers(VALUES.start, VALUES.stop, length), rng.random(length)
    slot = 0
    while len(tokens) < length:
        room, here = length - len(tokens), len(tokens)
        if kinds[slot] < rates.query and room >= QUERY_TOKENS:
            near = [place for place in open_needles if furthest is None or here + 1 - place <= furthest]
            if near:
                evidence = near[int(picks[slot] * len(near))]
                open_needles.remove(evidence)
                asks.append(Ask(here + 1, evidence))
                tokens += [QUERY, tokens[evidence], tokens[evidence + 1]]
            else:
                tokens.append(int(noise[slot]))
        elif rates.query <= kinds[slot] < rates.query + rates.needle and room >= NEEDLE_TOKENS:
            key = keys.next()
            if key is None:
                tokens.append(int(noise[slot]))
            else:
                open_needles.append(here)
                tokens += [key, int(values[slot])]
        else:
            tokens.append(int(noise[slot]))
        slot += 1
    return np.array(tokens), asks


def repetition_document(rng: np.random.Generator, length: int) -> np.ndarray:
    """BOS and a chunk of random tokens again and again, int64 [length].

    The chunk is a quarter to a half of the document. Without such documents a small model does not learn to look a key
    up within any affordable number of steps, and with chunks from an eighth on it learns it late.
    """
    chunk = rng.integers(1, VOCABULARY, int(rng.integers(length // 4, length // 2, endpoint=True)))
    return np.concatenate([[BOS], np.resize(chunk, length - 1)])


@dataclass(frozen=True)
class Exam:
    """Documents with queries to be answered. In a depth exam they are ten, at the end, one for each depth decile.

    Attributes:
        tokens: int64 [N, L].
        positions: int64 [N, 10], of the queries' keys, by the decile of their evidence.
        evidence: int64 [N, 10], of the needles' keys.
    """

    tokens: np.ndarray
    positions: np.ndarray
    evidence: np.ndarray

    @property
    def answers(self) -> np.ndarray:
        """The right values, as `positions`."""
        return np.take_along_axis(self.tokens, self.positions + 1, axis=1)


def body_length(length: int) -> int:
    """Tokens of an exam document before its queries."""
    return length - DECILES * QUERY_TOKENS


def decile_bounds(length: int, decile: int) -> tuple[int, int]:
    """Half-open range of the positions of a body at which evidence of this depth decile may start (0: the furthest)."""
    body = body_length(length)
    return max(1, body * decile // DECILES), body * (decile + 1) // DECILES


def exam_document(rng: np.random.Generator, length: int, rates: Rates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One exam document: tokens [L], positions of its ten queries' keys and of their evidence [10], by decile."""
    body = body_length(length)
    asked = rng.choice(np.array(KEYS), DECILES, replace=False)
    evidence = np.array([
        rng.integers(start, stop - NEEDLE_TOKENS, endpoint=True)
        for start, stop in (decile_bounds(length, decile) for decile in range(DECILES))
    ])  # fmt: skip
    keys, tokens = _Keys(rng, frozenset(int(key) for key in asked)), np.zeros(length, dtype=np.int64)
    tokens[0], place = BOS, 1
    at = {int(position): int(key) for position, key in zip(evidence, asked, strict=True)}
    # Ten needles are there by design; the rest of the slots make the density that of training.
    rate = _filler_rate(rates.needle, body)
    while place < body:
        taken = place in at or (place + 1 not in at and place + 1 < body and rng.random() < rate)
        if taken:
            tokens[place] = at[place] if place in at else keys.next()
            tokens[place + 1] = rng.integers(VALUES.start, VALUES.stop)
        else:
            tokens[place] = rng.integers(NOISE.start, NOISE.stop)
        place += NEEDLE_TOKENS if taken else 1
    order, positions = rng.permutation(DECILES), np.zeros(DECILES, dtype=np.int64)
    for number, decile in enumerate(order):
        start = body + number * QUERY_TOKENS
        tokens[start : start + QUERY_TOKENS] = [QUERY, asked[decile], tokens[evidence[decile] + 1]]
        positions[decile] = start + 1
    return tokens, positions, evidence


def _filler_rate(needle_rate: float, body: int) -> float:
    """Rate of the other needles in the remaining slots, so that all needles together have the density of training.

    With probability p a slot, a token starts a needle with density p / (1 + p). Ten needles are placed; the others'
    rate q solves q / (1 + q) of the tokens that remain.
    """
    wanted = body * needle_rate / (1 + needle_rate) - DECILES
    remaining = body - DECILES * NEEDLE_TOKENS
    assert 0 <= wanted < remaining / NEEDLE_TOKENS, f"{body} tokens are too few for {DECILES} queries"
    density = wanted / remaining
    return density / (1 - density)


def make_exam(rng: np.random.Generator, length: int, documents: int, rates: Rates = ADAPTATION) -> Exam:
    """`documents` exam documents of `length` tokens."""
    made = [exam_document(rng, length, rates) for _ in range(documents)]
    return Exam(*(np.stack(column) for column in zip(*made, strict=True)))


def make_base_exam(rng: np.random.Generator, length: int, documents: int, queries: int = 3) -> Exam:
    """The last `queries` queries, int64 [N, queries], of documents as in pre-training that hold so many."""
    made: list[tuple[np.ndarray, list[Ask]]] = []
    while len(made) < documents:
        tokens, asks = needle_document(rng, length, PRETRAINING)
        if len(asks) >= queries:
            made.append((tokens, asks[-queries:]))
    return Exam(
        np.stack([tokens for tokens, _ in made]),
        np.array([[ask.position for ask in asks] for _, asks in made]),
        np.array([[ask.evidence for ask in asks] for _, asks in made]),
    )
