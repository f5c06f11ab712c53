"""The lab's streams as Megatron's .bin/.idx, and its exams as .npz."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.lab.language import (
    ADAPTATION,
    PRETRAINING,
    VOCABULARY,
    Exam,
    make_base_exam,
    make_exam,
    needle_document,
    repetition_document,
)
from examples.lab.settings import Settings
from megatron_rpsd.data.files import replace_file

# What a generator is for; with the seed, its key.
_BASE, _ADAPT, _EXAM = 0, 1, 2


def base_documents(settings: Settings, seed: int) -> Iterator[np.ndarray]:
    """Pre-training documents, each one window: repetition and needle documents in turn."""
    rng = np.random.default_rng([seed, _BASE])
    for index in range(documents_for(settings.base.steps * settings.base.global_batch_size)):
        if index % 2:
            yield repetition_document(rng, settings.base.seq_length)
        else:
            yield needle_document(rng, settings.base.seq_length, PRETRAINING)[0]


def adaptation_documents(settings: Settings, seed: int) -> Iterator[np.ndarray]:
    """Documents with biased evidence, each one window; enough for the arms that get more steps."""
    rng, phase = np.random.default_rng([seed, _ADAPT]), settings.adapt
    for _ in range(documents_for(phase.steps * phase.global_batch_size * settings.most_steps_factor)):
        yield needle_document(rng, phase.seq_length, ADAPTATION, settings.furthest_evidence)[0]


def documents_for(samples: int) -> int:
    """Documents for that many samples: a window's last label is the next document's BOS, so there is one more."""
    return samples + 1


def write_stream(prefix: Path, documents: Iterator[np.ndarray]) -> None:
    """Documents as P.bin and P.idx.

    Megatron shuffles the documents, lays them end to end and cuts windows of --seq-length tokens. All documents have
    that length, so every window is one document, BOS first.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=DType.optimal_dtype(VOCABULARY))
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(get_idx_path(str(prefix)))


def write_streams(folder: Path, settings: Settings, seed: int) -> None:
    """The streams `base` and `adapt` of a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_stream(folder / "base", base_documents(settings, seed))
    write_stream(folder / "adapt", adaptation_documents(settings, seed))


def write_exam(path: Path, settings: Settings, seed: int, length: int) -> None:
    """The exam of a seed at a length; at the base's own window, one of its own documents."""
    rng = np.random.default_rng([seed, _EXAM, length])
    if length == settings.base.seq_length:
        exam = make_base_exam(rng, length, settings.base_exam_documents)
    else:
        exam = make_exam(rng, length, settings.exam_documents)
    content = io.BytesIO()
    np.savez(content, tokens=exam.tokens, positions=exam.positions, evidence=exam.evidence)
    replace_file(path, content.getvalue())  # another exam may be reading the one that is there


def exam_path(folder: Path, length: int) -> Path:
    return folder / f"exam_{length}.npz"


def read_exam(folder: Path, length: int) -> Exam:
    """What `write_exam` wrote."""
    with np.load(exam_path(folder, length)) as arrays:
        return Exam(arrays["tokens"], arrays["positions"], arrays["evidence"])
