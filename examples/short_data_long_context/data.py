"""The streams: documents of the short window, truly long documents for the teacher, packed short samples for students.

    base, teacher-base    BOS ....                                                  64 tokens, half of them repetition
    long                  BOS ..................................................... 512 tokens, evidence anywhere before
    packed                BOS ... END BOS ..... END BOS .... END BOS .. END BOS ... 512 tokens, 32 to 64 a sample

A packed window's samples are independent: each query's evidence stands in its own sample. Keys come from one pool, so
that they recur in other samples of the window by chance. The last sample is cut off where the window ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.lab.data import base_documents, documents_for, write_stream
from examples.lab.language import Rates, needle_document
from examples.short_data_long_context.settings import END, Settings

# What a generator is for; with the seed, its key. The lab's are 0 to 2.
_LONG, _PACKED = 12, 13
TEACHER_SEEDS = 1000
"""added to a seed for its teacher's base"""


def short_sample(rng: np.random.Generator, length: int, rates: Rates) -> np.ndarray:
    """A document of needles and queries that holds END at its end alone, int64 [length]."""
    tokens = needle_document(rng, length - 1, rates)[0]
    return np.append(np.where(tokens == END, END - 1, tokens), END)


def long_documents(rng: np.random.Generator, length: int, count: int, rates: Rates) -> Iterator[np.ndarray]:
    """Documents whose evidence stands anywhere before its query, each one window."""
    for _ in range(count):
        yield needle_document(rng, length, rates)[0]


def packed_window(rng: np.random.Generator, length: int, shortest: int, longest: int, rates: Rates) -> np.ndarray:
    """A window of independent samples of U{shortest..longest} tokens, int64 [length]; the last one is cut off."""
    samples, filled = [], 0
    while filled < length:
        size = int(rng.integers(shortest, longest, endpoint=True))
        samples.append(short_sample(rng, size, rates))
        filled += size
    return np.concatenate(samples)[:length]


def packed_windows(rng: np.random.Generator, settings: Settings, count: int) -> Iterator[np.ndarray]:
    """Windows of packed short samples."""
    shortest, longest = settings.shortest_sample, settings.longest_sample
    for _ in range(count):
        yield packed_window(rng, settings.student.seq_length, shortest, longest, settings.sample_rates)


def write_streams(folder: Path, settings: Settings, seed: int) -> None:
    """All streams of a seed, as Megatron's .bin and .idx."""
    folder.mkdir(parents=True, exist_ok=True)
    write_stream(folder / "base", base_documents(settings, seed))
    write_stream(folder / "teacher-base", base_documents(settings, TEACHER_SEEDS + seed))
    long, packed = (np.random.default_rng([seed, key]) for key in (_LONG, _PACKED))
    teacher, student = settings.teacher, settings.student
    count = documents_for(teacher.steps * teacher.global_batch_size)
    write_stream(folder / "long", long_documents(long, teacher.seq_length, count, settings.teacher_rates))
    write_stream(
        folder / "packed", packed_windows(packed, settings, documents_for(student.steps * student.global_batch_size))
    )
