"""Documents to tokens on several processes, in the documents' order whatever their number."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from megatron_rpsd.data.chat import ChatEncoder, parse_conversations
from megatron_rpsd.data.documents import Document, document_text
from megatron_rpsd.data.encoders import Encoder, TokenizerSpec, build_encoder

# Batches under way for each worker: as many as keep it busy, and no more, so that memory does not follow the input.
_BATCHES = 4
# Up to as many, workers are threads: they share the tokenizer and its cache and start at once. What Python's lock
# serialises, ids to arrays, is about a twentieth of the work, so more of them are processes.
_THREADS = 8
LONGEST = 2**31 - 1
"""Tokens of a document that Megatron's index, with its 4 bytes a length, can hold."""
CHAT = "conversations"
"""Kind of a TokenizerSpec whose documents are lines of conversations."""
EMPTY, FAULTY = -1, -2
"""In place of a length: a document without text, and one that cannot be read."""


@dataclass(frozen=True)
class EncodedBatch:
    """Tokens of some documents."""

    tokens: np.ndarray
    """all documents' ids behind one another, [t]"""
    lengths: np.ndarray
    """tokens of each document, or EMPTY, or FAULTY; int64 [documents]"""
    faults: dict[int, str]
    """what is wrong with a document, by its place in the batch; one line, naming file and line"""
    special: int = 0
    """special tokens that texts spelled and the tokenizer did not read as text"""


class DocumentEncoder:
    """Documents to ids, with the end-of-document token behind each."""

    def __init__(self, spec: TokenizerSpec, append_eod: bool, json_key: str) -> None:
        self._encoder: Encoder = build_encoder(spec)
        self._eod = spec.eod_id if append_eod else None
        self._json_key, self._spec = json_key, spec
        self._special = np.zeros(spec.cardinality, dtype=bool)
        self._special[list(spec.special_ids)] = True
        self._added = int(self._special[np.array(self._encoder.encode_batch([""])[0], dtype=np.int64)].sum())

    def __call__(self, documents: Sequence[Document]) -> EncodedBatch:
        """The tokenizer's own defaults hold: a beginning-of-sequence token is there exactly when the tokenizer adds
        one, and an end token that it adds itself is not doubled.
        """
        lengths, faults, texts, places = np.full(len(documents), EMPTY, np.int64), {}, [], []
        for place, document in enumerate(documents):
            try:
                text = document_text(document, self._json_key)
            except ValueError as error:
                lengths[place], faults[place] = FAULTY, str(error)
                continue
            if text.strip():
                texts.append(text)
                places.append(place)
        parts, expected = [], 0
        for place, ids in zip(places, self._encoder.encode_batch(texts), strict=True):
            appended = self._eod is not None and (not len(ids) or ids[-1] != self._eod)
            if appended:
                ids = [*ids, self._eod]
            if len(ids) > LONGEST:
                lengths[place] = FAULTY
                faults[place] = (
                    f"{documents[place].label} has {len(ids)} tokens; Megatron's index holds at most {LONGEST} in one "
                    "document: split it"
                )
            elif len(ids):
                lengths[place] = len(ids)
                parts.append(np.asarray(ids, dtype=np.int32))
                expected += self._added + appended
        tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
        assert not tokens.size or 0 <= tokens.min() and tokens.max() < self._spec.cardinality, (
            f"{documents[0].label} and behind: token id outside the vocabulary"
        )
        special = int(self._special[tokens].sum()) - expected
        return EncodedBatch(tokens.astype(self._spec.dtype), lengths, faults, special)


class ConversationEncoder:
    """Lines of conversations to three numbers for each of them, in place of its tokens."""

    def __init__(self, spec: TokenizerSpec) -> None:
        from transformers import AutoTokenizer

        self._encoder = ChatEncoder(AutoTokenizer.from_pretrained(spec.path, local_files_only=True))
        added = self._encoder.tokenizer.added_tokens_decoder
        self._marks = [added[token].content for token in sorted(self._encoder.special & added.keys())]

    def __call__(self, documents: Sequence[Document]) -> EncodedBatch:
        """tokens: for each conversation of each line its tokens, how many the assistant must produce, and the first
        label of these, int32 [3 x conversations].
        """
        lengths, faults, parts, special = np.full(len(documents), EMPTY, np.int64), {}, [], 0
        for place, document in enumerate(documents):
            if not document.raw.strip():
                continue
            try:
                conversations = parse_conversations(document.raw, document.label)
                found = [self._encoder.encode(each, document.label) for each in conversations]
            except ValueError as error:
                lengths[place], faults[place] = FAULTY, str(error)
                continue
            for ids, mask in found:
                # Nothing predicts the first token, so it is no label.
                parts += [len(ids), sum(mask), mask.index(1, 1) if 1 in mask[1:] else LONGEST]
            lengths[place] = 3 * len(found)
            contents = [message.get("content") or "" for each in conversations for message in each]
            # A template's text does not tell its own marks from those that a message spells.
            special += sum(content.count(mark) for content in contents for mark in self._marks)
        return EncodedBatch(np.array(parts, dtype=np.int32), lengths, faults, special)


def _document_encoder(spec: TokenizerSpec, append_eod: bool, json_key: str) -> DocumentEncoder | ConversationEncoder:
    return ConversationEncoder(spec) if spec.kind == CHAT else DocumentEncoder(spec, append_eod, json_key)


_in_worker: DocumentEncoder | ConversationEncoder | None = None


def _start_worker(spec: TokenizerSpec, append_eod: bool, json_key: str) -> None:
    global _in_worker
    _in_worker = _document_encoder(spec, append_eod, json_key)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        # A worker also holds the writing end of its queue, so a killed parent would never end it.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode_in_worker(batch: list[Document]) -> EncodedBatch:
    assert _in_worker is not None, "the pool's initializer did not run"
    return _in_worker(batch)


@contextmanager
def _pool(workers: int, *arguments) -> Iterator[Callable[[list[Document]], Future]]:
    """What hands documents to a worker: a thread where the tokenizer runs without Python's lock, else a process."""
    if arguments[0].kind == "huggingface" and workers <= _THREADS:
        encoder = DocumentEncoder(*arguments)
        pool, call = ThreadPoolExecutor(workers), encoder
    else:
        # spawn: the tokenizers library has its own threads, and a fork of a process with threads can hang.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, arguments)
        call = _encode_in_worker
    try:
        yield partial(pool.submit, call)
    finally:
        pool.shutdown(cancel_futures=True)


def encode(
    batches: Iterable[Any], spec: TokenizerSpec, append_eod: bool, json_key: str, workers: int
) -> Iterator[tuple[Any, EncodedBatch]]:
    """Every batch with its tokens, in order; one worker is this process.

    Args:
        batches: objects with `documents`, a list of Document.

    Raises:
        ValueError: a worker died, as when memory ran out.
    """
    if workers == 1:
        encoder = _document_encoder(spec, append_eod, json_key)
        for batch in batches:
            yield batch, encoder(batch.documents)
        return
    with _pool(workers, spec, append_eod, json_key) as submit:
        pending: deque = deque()
        try:
            for batch in batches:
                pending.append((batch, submit(batch.documents)))
                if len(pending) >= _BATCHES * workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise ValueError(
                f"--workers {workers}: a worker died, probably for want of memory; use fewer, or split the longest "
                "documents"
            ) from None
