"""The samples of a prefix as training reads them, and where each of their tokens came from."""

from __future__ import annotations

import logging
import struct
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

from megatron_rpsd.data.arrangement import PADDING
from megatron_rpsd.data.documents import document_text
from megatron_rpsd.data.encoders import Encoder, build_encoder, read_tokenizer
from megatron_rpsd.data.indexed import read_pieces
from megatron_rpsd.data.manifest import Manifest, read_manifest
from megatron_rpsd.data.readers import read_document, repository_parts


@dataclass(frozen=True)
class Order:
    """Which of the data's windows a run's sample is: Megatron's shuffle of documents and windows."""

    seed: int
    """--seed"""
    split: str
    """--split, percentages of train, validation and test documents"""
    train_samples: int | None
    """training samples of the run; None is one epoch"""


@dataclass(frozen=True)
class Origin:
    """Where a token came from."""

    path: str
    line: int | None
    """line in a JSONL file, row in a parquet file, from 1; else the line of the character"""
    byte: int | None
    """first byte of the character in the (decompressed) file; in a JSONL file of its line; None in a parquet file"""
    characters: tuple[int, int]
    """[start, stop) in the document's text"""
    text: str
    """those characters"""
    around: str
    """the characters with up to 40 on each side"""


class Samples:
    """Samples of L + 1 tokens by index.

    Args:
        order: of a training run; without it samples are consecutive windows of the .bin.

    Raises:
        ValueError: no manifest, or too few tokens for a sample.
    """

    def __init__(self, prefix: str | Path, seq_length: int, order: Order | None = None) -> None:
        manifest = read_manifest(prefix)
        if manifest is None:
            raise ValueError(f"{prefix}.json is missing: make the data with tools/preprocess_data.py")
        self.manifest: Manifest = manifest
        self.prefix, self.seq_length = str(prefix), seq_length
        self.tokens = np.memmap(f"{prefix}.bin", manifest.dtype, mode="r")
        self._pieces: np.ndarray | None = None
        self._dataset = None if order is None else _training_dataset(self.prefix, manifest, seq_length, order)
        self._starts = _sequence_starts(self.prefix, self.tokens.itemsize)
        self._count = (
            (len(self.tokens) - 1) // seq_length if self._dataset is None else len(self._dataset.shuffle_index)
        )
        if self._count < 1:
            raise ValueError(
                f"--seq-length {seq_length}: {prefix} holds {len(self.tokens)} tokens, too few for a sample"
            )

    def __len__(self) -> int:
        return self._count

    def encoder(self, tokenizer: str | Path, pattern: str | None = None) -> Encoder:
        """The encoder of the data's tokenizer.

        Raises:
            ValueError: it cannot be loaded, or is another one.
        """
        spec = read_tokenizer(tokenizer, pattern)
        if spec.sha256 != self.manifest.tokenizer_sha256:
            raise ValueError(f"--tokenizer {tokenizer} is not the one that {self.prefix} was made with")
        return build_encoder(spec)

    def places(self, sample: int) -> np.ndarray:
        """Where the L + 1 tokens of a sample stand in the .bin, int64 [L + 1].

        Raises:
            ValueError: no such sample.
        """
        if not 0 <= sample < self._count:
            raise ValueError(f"sample {sample} does not exist: {self.prefix} has samples 0 to {self._count - 1}")
        length = self.seq_length
        if self._dataset is None:
            return np.arange(sample * length, (sample + 1) * length + 1)
        window = self._dataset.shuffle_index[sample]
        (first, start), (last, stop) = self._dataset.sample_index[window], self._dataset.sample_index[window + 1]
        parts = []
        for place in range(first, last + 1):
            document = int(self._dataset.document_index[place])
            begin = int(self._starts[document]) + (int(start) if place == first else 0)
            end = int(self._starts[document]) + int(stop) + 1 if place == last else int(self._starts[document + 1])
            parts.append(np.arange(begin, end))
        found = np.concatenate(parts)
        assert len(found) == length + 1
        return found

    def ids(self, sample: int) -> np.ndarray:
        """Token ids of a sample, int64 [L + 1]: the model reads the first L, the labels are the last L."""
        return self.tokens[self.places(sample)].astype(np.int64)

    def trace(self, sample: int, token: int, encoder: Encoder) -> Origin:
        """Where a sample's token came from, found by tokenizing its document again.

        Raises:
            ValueError: no such token; it is padding or an end token, which no text has; or the document has changed.
        """
        if not 0 <= token <= self.seq_length:
            raise ValueError(f"token {token} does not exist: a sample has tokens 0 to {self.seq_length}")
        place = int(self.places(sample)[token])
        self._pieces = read_pieces(self.prefix) if self._pieces is None else self._pieces
        number = int(np.searchsorted(self._pieces["place"], place, side="right")) - 1
        piece = self._pieces[number]
        if piece["file"] == PADDING:
            raise ValueError(f"token {token} of sample {sample} is padding, which comes from no file")
        path = Path(self.manifest.inputs[int(piece["file"])].path)
        document = read_document(
            path, int(piece["line"]), int(piece["offset"]), self.manifest.json_key, self.manifest.seed
        )
        text = document_text(document, self.manifest.json_key)
        ids, spans = encoder.spans(text)
        within = int(piece["start"]) + place - int(piece["place"])
        if within == len(ids) and self.tokens[place] == self.manifest.eod_id:
            ids, spans = [*ids, self.manifest.eod_id], [*spans, (len(text), len(text))]
        self._check(document.label, piece, ids)
        return _origin(document, text, spans[within], self.manifest.seed)

    def _check(self, label: str, piece: np.ndarray, ids: list[int]) -> None:
        """Refuse a document that is not the one that was tokenized."""
        start, place, count = int(piece["start"]), int(piece["place"]), int(piece["tokens"])
        stored, again = self.tokens[place : place + count], ids[start : start + count]
        if len(again) < count and count - len(again) == 1 and stored[-1] == self.manifest.eod_id:
            stored = stored[:-1]
        if stored.tolist() != list(again):
            raise ValueError(f"{label} gives other tokens than those stored: it, or the tokenizer, has changed")


def _origin(document, text: str, span: tuple[int, int], seed: int) -> Origin:
    start, stop = span
    around = text[max(0, start - 40) : stop + 40]
    path, line, byte = document.path, document.line, len(text[:start].encode())
    if path.is_dir():
        before = 0
        for part in repository_parts(path, seed):
            if byte < before + len(part.raw):
                break
            before += len(part.raw)
        path, byte = part.path, max(0, byte - before - part.header)
        line = 1 + part.raw[part.header :][:byte].count(b"\n")
    elif line is None:
        line = 1 + text.count("\n", 0, start)
    else:
        byte = document.offset if document.is_json else None
    return Origin(str(path), line, byte, span, text[start:stop], around)


def _sequence_starts(prefix: str, size: int) -> np.ndarray:
    """First token of each sequence of an .idx, and the number of all: int64 [n + 1]."""
    with Path(f"{prefix}.idx").open("rb") as file:
        _, _, count, _ = struct.unpack("<QBQQ", file.read(34)[9:])
    lengths = np.memmap(f"{prefix}.idx", "<i4", mode="r", offset=34, shape=(count,))
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _training_dataset(prefix: str, manifest: Manifest, seq_length: int, order: Order):
    """Megatron's own training dataset, for its order of samples.

    Made without its builder, which makes validation and test datasets, too, and never ends where one has no document.
    """
    indexed = megatron_indexed_dataset()
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    # The order depends on no token, so a stand-in for the tokenizer serves.
    tokenizer = SimpleNamespace(
        eod=-1, pad=-2, eos=-1, vocab_size=manifest.vocab_size, unique_identifiers={}, special_tokens_dict={}
    )
    with tempfile.TemporaryDirectory() as cache:
        config = GPTDatasetConfig(
            random_seed=order.seed,
            sequence_length=seq_length,
            blend=([prefix], None),
            split=order.split,
            path_to_cache=cache,
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        dataset = indexed.IndexedDataset(prefix)
        begin, end = (round(bound * len(dataset)) for bound in config.split_matrix[0])
        if begin >= end:
            raise ValueError(f"--split {order.split} leaves no training document of the {len(dataset)} of {prefix}")
        chosen = np.arange(begin, end, dtype=np.int32)
        return GPTDataset(dataset, prefix, chosen, order.train_samples, Split.train, config)


def megatron_indexed_dataset() -> ModuleType:
    """Megatron's indexed_dataset, imported without its remarks on missing GPU libraries, which this use never calls."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset
    finally:
        logger.setLevel(level)
    return indexed_dataset
